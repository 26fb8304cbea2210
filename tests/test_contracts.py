"""Rules of the code base (docs/architecture.md), enforced by tests."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "maxlm").rglob("*.py"))

# Only jax's own transforms are used; a model's modules are mere containers of parameters.
BANNED_OF_NNX = {
    *(
        "jit",
        "scan",
        "remat",
        "checkpoint",
        "grad",
        "value_and_grad",
        "vmap",
        "pmap",
        "cond",
        "while_loop",
        "fori_loop",
    ),
    *("custom_vjp", "shard_map", "Optimizer", "ModelAndOptimizer", "Intermediate", "Variable", "Param", "Rngs"),
    *("with_partitioning", "with_metadata", "split_rngs", "state", "split", "merge", "update"),
}
BANNED_METHODS = {"sow", "perturb"}
# Names that later versions of JAX removed or renamed.
GONE = {"jax.tree_map", "jax.lax.pvary", "jax.sharding.use_mesh", "pltpu.TPUCompilerParams", "pl.core_map", "pl.dot"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    script = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None, no_cache=True))"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_imports_point_down():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("maxlm/ops/norm.py", "import maxlm.models.decoder", "Imports point down"),
        ("maxlm/train/loop.py", "def late():\n    from maxlm.objectives import sft", "Imports point down"),
        ("maxlm/config/load.py", "import maxlm.core.tree", "Configuration imports nothing of ours"),
        ("maxlm/data/rows.py", "import maxlm.models.decoder", "Data and tokenizer stand beside"),
        ("maxlm/tokenizer/codec.py", "import maxlm.data.rows", "Data may use the tokenizer"),
    ],
)
def test_upward_import_is_detected(file, line, contract, tmp_path):
    for package, name in (("maxlm", "maxlm"), ("gcp", "maxlm_gcp")):
        shutil.copytree(ROOT / package, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stderr
    assert any(contract in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout


def dotted(node: ast.AST) -> str:
    """The dotted name of an expression, such as `jax.lax.scan`; empty if it is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def banned_uses(source: str) -> list[str]:
    """A module's uses of NNX's transforms and mutable state, or of names removed from JAX."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax"):
            found += [
                f"from {node.module} import {a.name}" for a in node.names if (node.module, a.name) != ("flax", "nnx")
            ]
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.startswith("flax")]
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            owner, _, last = name.rpartition(".")
            if (owner == "nnx" and last in BANNED_OF_NNX) or name in GONE or node.attr in BANNED_METHODS:
                found.append(f"line {node.lineno}: {name or node.attr}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_models_use_only_jax_transforms(path):
    assert banned_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from flax import nnx\nstep = nnx.jit(f)",
        "from flax import nnx\n@nnx.remat\ndef f(): pass",
        "from flax import nnx\nnnx.Optimizer(model, tx)",
        "from flax.nnx import value_and_grad",
        "import flax.linen as nn",
        "self.sow('intermediates', 'x', x)",
        "jax.tree_map(f, x)",
    ],
)
def test_banned_use_is_detected(source):
    assert banned_uses(source)


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "gcp").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_names_of_test_modules_are_unique():
    """Of two modules with one name, pytest imports the first and refuses the second."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
