"""Modules of the part "Experiments", imported when first used."""
import importlib
import pkgutil


def __getattr__(name: str):
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
