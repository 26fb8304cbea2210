"""Synthetic inputs for sampling: a tokenizer, and a file of prompts with answers."""

import contextlib
import json
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from maxlm.config import TokenizerConfig
from maxlm.config.train import TrainConfig
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer

VOCAB_SIZE = 352

_TEXT = "\n\n".join(topics[name] for name in ("if", "while", "for"))
_QUESTIONS = ("sky", "grass", "snow", "coal")


@dataclass(frozen=True)
class Workspace:
    """Folder and tokenizer of the synthetic data."""

    folder: Path
    tokenizer: Tokenizer

    def with_prompts(self, config: TrainConfig) -> TrainConfig:
        """The configuration with an objective that samples answers to the synthetic prompts."""
        path = self.folder / "prompts.jsonl"
        records = [{"prompt": [{"role": "user", "content": text}], "answer": "yes"} for text in _QUESTIONS]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        objective = config.objective
        update = {
            "train_file": str(path),
            "valid_file": None,
            "reward": f"{__name__}:made_up_reward",
            "pretraining": None,
            "constraint": None,
        }
        update = {name: value for name, value in update.items() if name in type(objective).model_fields}
        return config.model_copy(update={"objective": objective.model_copy(update=update)})


def made_up_reward(prompt: Any, completions: list[str], record: dict[str, Any]) -> list[float]:
    """A reward that tells almost any two answers apart."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


@contextlib.contextmanager
def open_workspace() -> Iterator[Workspace]:
    """A temporary folder with a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="maxlm-verify-") as name:
        folder = Path(name)
        (folder / "text.txt").write_text(_TEXT, encoding="utf-8")
        config = TokenizerConfig(
            kind="tokenizer", output=str(folder / "tokenizer"), input=str(folder / "text.txt"), vocab_size=VOCAB_SIZE
        )
        with quiet():
            tokenizer = train_tokenizer(config)
        yield Workspace(folder, tokenizer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of the stages that make the synthetic data."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
