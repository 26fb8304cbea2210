"""Load YAML into a validated configuration.

A file may name one `base:` file, relative to itself, or a recipe, such as `models/llama-3.1-8b`, whose keys it
overrides. Overrides from the command line, such as
`optim.learning_rate=3e-4`, are applied last.
"""

import difflib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import yaml
from pydantic import BaseModel, Field, Tag, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from maxlm.config.data import DataConfig, TokenizerConfig
from maxlm.config.feedback import ConstitutionConfig, FeedbackConfig
from maxlm.config.objective import ObjectiveConfig, objective_classes
from maxlm.config.preset import PresetConfig
from maxlm.config.prompt import PromptConfig
from maxlm.config.read import MAX_DEPTH, BadYaml, read_yaml
from maxlm.config.recipes import find_config, find_recipe
from maxlm.config.sweep import SweepConfig
from maxlm.config.train import TrainConfig
from maxlm.errors import ConfigError

MAX_SHOWN = 60  # characters of a value quoted in a message

AnyConfig = Annotated[
    TrainConfig
    | DataConfig
    | TokenizerConfig
    | SweepConfig
    | PresetConfig
    | FeedbackConfig
    | ConstitutionConfig
    | PromptConfig,
    Field(discriminator="kind"),
]
_MODELS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "sweep": SweepConfig,
    "model": PresetConfig,
    "feedback": FeedbackConfig,
    "constitution": ConstitutionConfig,
    "prompt": PromptConfig,
}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, kind: str | None = None) -> Any:
    """Read, merge and validate a configuration file.

    Args:
      path: a YAML file, or the name of a recipe, such as `post/sft`.
      overrides: `dotted.key=value` strings; values are read as YAML.
      kind: the kind that the caller needs, such as `train` or `data`; None accepts any.

    Raises:
      ConfigError: with one line per mistake.
    """
    path = find_config(path)
    tree = _read_with_base(path)
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    if problems:
        raise ConfigError(problems)
    if kind is not None and tree.get("kind") != kind:
        raise ConfigError([f"{path}: kind is {tree.get('kind')!r}, but this command needs kind: {kind}"])
    return parse_config(tree, where=str(path))


def parse_config(tree: dict, *, where: str = "config") -> Any:
    """Validate a nested dict whose `kind` selects the model; `where` names it in messages."""
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in _MODELS:
        raise ConfigError([f"{where}: {_bad_kind('kind', kind, _MODELS)}"])
    try:
        return _MODELS[kind].model_validate(tree)
    except ValidationError as error:
        items, model = error.errors(), _MODELS[kind]
        problems = [f"{where}: {_explain(item, model)}" for item in items if not _follows(item, items)]
        raise ConfigError(problems) from None


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict:
    """The JSON schema of all configuration files, for editors."""
    schema = TypeAdapter(AnyConfig).json_schema()
    # An editor must accept `base`, which is removed before validation.
    for model in _MODELS.values():
        schema["$defs"][model.__name__]["properties"]["base"] = {
            "type": "string",
            "description": "A YAML file, relative to this one, or a recipe's name, whose keys this file overrides.",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "maxlm configuration", **schema}


def _read_with_base(path: Path) -> dict:
    tree = _read_yaml(path)
    base_name = tree.pop("base", None)
    if base_name is None:
        return tree
    if not isinstance(base_name, str):
        raise ConfigError([f"{path}: base: {base_name!r} is not the name of a file"])
    beside = path.parent / base_name
    base = _read_yaml(beside if beside.exists() or find_recipe(base_name) is None else find_recipe(base_name))
    if base.get("kind") == "model":
        # A published model, whose settings a training takes.
        del base["kind"]
        base.pop("about", None)
    if "base" in base:
        raise ConfigError([f"{path}: its base {base_name} has a base itself; only one level is allowed"])
    return _merge(base, tree)


def _read_yaml(path: Path) -> dict:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file"]) from None
    except OSError as error:
        # The error may be that the name itself is too long.
        name = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}..."
        raise ConfigError([f"{name}: cannot be read: {error.strerror.lower()}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start + 1}); save it as UTF-8"]) from None
    except BadYaml as error:
        line = f", line {error.line}" if error.line else ""
        raise ConfigError([f"{path}{line}: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must be a mapping of keys to values, such as `kind: train`"])
    return tree


def _merge(base: dict, top: dict) -> dict:
    """Merge `top` over `base`. A section whose `kind` or spelling changes is replaced: its old keys do not apply."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _is_other(old, value):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _is_other(old: dict, new: dict) -> bool:
    """Whether the keys of a section do not apply to the new one: it has another `kind`, or a pattern of layers is given
    in place of equal layers, or the reverse."""
    is_pattern, is_uniform = "pattern" in new, "mixer" in new or "mlp" in new
    becomes_uniform = is_uniform and "pattern" in old
    becomes_pattern = is_pattern and ("mixer" in old or "mlp" in old)
    return new.get("kind", old.get("kind")) != old.get("kind") or becomes_uniform or becomes_pattern


def _apply_override(tree: dict, override: str) -> str | None:
    """Set one key in place; returns an error message for a bad override, or None."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        return f"override {_shown(override)}: must look like section.key=value"
    try:
        value = read_yaml(text)
    except BadYaml as error:
        return f"override {_shown(override)}: the value {error}"
    keys = dotted.split(".")
    if len(keys) > MAX_DEPTH:
        return f"override {_shown(override)}: the key is nested too deeply"
    node: Any = tree
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        if isinstance(node, list):
            if key not in map(str, range(len(node))):
                return (
                    f"override {_shown(override)}: {where} is a list of {len(node)}, counted from 0, and has no {key}"
                )
            key = int(key)
        elif not isinstance(node, dict):
            return f"override {_shown(override)}: {where} holds a value, not a section"
        if depth == len(keys) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    return None


