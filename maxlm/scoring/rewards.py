"""Reward functions: (prompt, completions, record of the training file) -> a number for each completion.

A configuration names one of `RULES`, or a custom function as `package.module:function`, or several with weights. The
keyword-only parameters of a function are its settings.
"""

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from maxlm.config.base import Frozen
from maxlm.config.feedback import JudgedReward
from maxlm.data.examples.records import Text, field
from maxlm.errors import ConfigError, DataError
from maxlm.scoring.rules import answers, code, form, latex, style

RewardFunction = Callable[..., Sequence[float]]

# Parameters of these names are no settings. The first receives the number of tokens of each completion, its end token
# included. The second receives an empty dict, into which the function may put further numbers by name, one for each
# completion and the same names in every call, which are only reported.
TOKENS, METRICS = "num_tokens", "metrics"


@dataclass(frozen=True)
class Rule:
    """A reward function that is part of maxlm.

    field: of the record that the function reads; None if it reads none.
    read: raises ValueError for a record that no completion could satisfy; its message follows the name of the field.
    """

    function: RewardFunction
    field: str | None = None
    read: Callable[[dict[str, Any]], Any] = lambda record: None


RULES: Mapping[str, Rule] = {
    rule.function.__name__: rule
    for rule in (
        Rule(answers.exact_match, "answer", answers.right_answer),
        Rule(answers.contains, "answer", answers.right_answer),
        Rule(answers.last_number, "answer", answers.right_number),
        Rule(answers.last_number_zh, "answer", functools.partial(answers.right_number, chinese=True)),
        Rule(answers.tagged_answer, "answer", answers.right_answer),
        Rule(latex.latex_answer, "answer", answers.right_answer),
        Rule(form.regex_match),
        Rule(form.tag_format),
        Rule(form.json_format),
        Rule(style.length),
        Rule(style.overlong),
        Rule(style.language),
        Rule(style.repetition),
        Rule(code.unit_tests, "tests", code.read_tests),
    )
}


class RewardPart(Frozen):
    """A reward function or a reward model, and its weight in the sum."""

    name: str | None = Field(
        None, description="A rule of `maxlm.scoring.rewards`, or your own function as package.module:function."
    )
    model: str | None = Field(
        None, description="Instead, a run folder or checkpoint of a reward model with the same tokenizer."
    )
    weight: float = 1.0
    settings: dict[str, Any] = Field({}, description="Keyword arguments of the function.")

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.name is None) == (self.model is None):
            raise ValueError("give either name, a reward function, or model, the folder of a reward model")
        if self.model is not None and self.settings:
            raise ValueError("settings: are those of a function, and a reward model has none")
        return self

    @property
    def source(self) -> str:
        """Its name in the configuration."""
        return self.name or self.model


def _kind_of_part(value: Any) -> str:
    is_judge = "judge" in value if isinstance(value, dict) else isinstance(value, JudgedReward)
    return "judge" if is_judge else "part"


AnyPart = Annotated[
    Annotated[RewardPart, Tag("part")] | Annotated[JudgedReward, Tag("judge")], Discriminator(_kind_of_part)
]

# The name of a function, or several parts with their weights.
RewardSetting = Annotated[
    Annotated[str, Tag("name")] | Annotated[tuple[AnyPart, ...], Field(min_length=1), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list | tuple) else "name"),
]


@dataclass(frozen=True)
class Reward:
    """A reward function with its settings.

    name: of its part of the sum, unique.
    source: its name in the configuration.
    takes: which of TOKENS and METRICS the function has as parameters.
    """

    name: str
    source: str
    weight: float
    function: RewardFunction
    settings: Mapping[str, Any]
    takes: frozenset[str] = frozenset()

    def __call__(
        self,
        prompt: Text,
        completions: list[str],
        record: dict[str, Any],
        num_tokens: Sequence[int],
        metrics: dict[str, Sequence[float]] | None = None,
    ) -> Sequence[float]:
        """The function's own value; numbers that it only reports are put into `metrics`."""
        available = {TOKENS: list(num_tokens), METRICS: {} if metrics is None else metrics}
        given = {name: value for name, value in available.items() if name in self.takes}
        return self.function(prompt, completions, record, **given, **self.settings)


def parts_of(setting: str | Sequence[RewardPart | JudgedReward]) -> Sequence[RewardPart | JudgedReward]:
    """The parts of the sum."""
    return [RewardPart(name=setting)] if isinstance(setting, str) else setting


