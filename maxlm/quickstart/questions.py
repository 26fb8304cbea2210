"""Questions and answers about the Python standard library, generated from signatures and docstrings by templates.

Every answer is verifiable: it follows from the signature or the sentence that the question quotes. Functions are
held out by a hash of their name, so that a held-out question is of a trained kind but about an unseen function.
"""

import ast
import random
import re
import sysconfig
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maxlm.data.embedded import is_wanted

_SENTENCE = re.compile(r"[A-Z][a-z]+ [^\n`\"]{12,70}[.]?")


@dataclass(frozen=True)
class Function:
    """A function of the library, parsed from its source."""

    module: str
    name: str
    parameters: tuple[str, ...]
    defaults: tuple[tuple[str, str], ...]
    summary: str  # first line of the docstring if it is a plain sentence, else empty

    @property
    def signature(self) -> str:
        defaults = dict(self.defaults)
        listed = (f"{name}={defaults[name]}" if name in defaults else name for name in self.parameters)
        return f"{self.name}({', '.join(listed)})"


@dataclass(frozen=True)
class Question:
    """One question of a kind, with its only correct answer."""

    kind: str
    prompt: str
    answer: str


def read_functions() -> list[Function]:
    """Public functions and methods with two to five plain parameters, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    functions: dict[tuple[str, str], Function] = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if is_wanted(relative):
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            for function in _functions_of(path, module):
                functions.setdefault((module, function.name), function)
    return list(functions.values())


def is_held_out(function: Function, fraction: float) -> bool:
    """Whether questions about this function are held out; depends only on its name."""
    return zlib.crc32(function.name.encode()) % 1000 < 1000 * fraction


def questions_about(function: Function, rng: random.Random) -> list[Question]:
    """One question of each kind that the function allows, in random order."""
    signature = f"`{function.signature}`"
    questions = [
        Question("first parameter", f"What is the first parameter of {signature}?", function.parameters[0]),
        Question("last parameter", f"What is the last parameter of {signature}?", function.parameters[-1]),
        Question("number", f"How many parameters does {signature} take?", str(len(function.parameters))),
        Question("module", f"Which module defines `{function.module}.{function.name}`?", function.module),
    ]
    if function.summary:
        first_word = function.summary.split()[0]
        questions.append(Question("first word", f'With which word does "{function.summary}" begin?', first_word))
    if function.defaults:
        name, value = rng.choice(function.defaults)
        questions.append(Question("default value", f"What is the default of `{name}` in {signature}?", value))
    rng.shuffle(questions)
    return questions


def _functions_of(path: Path, module: str) -> Iterator[Function]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (function := _function(node, module)):
            yield function


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that contain statements, breadth first like `ast.walk`, skipping expressions, which are most of a tree."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        yield (node := nodes.popleft())
        nodes.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)
        )


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> Function | None:
    summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
    summary = summary if _SENTENCE.fullmatch(summary) else ""
    arguments = node.args
    plain = [
        argument.arg for argument in [*arguments.posonlyargs, *arguments.args] if argument.arg not in ("self", "cls")
    ]
    if node.name.startswith("_") or not 2 <= len(plain) <= 5:
        return None
    values = [ast.unparse(default) for default in arguments.defaults]
    if any(len(value) > 12 for value in values):
        return None
    defaults = tuple(zip(plain[len(plain) - len(values) :], values)) if values else ()
    return Function(module, node.name, tuple(plain), defaults, summary)
