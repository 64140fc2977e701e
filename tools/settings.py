"""The book's one reader of settings.ini. It needs nothing of the package that takes seconds to
import, or that a broken chapter could break.
"""

from lora_book.lab.settings import load_settings

__all__ = ["load_settings"]
