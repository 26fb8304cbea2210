"""The main job: text to a tokenizer, a pretrained model, a chat model, an aligned model, int8, and a server.

Every stage is the same function that its own command calls. A stage whose folder is complete is skipped, so a run that
was interrupted goes on where it stopped.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import TrainConfig, load_config
from maxlm.core.manifest import content_hash, manifest_chain, read_manifest, write_json
from maxlm.core.progress import console
from maxlm.core.storage import resolve_path
from maxlm.errors import ConfigError, DataError
from maxlm.quickstart.checks import ChecksFailed, checks
from maxlm.quickstart.configs import config_folder, moved_paths
from maxlm.quickstart.server import chat_once
from maxlm.quickstart.tasks import settings, write_tasks

RECIPES = ("data", "tokenizer", "pretrain", "sft", "align")
CHAT_PROMPT = "What is the first parameter of `copyfile(src, dst)`?"


class Quickstart:
    """The stages, in the order of `run`, in one output folder."""

    def __init__(self, output: str | Path, overrides: Sequence[str] = ()):
        """`overrides` begin with the name of a recipe: `pretrain.steps=800`.

        Raises:
          ConfigError: an override names no recipe.
        """
        self.folder = Path(output)
        self._overrides: dict[str, list[str]] = {name: [] for name in RECIPES}
        for override in overrides:
            name, _, rest = override.partition(".")
            if name not in self._overrides:
                raise ConfigError([f"override {override!r}: must begin with one of {', '.join(RECIPES)} and a dot"])
            self._overrides[name].append(rest)

    def run(self) -> dict[str, Any]:
        """Run or finish all stages; returns the summary that stands in `summary.json`.

        Raises:
          ChecksFailed: a stage did not show what it must; summary and report are written all the same.
          MaxlmError: a stage failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stage in (
            self.documents,
            self.tokenizer,
            self.rows,
            self.tasks,
            self.pretrain,
            self.sft,
            self.align,
            self.evaluate,
            self.int8,
            self.chat,
        ):
            self._timed(stage)
        summary = self.summarize()
        from maxlm.eval.report import write_report

        write_report(self.folder)
        failed = [check for check in checks(summary) if not check.passed]
        if failed:
            raise ChecksFailed(summary, failed)
        return summary

    def path(self, name: str) -> Path:
        return self.folder / name

    def config(self, name: str) -> Any:
        """A recipe of configs/quickstart with its paths moved to this output folder, and the user's overrides."""
        recipe = config_folder() / f"{name}.yaml"
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
        """Held-out text and held-out questions for each stage; kept until a stage is trained anew."""
        key = {name: content_hash(self.path(name)) for name in ("data", "tasks", "pretrain", "sft", "align")}
        target = self.path("evaluation.json")
        if target.exists() and json.loads(target.read_text())["of"] == key:
            console.print(f"{target}: is up to date", markup=False)
            return
        from maxlm.quickstart.evaluation import evaluate_stages

        write_json(target, {"of": key, **evaluate_stages(self.folder)})

    def int8(self) -> None:
        from maxlm.export.int8 import export_int8

        bundle = self.path("int8")
        if self._is_done("int8") and self._is_of(bundle, "model", self.path("align")):
            return
        export_int8(self.path("align"), bundle, data=self.path("tasks") / "sft_valid.jsonl")

    def chat(self) -> None:
        """One chat turn against a server that runs on its own, as a client would have it."""
        reply = chat_once(self.path("int8"), CHAT_PROMPT)
        write_json(self.path("chat.json"), {"prompt": CHAT_PROMPT, **reply})

    def summarize(self) -> dict[str, Any]:
        evaluation = json.loads(self.path("evaluation.json").read_text())
        pretrain = read_manifest(self.path("pretrain"))["metrics"]
        receipt = read_manifest(self.path("int8"))["metrics"]
        summary = {
            "seconds": self._seconds(),
            "tokens_per_second": pretrain["tokens_per_second"],
            **{name: evaluation[name] for name in ("bits_per_byte", "sft_exact_match", "align_reward", "samples")},
            "int8": {
                "perplexity_change": receipt["perplexity_change"],
                "mean_kl": receipt["mean_kl"],
                "bytes_float": receipt["bytes_float"],
                "bytes_int8": receipt["bytes_int8"],
            },
            "chat": json.loads(self.path("chat.json").read_text()),
            "manifest_chain": manifest_chain(self.path("int8")),
        }
        summary["checks"] = [vars(check) for check in checks(summary)]
        write_json(self.path("summary.json"), summary)
        return summary

    def _train(self, name: str) -> None:
        """Train, resume, or skip; what stands there with other settings or on other inputs is made anew."""
        from maxlm.post.run import train

        config = self.config(name)
        if self._is_stale(name, config):
            console.print(f"{self.path(name)}: settings or inputs have changed; it is made anew", markup=False)
            shutil.rmtree(self.path(name))
        elif self._is_done(name):
            console.print(f"{self.path(name)}: is done", markup=False)
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
        # A run's own copy has its model filled in, from the tokenizer or from the run that it started from.
        model = config.model and config.model.model_copy(update={"vocab_size": former.model.vocab_size})
        if config.model_copy(update={"model": model or former.model}) != former:
            return True
        inputs = read_manifest(folder)["inputs"].values() if (folder / "manifest.json").exists() else ()
        return any(content_hash(resolve_path(item["path"], folder)) != item["hash"] for item in inputs)

    def _is_of(self, folder: Path, name: str, source: Path) -> bool:
        return read_manifest(folder)["inputs"][name]["hash"] == content_hash(source)

    def _timed(self, stage: Callable[[], None]) -> None:
        """Run a stage and note its seconds; one that is skipped takes none, and keeps those of when it worked."""
        console.rule(f"[bold]{stage.__name__}")
        began = time.perf_counter()
        stage()
        elapsed = round(time.perf_counter() - began, 2)
        seconds = self._seconds()
        seconds[stage.__name__] = max(elapsed, seconds.get(stage.__name__, 0.0))
        write_json(self.path("seconds.json"), seconds)

    def _seconds(self) -> dict[str, float]:
        target = self.path("seconds.json")
        return json.loads(target.read_text()) if target.exists() else {}
