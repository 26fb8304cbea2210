"""Registration by definition: an object of a given name in each module of a package."""

import importlib
import pkgutil
from typing import Any


def collect(package: str, name: str) -> list[Any]:
    """`name` from each module of a package that defines it, ordered by module name."""
    path = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path)]
    return [getattr(module, name) for module in modules if hasattr(module, name)]
