"""The objective of a configuration without its user's data: a tokenizer, rows, chats, pairs and prompts made here.

They are small and real: the objective is built from files as in training, and samples from its prompts.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from maxlm.config import DataConfig, TokenizerConfig
from maxlm.config.train import PackedSource, TrainConfig
from maxlm.data.build import build_data
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer
from maxlm.verify.reduce import ROW_LENGTH

_TEXT = "\n\n".join(topics[name] for name in ("if", "while", "for"))
_VOCAB_SIZE = 352
_QUESTIONS = ("sky", "grass", "snow", "coal")


@dataclass(frozen=True)
class Workspace:
    """Folder and tokenizer of the data made here."""

    folder: Path
    tokenizer: Tokenizer

    def with_data(self, config: TrainConfig) -> TrainConfig:
        """The configuration, its objective reading what was made here."""
        objective = config.objective
        if hasattr(objective, "sources"):
            update = {"sources": (PackedSource(path=self._packed_rows()),)}
        else:
            update = {"train_file": self._records(objective.kind), "valid_file": None}
        if objective.kind == "grpo":
            update["reward"] = "exact_match"
        return config.model_copy(update={"objective": objective.model_copy(update=update)})

    def _packed_rows(self) -> str:
        output = self.folder / "rows"
        build_data(
            DataConfig(
                kind="data",
                output=str(output),
                tokenizer=str(self.folder / "tokenizer"),
                sources=[{"uri": str(self.folder / "text.txt")}],
                valid_fraction=0.0,
                row_length=ROW_LENGTH,
                workers=1,
            )
        )
        return str(output)

    def _records(self, kind: str) -> str:
        """Chats, pairs or prompts, as an objective reads them."""
        path = self.folder / "records.jsonl"
        records = []
        for text in _QUESTIONS:
            question = [{"role": "user", "content": text}]
            chat = [*question, {"role": "assistant", "content": "yes"}]
            pair = {"prompt": question, "chosen": "yes", "rejected": "no"}
            prompt = {"prompt": question, "answer": "yes"}
            records.append({"sft": {"messages": chat}, "grpo": prompt}.get(kind, pair))
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)


@contextlib.contextmanager
def open_workspace() -> Iterator[Workspace]:
    """A temporary folder with a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="maxlm-verify-") as name:
        folder = Path(name)
        (folder / "text.txt").write_text(_TEXT, encoding="utf-8")
        config = TokenizerConfig(
            kind="tokenizer", output=str(folder / "tokenizer"), input=str(folder / "text.txt"), vocab_size=_VOCAB_SIZE
        )
        with quiet():
            tokenizer = train_tokenizer(config)
        yield Workspace(folder, tokenizer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the stages print while they make small data is of no interest."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
