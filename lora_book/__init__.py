"""lora_book: the open textbook of low-rank adaptation, as a package.

Names are looked up when they are first used: `import lora_book` alone imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_book.core.adapter import Adapter, LowRank
    from lora_book.core.adapting import delta, disabled, n_trainable, param_groups
    from lora_book.core.errors import LoraBookError
    from lora_book.core.hosts import adapters
    from lora_book.core.merging import merge, remove, unmerge
    from lora_book.core.method import Method
    from lora_book.core.peft import to_peft
    from lora_book.core.saving import save
    from lora_book.core.steps import train_step
    from lora_book.registry import adapt, advance, from_peft, load, methods, register

__version__ = "0.2.0"
__all__ = [
    "Adapter",
    "LoraBookError",
    "LowRank",
    "Method",
    "adapt",
    "adapters",
    "advance",
    "delta",
    "disabled",
    "from_peft",
    "load",
    "merge",
    "methods",
    "n_trainable",
    "param_groups",
    "register",
    "remove",
    "save",
    "to_peft",
    "train_step",
    "unmerge",
]
_HOMES = {
    "Adapter": "core.adapter",
    "LoraBookError": "core.errors",
    "LowRank": "core.adapter",
    "Method": "core.method",
    "adapters": "core.hosts",
    "delta": "core.adapting",
    "disabled": "core.adapting",
    "merge": "core.merging",
    "n_trainable": "core.adapting",
    "param_groups": "core.adapting",
    "remove": "core.merging",
    "save": "core.saving",
    "to_peft": "core.peft",
    "train_step": "core.steps",
    "unmerge": "core.merging",
}
_PARTS = ("analysis", "core", "experiments", "future", "lab", "past", "present", "theory")


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"lora_book.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'lora_book' has no attribute {name!r}")
    home = importlib.import_module(f"lora_book.{_HOMES.get(name, 'registry')}")
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