def _follows(item: ErrorDetails, items: list[ErrorDetails]) -> bool:
    """Whether an error only follows from another one: a list is too short because invalid elements are dropped."""
    loc = item["loc"]
    return item["type"] == "too_short" and any(i["type"] != "too_short" and i["loc"][: len(loc)] == loc for i in items)


def _bad_kind(path: str, given: Any, allowed: Iterable[str]) -> str:
    """The message for a `kind` that is missing, or unknown, with the closest known one."""
    allowed = list(allowed)
    if given is None:
        return f"{path}: must be given: one of {', '.join(map(repr, allowed))}"
    near = difflib.get_close_matches(str(given), allowed, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path}: {given!r} must be one of {', '.join(map(repr, allowed))}{hint}"


def _explain(item: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one pydantic error: dotted path, value, what is allowed, closest key."""
    location, model = _locate(item["loc"], root)
    path = ".".join(location) or "(top)"
    if item["type"] == "extra_forbidden":
        allowed = list(model.model_fields) if model else []
        near = difflib.get_close_matches(location[-1], allowed, 1)
        hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: must be given"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = list(_by_kind(model.model_fields[location[-1]].annotation))
        return _bad_kind(f"{path}.kind", item.get("ctx", {}).get("tag"), kinds)
    if item["type"] == "value_error":
        prefix = f"{path}: " if location else ""
        return prefix + str(item["ctx"]["error"])
    return f"{path}: {_shown(item['input'])}: {_wanted(item, model, location)}"


# Replacements for pydantic's messages, which name Python types.
_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string; write it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
}


def _wanted(item: ErrorDetails, model: type[BaseModel] | None, location: list[str]) -> str:
    """What a value must be; for a number, the full range."""
    field = model.model_fields.get(location[-1]) if model and location else None
    if item["type"] in ("int_type", "int_from_float", "greater_than_equal", "less_than_equal") and field:
        limits = [part for part in _metadata(field) if isinstance(part, annotated_types.Ge | annotated_types.Le)]
        bounds = {type(part): getattr(part, "ge", getattr(part, "le", None)) for part in limits}
        if len(bounds) == 2:
            whole = any(int in (member, *typing.get_args(member)) for member in _members(field.annotation))
            number = "whole number" if whole else "number"
            return f"must be a {number} from {bounds[annotated_types.Ge]} to {bounds[annotated_types.Le]}"
    if item["type"] in _TYPES:
        return _TYPES[item["type"]]
    return item["msg"].replace("Input should be", "must be").replace("Tuple should have", "must be a list of")


def _metadata(field: FieldInfo) -> list:
    """The constraints of a field's annotation; pydantic keeps those of `X | None` nested inside the union."""
    inner = [part for member in _members(field.annotation) for part in getattr(member, "__metadata__", ())]
    nested = [part.metadata for part in inner if isinstance(part, FieldInfo)]
    return [*field.metadata, *inner, *(part for parts in nested for part in parts)]


def _shown(value: Any) -> str:
    """A value as written in YAML, truncated if long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _locate(loc: tuple, root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path of pydantic's `loc`, without the tags of unions, and the model that holds its last key."""
    model: Any = root
    path: list[str] = []
    owner = model
    for part in loc:
        field = model.model_fields.get(part) if _is_model(model) else None
        tagged = _tagged(model, part)
        if tagged is not None:
            model = tagged
            continue
        path.append(str(part))
        owner = model if _is_model(model) else owner
        model = field.annotation if field else _item(model)
        model = _only_model(model)
    return path, owner if _is_model(owner) else None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _members(kind: Any) -> tuple:
    if kind is ObjectiveConfig:
        return objective_classes()
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _members(typing.get_args(kind)[0])
    return typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)


def _tagged(kind: Any, tag: Any) -> Any:
    """The member of a union with this `kind` or tag; None if there is no such union or tag."""
    for member in _members(kind):
        if typing.get_origin(member) is Annotated and any(
            isinstance(m, Tag) and m.tag == tag for m in member.__metadata__
        ):
            return typing.get_args(member)[0]
    models = _by_kind(kind)
    return models.get(tag) if len(models) > 1 else None


def _by_kind(kind: Any) -> dict[str, type[BaseModel]]:
    """The models of a union by their `kind`."""
    members = [part for member in _members(kind) for part in _members(member)]
    models = [member for member in members if _is_model(member) and "kind" in member.model_fields]
    return {tag: model for model in models for tag in typing.get_args(model.model_fields["kind"].annotation)}


def _only_model(kind: Any) -> Any:
    """`Model | None` as Model; everything else unchanged."""
    models = [member for member in _members(kind) if _is_model(member)]
    return models[0] if len(models) == 1 else kind


def _item(kind: Any) -> Any:
    """The element type of a sequence annotation, or the type of a dict's values."""
    arguments = typing.get_args(kind)
    return _only_model(arguments[typing.get_origin(kind) is dict]) if arguments else None
