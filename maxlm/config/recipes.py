"""The recipes that come with maxlm, found by name from anywhere: `post/sft` is configs/post/sft.yaml."""

import difflib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import yaml

from maxlm.errors import ConfigError

# Where pip installs them, relative to its scheme (venv, user, system).
_SHARED = "share/maxlm/configs"


def recipe_folder() -> Path:
    """Locate configs/ in the checkout, or in the installed package's shared files.

    Raises:
      ConfigError: there is neither.
    """
    checkout = Path(__file__).resolve().parents[2] / "configs"
    if checkout.is_dir():
        return checkout
    try:
        installed = files("maxlm") or []
    except PackageNotFoundError:
        installed = []
    for file in installed:
        if file.match(f"{_SHARED}/*/*.yaml") and Path(file.locate()).is_file():
            return Path(file.locate()).resolve().parents[1]
    raise ConfigError([f"there is no {checkout}, and the installed maxlm has no recipes; reinstall it with pip"])


def find_config(name: str | Path) -> Path:
    """The file of that name, else the recipe: `post/sft`, `post/sft.yaml` or `configs/post/sft.yaml`.

    Raises:
      ConfigError: there is neither; the message suggests the closest names.
    """
    path = Path(name)
    try:
        if path.exists():
            return path
        recipe = find_recipe(path)
    except OSError:
        return path  # a name that the file system rejects; reading it reports the error
    if recipe is not None:
        return recipe
    files_here = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
    near = [str(path.parent / found) for found in files_here]
    near += difflib.get_close_matches(path.with_suffix("").as_posix(), _recipes_or_none(), 1, cutoff=0.7)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `maxlm config list` lists the recipes"
    raise ConfigError([f"{path}: there is no such file{hint}"])


def recipes() -> dict[str, Path]:
    """The file of each recipe by its name."""
    folder = recipe_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def describe_recipe(path: Path) -> tuple[str, str]:
    """The kind of a recipe, and the first sentence of its leading comment."""
    text = path.read_text(encoding="utf-8")
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence = " ".join(comment).partition(". ")[0].rstrip(".")
    return yaml.safe_load(text)["kind"], sentence


def find_recipe(name: str | Path) -> Path | None:
    """The recipe of that name, as in `find_config`; None if there is none."""
    path = Path(name)
    parts = path.with_suffix("").parts if path.suffix in (".yaml", "") else path.parts
    name = "/".join(parts[1:] if parts[:1] == ("configs",) else parts)
    return _recipes_or_none().get(name)


def _recipes_or_none() -> dict[str, Path]:
    """All recipes; none in an installation that lacks them, which can still read files."""
    try:
        return recipes()
    except ConfigError:
        return {}