def judges_of(setting: str | Sequence[RewardPart | JudgedReward]) -> dict[str, JudgedReward]:
    """The parts that a judge gives, by name."""
    parts = parts_of(setting)
    return {name: part for name, part in zip(names_of(parts), parts) if isinstance(part, JudgedReward)}


def names_of(parts: Sequence[RewardPart | JudgedReward]) -> list[str]:
    """A short name for each part, unique among them: of its function, of the folder of its model, of its judge."""
    short = [re.split(r"[:/]", part.source.rstrip("/"))[-1] for part in parts]
    counts = [short[: index + 1].count(name) for index, name in enumerate(short)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(short, counts)]


def find_rewards(setting: str | Sequence[RewardPart | JudgedReward]) -> list[Reward]:
    """The reward functions of a configuration; its reward models and judges are left out.

    Raises:
      ConfigError: there is no such function, or its settings do not fit.
    """
    parts = parts_of(setting)
    found = []
    for name, part in zip(names_of(parts), parts):
        if isinstance(part, RewardPart) and part.name is not None:
            function = find_function(part.name)
            settings, takes = _checked_settings(function, part)
            found.append(Reward(name, part.name, part.weight, function, settings, takes))
    return found


def check_record(setting: str | Sequence[RewardPart | JudgedReward], record: dict[str, Any], where: str) -> None:
    """Reject a record that no completion could satisfy; a custom function accepts any record.

    Raises:
      DataError: its message begins with `where`, FILE:LINE.
    """
    for part in parts_of(setting):
        if isinstance(part, JudgedReward):
            if part.measure == "wins_over_reference" and not isinstance(field(record, "answer", where), str):
                raise DataError(f"{where}: answer must be a text for a judge to compare with; fix or remove the line")
            continue
        name = part.name
        rule = RULES.get(name)
        if rule is None or rule.field is None:
            continue
        field(record, rule.field, where)
        try:
            rule.read(record)
        except ValueError as error:
            raise DataError(
                f"{where}: for the reward {name} {rule.field} {error}; fix or remove the line, or choose another reward"
            ) from None


def find_function(name: str) -> RewardFunction:
    """The reward function of this name.

    Raises:
      ConfigError: there is no such function.
    """
    if name in RULES:
        return RULES[name].function
    module_name, colon, function_name = name.partition(":")
    if colon:
        # sys.path holds the folder of the maxlm command; user modules are in the current folder.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        # A user module may raise anything on import.
        except (Exception, SystemExit) as error:
            raise ConfigError([f"objective.reward: {name!r} cannot be imported: {_first_line(error)}"]) from error
        if not callable(function):
            raise ConfigError([f"objective.reward: {name!r} is not a function but a {type(function).__name__}"])
        return function
    near = difflib.get_close_matches(name, RULES, 1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(RULES)}, or package.module:function"
    raise ConfigError([f"objective.reward: {name!r} is not a reward function; {hint}"])


def _checked_settings(function: RewardFunction, part: RewardPart) -> tuple[dict[str, Any], frozenset[str]]:
    """The settings of a part, validated by the annotations of the function; which other parameters it has."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function in C without a signature
        return dict(part.settings), frozenset()
    hints = _hints(function)
    keywords = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    fields: dict[str, Any] = {}
    for each in keywords:
        if each.name not in (TOKENS, METRICS):
            hint = hints.get(each.name, Any)
            fields[each.name] = hint if each.default is inspect.Parameter.empty else NotRequired[hint]
    make: Any = TypedDict  # mypy knows literal fields only
    settings = make("settings", fields)
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    settings.__pydantic_config__ = ConfigDict(
        extra="allow" if takes_any else "forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    try:
        given = TypeAdapter(settings).validate_python(part.settings)
    except ValidationError as error:
        allowed = f"; the settings of {part.name} are {', '.join(fields)}" if fields else "; it has no settings"
        problems = [f"objective.reward: {part.name}: {_explain(item)}{allowed}" for item in error.errors()]
        raise ConfigError(problems) from None
    return given, frozenset({TOKENS, METRICS} & {each.name for each in keywords})


def _hints(function: RewardFunction) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:  # a partial, an object, or annotations that cannot be evaluated
        return {}


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name!r}"
    if item["type"] == "missing":
        return f"the setting {name!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name or 'settings'}: {message}"


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {text}"
