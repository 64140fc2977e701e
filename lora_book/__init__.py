"""lora_book: the open textbook of low-rank adaptation, as a package."""
import importlib

from lora_book.core.adapting import delta, disabled, n_trainable, param_groups
from lora_book.core.errors import LoraBookError
from lora_book.core.hosts import adapters
from lora_book.core.merging import merge, remove, unmerge
from lora_book.core.peft import to_peft
from lora_book.core.saving import save
from lora_book.core.steps import train_step
from lora_book.registry import adapt, advance, from_peft, load, methods

__version__ = "0.1.0"
__all__ = ["LoraBookError", "adapt", "adapters", "advance", "delta", "disabled", "from_peft", "load", "merge", "methods",
           "n_trainable", "param_groups", "remove", "save", "to_peft", "train_step", "unmerge"]
_PARTS = ("analysis", "core", "experiments", "future", "past", "present", "theory")


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"lora_book.{name}")
    raise AttributeError(f"module 'lora_book' has no attribute {name!r}")
