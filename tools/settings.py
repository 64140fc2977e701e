"""The book's one reader of settings.ini, taken from its module without importing the rest of the
package.

`import lora_book` brings torch with it, which takes seconds, and it fails while a chapter is
broken, which is just when the tools have to say which one.
"""

import importlib
import sys
import types
from pathlib import Path

_CORE = types.ModuleType("lora_book_core")
_CORE.__path__ = [str(Path(__file__).resolve().parent.parent / "lora_book" / "core")]
sys.modules[_CORE.__name__] = _CORE

load_settings = importlib.import_module(f"{_CORE.__name__}.settings").load_settings
