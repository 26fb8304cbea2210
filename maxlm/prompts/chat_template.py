"""Chat templates: the tokens before and after the content of each role.

The template is data, not code: lists of control tokens and literal text. Control tokens are inserted by id, so message
text can never be parsed as one.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from maxlm.errors import TokenizerError
from maxlm.prompts.tools import RESULTS, as_written
from maxlm.runtime.storage import storage_path

FILE_NAME = "chat_template.json"

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_TOKENS = (SYSTEM, USER, ASSISTANT, END)


@dataclass(frozen=True)
class ChatTokens:
    """A chat as token ids, with a loss weight for each id: 1.0 if the model learns to generate it, else 0.0."""

    ids: list[int]
    loss_weights: list[float]


class TextEncoder(Protocol):
    """What a chat template needs of a tokenizer.

    Attributes:
      control_tokens: the id of each.
    """

    control_tokens: Mapping[str, int]

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, in which no control token is recognized."""
        ...


@dataclass(frozen=True)
class RoleTemplate:
    """Prefix and suffix of a role's content. A part is `{"control": TOKEN}` or `{"text": TEXT}`."""

    prefix: tuple[dict[str, str], ...]
    suffix: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """Roles, and the answering role, whose content and suffix the model learns to generate."""

    roles: dict[str, RoleTemplate]
    answering_role: str
    begin: tuple[dict[str, str], ...]

    @property
    def writes(self) -> set[str]:
        """What it writes as its own, and not as text: see `as_written`."""
        return {RESULTS} if "tool" in self.roles else set()

    def encode(
        self,
        messages: Sequence[dict],
        encoder: TextEncoder,
        *,
        tools: Sequence[dict] | None = None,
        generation_prompt: bool = False,
    ) -> ChatTokens:
        """The ids of a chat.

        Args:
          messages: `{"role": ..., "content": ...}` each; a `weight` multiplies the loss on an answer. Tool calls and
            results are those of OpenAI, but `arguments` is an object.
          tools: functions that the model may call, in OpenAI's form.
          generation_prompt: end with the prefix of the answering role, for generation. Nothing is learned then.

        Returns:
          The ids, with loss weight 1, or the message's `weight`, exactly on the answering role's content and suffix.

        Raises:
          TokenizerError: a role is unknown, or a content is not a string.
        """

        def encode(parts: Iterable[dict[str, str]]) -> list[int]:
            ids: list[int] = []
            for part in parts:
                ids += (
                    [encoder.control_tokens[part["control"]]]
                    if "control" in part
                    else encoder.encode_plain(part["text"])
                )
            return ids

        ids = encode(self.begin)
        weights = [0.0] * len(ids)
        for message in as_written(messages, tools, self.writes)[0]:
            role = self.role(message.get("role"))
            prefix, answer = encode(role.prefix), encode([{"text": message["content"]}, *role.suffix])
            ids += prefix + answer
            is_learned = message["role"] == self.answering_role and not generation_prompt
            weights += [0.0] * len(prefix)
            weights += [float(message.get("weight", 1.0)) if is_learned else 0.0] * len(answer)
        if generation_prompt:
            ids += encode(self.role(self.answering_role).prefix)
        return ChatTokens(ids, weights + [0.0] * (len(ids) - len(weights)))

    def end_of_turn(self, control_tokens: Iterable[str]) -> str | None:
        """The control token that ends an answer."""
        del control_tokens
        suffix = self.role(self.answering_role).suffix
        return next((part["control"] for part in suffix if "control" in part), None)

    def role(self, name: object) -> RoleTemplate:
        """The template of a role.

        Raises:
          TokenizerError: if there is no such role.
        """
        if isinstance(name, str) and name in self.roles:
            return self.roles[name]
        near = difflib.get_close_matches(str(name), self.roles, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"this tokenizer has {', '.join(self.roles)}"
        raise TokenizerError(f"chat role {name!r} is unknown; {hint}")

    def control_tokens(self) -> set[str]:
        """Every control token of the template."""
        parts = [*self.begin, *(part for role in self.roles.values() for part in (*role.prefix, *role.suffix))]
        return {part["control"] for part in parts if "control" in part}

    def to_json(self) -> str:
        """Serialize the template; equal templates give equal bytes."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> "ChatTemplate":
        """Read a template file.

        Raises:
          TokenizerError: if it is missing or not a template.
        """
        try:
            tree = json.loads(storage_path(path).read_text(encoding="utf-8"))
            roles = {
                name: RoleTemplate(prefix=_parts(role["prefix"]), suffix=_parts(role["suffix"]))
                for name, role in tree["roles"].items()
            }
            template = cls(roles=roles, answering_role=tree["answering_role"], begin=_parts(tree["begin"]))
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TokenizerError(f"{path}: is not a chat template: {type(error).__name__}: {error}") from None
        if template.answering_role not in roles:
            raise TokenizerError(f"{path}: answering_role {template.answering_role!r} is not one of its roles")
        return template


def default_chat_template(bos_token: str) -> ChatTemplate:
    """`<|bos|><|user|>question<|end|><|assistant|>answer<|end|>`, with an optional system message."""

    def role(token: str) -> RoleTemplate:
        return RoleTemplate(prefix=({"control": token},), suffix=({"control": END},))

    return ChatTemplate(
        roles={"system": role(SYSTEM), "user": role(USER), "assistant": role(ASSISTANT)},
        answering_role="assistant",
        begin=({"control": bos_token},),
    )


def _parts(items: list) -> tuple[dict[str, str], ...]:
    for item in items:
        if not (isinstance(item, dict) and len(item) == 1 and {*item} <= {"control", "text"}):
            raise ValueError(f'{item!r} is neither {{"control": TOKEN}} nor {{"text": TEXT}}')
    return tuple(items)
