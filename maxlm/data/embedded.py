"""The embedded corpus: text that every Python installation contains, so that a first model needs no download.

One document per module of the standard library (docstrings and comment blocks, in the order of its source), one per
topic of Python's built-in help, one per compiled module (its `__doc__` strings). Modules are read as source and never
imported, because some have side effects. Compiled modules without side effects are the exception.
"""

import ast
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from maxlm.data.documents import Document
from maxlm.errors import DataError

URI = "python:stdlib"
LICENCE = "PSF-2.0"

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data")
)
# Compiled modules without side effects on import; those that this Python lacks are skipped.
_COMPILED_MODULES = (
    "builtins", "sys", "_abc", "_asyncio", "_bisect", "_blake2", "_bz2", "_codecs", "_collections", "_contextvars",
    "_csv", "_ctypes", "_datetime", "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp", "_io",
    "_json", "_locale", "_lsprof", "_lzma", "_md5", "_multibytecodec", "_opcode", "_operator", "_pickle", "_queue",
    "_random", "_sha1", "_sha3", "_signal", "_socket", "_sqlite3", "_sre", "_ssl", "_stat", "_statistics", "_string",
    "_struct", "_thread", "_tokenize", "_tracemalloc", "_typing", "_warnings", "_weakref", "_winapi", "_zoneinfo",
    "array", "atexit", "binascii", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal",
    "math", "mmap", "posix", "pwd", "pyexpat", "resource", "select", "syslog", "termios", "time", "unicodedata", "zlib",
)  # fmt: skip
_COMMENT = re.compile(r"[ \t]*#+!?[ ]?(.*)")
# Editor and tool directives, and separator lines.
_NO_PROSE = re.compile(r"[-=*#~+ ]*|.*coding[:=].*|[ /]*(usr|bin)/.*|(type|noqa|pragma|pylint|fmt|XXX)\b.{0,30}")

_HIDDEN_ARGUMENT = re.compile(r"\$(module|self|type|cls)(, )?(/(, )?)?")


def read_embedded() -> Iterator[Document]:
    """All documents of the running Python, in a fixed order.

    Raises:
      DataError: if this Python has no source of its standard library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in library.rglob("*.py") if is_wanted(path.relative_to(library)))
    if not paths:
        raise DataError(f"{URI}: this Python has no source files in {library}; give your own text as a source")
    for path in paths:
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        yield _document(f"module/{module}", _module_text(module, path))
    yield from _topics()
    seen: set[str] = set()
    for name in _COMPILED_MODULES:
        yield _document(f"compiled/{name}", _compiled_text(name, seen))


def _document(name: str, text: str) -> Document:
    return Document(id=name, source=URI, licence=LICENCE, text=text)


def is_wanted(path: Path) -> bool:
    """Whether a file, relative to the standard library, is part of the library proper."""
    return not _SKIPPED_FOLDERS & {*path.parts} and not path.parts[0].startswith(("config-", "_sysconfigdata"))


def _topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield _document(f"topic/{name}", topics[name].strip())


def _module_text(module: str, path: Path) -> str:
    """Docstrings, each under the name of its object, and comment blocks, in source order."""
    source = path.read_bytes().decode("utf-8", errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    blocks: list[tuple[int, str]] = []
    string_lines: set[int] = set()
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            if (text := ast.get_docstring(node)) and text.strip():
                blocks.append((node.body[0].lineno, f"{name}\n\n{text.strip()}"))
        elif isinstance(node, ast.Constant):
            string_lines.update(range(node.lineno, node.end_lineno + 1))
            continue
        stack.extend((name, child) for child in ast.iter_child_nodes(node) if _spans_lines(child))
    blocks += _comment_blocks(source, string_lines)
    return "\n\n".join(text for _, text in sorted(blocks))


def _spans_lines(node: ast.AST) -> bool:
    """Whether a node spans several lines, as docstrings and multi-line strings do."""
    return getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1)


def _comment_blocks(source: str, string_lines: set[int]) -> Iterator[tuple[int, str]]:
    """Blocks of comment-only lines, each with its first line number."""
    start, lines = 0, []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        match = _COMMENT.fullmatch(line) if number not in string_lines else None
        if match:
            start = start or number
            if not _NO_PROSE.fullmatch(match[1]):
                lines.append(match[1].rstrip())
        else:
            if lines:
                yield start, "\n".join(lines)
            start, lines = 0, []


def _compiled_text(name: str, seen: set[str]) -> str:
    """The `__doc__` strings of a compiled module; repeated ones, such as those of slots, are skipped."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    blocks = []

    def visit(qualified: str, thing: object) -> None:
        text = getattr(thing, "__doc__", None)
        if isinstance(text, str) and text.strip() and text not in seen:
            seen.add(text)
            signature = _HIDDEN_ARGUMENT.sub("", getattr(thing, "__text_signature__", None) or "")
            blocks.append(f"{qualified}{signature}\n\n{inspect.cleandoc(text)}")

    visit(name, module)
    for attribute, thing in sorted(vars(module).items()):
        if inspect.isbuiltin(thing):
            visit(f"{name}.{attribute}", thing)
        elif isinstance(thing, type) and thing.__module__ in (name, name.removeprefix("_")):
            visit(f"{name}.{attribute}", thing)
            for member, value in sorted(vars(thing).items()):
                visit(f"{name}.{attribute}.{member}", value)
    return "\n\n".join(blocks)
