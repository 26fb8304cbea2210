"""The public Python API is what docs/api.md lists: it can be imported and is documented."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `(maxlm[\w.]+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_listed_name_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert inspect.getdoc(found)


@pytest.mark.parametrize("line", re.findall(r"^\| `(maxlm[\w.]+\([^`]*\))`", PAGE, re.MULTILINE))
def test_listed_parameters_are_those_of_the_function(line):
    name, _, arguments = line.rstrip(")").partition("(")
    module, _, attribute = name.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    for argument in filter(None, arguments.split(", ")):
        assert argument.partition("=")[0] in parameters
