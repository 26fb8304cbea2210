"""What registers itself by being defined: an object of one name in each module of a package."""

import importlib
import pkgutil
from typing import Any


def collect(package: str, name: str) -> list[Any]:
    """`name` of each module of a package that defines it, in the order of the modules' names."""
    path = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path)]
    return [getattr(module, name) for module in modules if hasattr(module, name)]
