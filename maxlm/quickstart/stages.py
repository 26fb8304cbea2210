"""The quickstart pipeline: text to a tokenizer, a pretrained model, a chat model, an aligned model, int8, a server.

Every stage calls the same function as its own command. A stage whose folder is complete is skipped, so an interrupted
run resumes where it stopped. If a stage fails, only the stages that depend on it are skipped.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maxlm.config import TrainConfig, load_config
from maxlm.config.recipes import recipe_folder
from maxlm.errors import ConfigError, DataError, MaxlmError
from maxlm.quickstart.checks import checks
from maxlm.quickstart.configs import moved_paths
from maxlm.quickstart.server import ask_server
from maxlm.quickstart.tasks import settings, write_tasks
from maxlm.runtime.manifest import content_hash, manifest_chain, read_manifest, write_json
from maxlm.runtime.progress import console
from maxlm.runtime.storage import resolve_path

RECIPES = ("data", "tokenizer", "pretrain", "sft", "align")

# In execution order, each with the stages that it depends on.
STAGES = {
    "documents": (),
    "tokenizer": ("documents",),
    "rows": ("tokenizer",),
    "tasks": (),
    "pretrain": ("rows",),
    "sft": ("pretrain", "tasks"),
    "align": ("sft",),
    "evaluate": ("align",),
    "int8": ("align",),
    "chat": ("align",),
}

# Held-out questions of each kind for the final chat stage.
SHOWN_OF_A_KIND = 2


class Quickstart:
    """The stages in one output folder."""

    def __init__(self, output: str | Path, overrides: Sequence[str] = ()):
        """`overrides` start with the name of a recipe: `pretrain.steps=800`.

        Raises:
          ConfigError: an override names no recipe.
        """
        self.folder = Path(output)
        # Errors of stages that did not complete, by name.
        self.errors: dict[str, MaxlmError] = {}
        self._overrides: dict[str, list[str]] = {name: [] for name in RECIPES}
        for override in overrides:
            name, _, rest = override.partition(".")
            if name not in self._overrides:
                raise ConfigError([f"override {override!r}: must start with one of {', '.join(RECIPES)} and a dot"])
            self._overrides[name].append(rest)

    def run(self) -> dict[str, Any]:
        """Run or resume all stages; return the contents of `summary.json`, including its checks.

        A failed stage is recorded in `errors`, and stages that do not depend on it still run.

        Raises:
          ConfigError: a recipe with its overrides is invalid; raised before the first stage.
        """
        for name in RECIPES:
            self.config(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        not_done: dict[str, str] = {}
        for name, needs in STAGES.items():
            if lacking := [need for need in needs if need in not_done]:
                not_done[name] = f"the stage {name} needs {lacking[0]}, which did not complete"
                continue
            try:
                self._timed(name)
            except MaxlmError as error:
                self.errors[name] = error
                not_done[name] = f"the stage {name} failed: {error}"
                console.print(not_done[name], markup=False)
        summary = self.summarize(not_done)
        from maxlm.report.report import write_report

        write_report(self.folder)
        return summary

    def path(self, name: str) -> Path:
        return self.folder / name

    def served(self) -> Path:
        """The model to chat with: the int8 bundle, or the float model if int8 was out of bounds."""
        bundle, aligned = self.path("int8"), self.path("align")
        return bundle if self._is_done("int8") and self._has_input(bundle, "model", aligned) else aligned

    def config(self, name: str) -> Any:
        """A recipe of configs/quickstart with its paths moved to this output folder, and the user's overrides."""
        recipe = recipe_folder() / "quickstart" / f"{name}.yaml"
        moved = moved_paths(recipe.read_text(encoding="utf-8"), self.folder)
        return load_config(recipe, [*moved, *self._overrides[name]])

    def documents(self) -> None:
        from maxlm.data.build import build_data

        build_data(self.config("data"), stop_after="documents")

    def tokenizer(self) -> None:
        from maxlm.tokenizer.train import train_tokenizer

        train_tokenizer(self.config("tokenizer"))

    def rows(self) -> None:
        from maxlm.data.build import build_data

        build_data(self.config("data"))

    def tasks(self) -> None:
        if not self._is_done("tasks") or read_manifest(self.path("tasks"))["config"] != settings():
            write_tasks(self.path("tasks"))

    def pretrain(self) -> None:
        self._train("pretrain")

    def sft(self) -> None:
        self._train("sft")

    def align(self) -> None:
        self._train("align")

    def evaluate(self) -> None:
        """Evaluate each stage on held-out text and questions; kept until a stage is retrained."""
        key = {name: content_hash(self.path(name)) for name in ("data", "tasks", "pretrain", "sft", "align")}
        target = self.path("evaluation.json")
        if target.exists() and json.loads(target.read_text())["of"] == key:
            console.print(f"{target}: is up to date", markup=False)
            return
        from maxlm.quickstart.evaluation import evaluate_stages

        write_json(target, {"of": key, **evaluate_stages(self.folder)})

    def int8(self) -> None:
        """Export the bundle and its receipt; an out-of-bounds receipt is kept without a bundle, and fails its check."""
        from maxlm.export.export import ReceiptOutOfBounds, export_model

        if self.served() == self.path("int8") and self.path("int8.json").exists():
            return
        try:
            receipt = export_model(self.path("align"), self.path("int8"), data=self.path("tasks") / "sft_valid.jsonl")
        except ReceiptOutOfBounds as error:
            receipt = error.receipt
        write_json(self.path("int8.json"), asdict(receipt))

    def chat(self) -> None:
        """Ask held-out questions to a server in its own process, as a client would."""
        from maxlm.eval.tasks import read_examples

        questions = read_examples(self.path("tasks") / "questions.jsonl")
        shown = [
            question
            for kind in sorted({question.kind for question in questions})
            for question in [question for question in questions if question.kind == kind][:SHOWN_OF_A_KIND]
        ]
        chats: list[Any] = [question.prompt for question in shown]
        texts = [chat[-1]["content"] for chat in chats]
        replies = ask_server(self.served(), texts)
        answers = [
            {"prompt": text, "answer": question.answer, "right": reply["reply"].strip() == question.answer, **reply}
            for text, question, reply in zip(texts, shown, replies)
        ]
        write_json(self.path("chat.json"), {"model": str(self.served()), "answers": answers})

    def summarize(self, not_done: dict[str, str]) -> dict[str, Any]:
        """Write and return the results of completed stages; `not_done` says why others are not completed."""
        summary: dict[str, Any] = {"seconds": self._seconds(), "not_done": not_done}
        if "pretrain" not in not_done:
            summary["tokens_per_second"] = read_manifest(self.path("pretrain"))["metrics"]["tokens_per_second"]
        if "evaluate" not in not_done:
            evaluation = json.loads(self.path("evaluation.json").read_text())
            summary |= {name: evaluation[name] for name in evaluation if name != "of"}
        for name in ("int8", "chat"):
            if name not in not_done:
                summary[name] = json.loads(self.path(f"{name}.json").read_text())
        if "align" not in not_done:
            summary["manifest_chain"] = manifest_chain(self.served())
        summary["checks"] = [vars(check) for check in checks(summary)]
        write_json(self.path("summary.json"), summary)
        return summary

    def _train(self, name: str) -> None:
        """Train, resume, or skip; a run with other settings or inputs is trained from scratch."""
        from maxlm.train.run import train

        config = self.config(name)
        if self._is_stale(name, config):
            console.print(f"{self.path(name)}: settings or inputs have changed; training from scratch", markup=False)
            shutil.rmtree(self.path(name))
        elif self._is_done(name):
            console.print(f"{self.path(name)}: is complete", markup=False)
            return
        if not train(config)["metrics"]["finished"]:
            raise KeyboardInterrupt

    def _is_done(self, name: str) -> bool:
        try:
            return read_manifest(self.path(name))["metrics"].get("finished", True)
        except DataError:
            return False

    def _is_stale(self, name: str, config: TrainConfig) -> bool:
        folder = self.path(name)
        if not (folder / "config.yaml").exists():
            return False
        former = load_config(folder / "config.yaml")
        # The run's own copy has its model completed from the tokenizer or from the run it started from.
        model = config.model and config.model.model_copy(update={"vocab_size": former.model.vocab_size})
        completed = {"model": model or former.model, "execution": config.execution or former.execution}
        if config.model_copy(update=completed) != former:
            return True
        inputs = read_manifest(folder)["inputs"].values() if (folder / "manifest.json").exists() else ()
        return any(content_hash(resolve_path(item["path"], folder)) != item["hash"] for item in inputs)

    def _has_input(self, folder: Path, name: str, source: Path) -> bool:
        return read_manifest(folder)["inputs"][name]["hash"] == content_hash(source)

    def _timed(self, name: str) -> None:
        """Run a stage and record its seconds; a skipped stage keeps the recorded time."""
        console.rule(f"[bold]{name}")
        began = time.perf_counter()
        getattr(self, name)()
        elapsed = round(time.perf_counter() - began, 2)
        seconds = self._seconds()
        seconds[name] = max(elapsed, seconds.get(name, 0.0))
        write_json(self.path("seconds.json"), seconds)

    def _seconds(self) -> dict[str, float]:
        target = self.path("seconds.json")
        return json.loads(target.read_text()) if target.exists() else {}
