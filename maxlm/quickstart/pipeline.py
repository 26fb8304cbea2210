"""The main job: text to a tokenizer, a pretrained model, a chat model, an aligned model, int8, and a server.

Every stage is the same function that its own command calls. A stage whose folder is complete is skipped, so a run that
was interrupted goes on where it stopped.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import maxlm
from maxlm.config import load_config
from maxlm.core.manifest import content_hash, manifest_chain, read_manifest, write_json
from maxlm.core.progress import console
from maxlm.errors import CheckFailed, DataError
from maxlm.quickstart.configs import config_folder
from maxlm.quickstart.server import chat_once
from maxlm.quickstart.tasks import write_tasks

CHAT_PROMPT = "What is the last parameter of `copyfile(src, dst)`?"
SAMPLE_PROMPTS = ("Return the ", "The default value is ", "If the file does not exist, ")
SAMPLES_OF_A_PROMPT = 2


@dataclass(frozen=True)
class Check:
    """One thing that the main job must show."""

    name: str
    passed: bool
    told: str


class Quickstart:
    """The stages, in the order of `run`, in one output folder."""

    def __init__(self, output: str | Path):
        self.folder = Path(output)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Run or finish all stages; returns the summary that stands in `summary.json`.

        Raises:
          CheckFailed: a stage did not show what it must; summary and report are written all the same.
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
            raise CheckFailed("; ".join(f"{check.name}: {check.told}" for check in failed))
        return summary

    def path(self, name: str) -> Path:
        return self.folder / name

    def config(self, name: str, *overrides: str) -> Any:
        """A recipe of configs/quickstart with its paths moved to this output folder."""
        text = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        return load_config(config_folder() / f"{name}.yaml", [*_moved_paths(text, self.folder), *overrides])

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
        if not self._is_done("tasks"):
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
        write_json(target, {"of": key, **self._evaluation()})

    def int8(self) -> None:
        from maxlm.export.int8 import export_int8

        bundle = self.path("int8")
        if self._is_done("int8") and self._is_of(bundle, "model", self.path("align")):
            return
        export_int8(self.path("align"), bundle, data_folder=self.path("data"))

    def chat(self) -> None:
        """One chat turn against a server that runs on its own, as a client would have it."""
        reply = chat_once(self.path("int8"), CHAT_PROMPT)
        write_json(self.path("chat.json"), {"prompt": CHAT_PROMPT, **reply})

    def summarize(self) -> dict[str, Any]:
        evaluation = json.loads(self.path("evaluation.json").read_text())
        pretrain = read_manifest(self.path("pretrain"))["metrics"]
        receipt = read_manifest(self.path("int8"))["metrics"]
        summary = {
            "seconds": self._all_seconds(),
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
        from maxlm.post.run import train

        config = self.config(name)
        if self._is_done(name) and self._is_same(name, config):
            console.print(f"{self.path(name)}: is done", markup=False)
            return
        train(config)

    def _is_done(self, name: str) -> bool:
        try:
            return read_manifest(self.path(name))["metrics"].get("finished", True)
        except DataError:
            return False

    def _is_same(self, name: str, config: Any) -> bool:
        """Whether the finished run had this number of steps and stands on the inputs of today."""
        manifest = read_manifest(self.path(name))
        inputs = manifest["inputs"].values()
        fresh = all(content_hash(self.path(name) / item["path"]) == item["hash"] for item in inputs)
        return fresh and manifest["metrics"]["steps"] == config.steps

    def _is_of(self, folder: Path, name: str, source: Path) -> bool:
        return read_manifest(folder)["inputs"][name]["hash"] == content_hash(source)

    def _evaluation(self) -> dict[str, Any]:
        from maxlm.eval.baselines import baselines
        from maxlm.eval.inputs import read_held_out, read_training
        from maxlm.eval.interval import paired_difference
        from maxlm.eval.likelihood import bits_per_byte
        from maxlm.eval.tasks import exact_match, read_examples

        train_texts, valid_texts = read_training(self.path("data")), read_held_out(self.path("data"))
        questions = read_examples(self.path("tasks") / "questions.jsonl")
        base, sft, aligned = (maxlm.load(self.path(name)) for name in ("pretrain", "sft", "align"))

        console.print("evaluating held-out text", markup=False)
        simple = baselines(train_texts, valid_texts, base.tokenizer).to_dict()
        likelihood = bits_per_byte(base, valid_texts)

        console.print("evaluating held-out questions", markup=False)
        settings = {"max_new_tokens": 16}
        before, after = (exact_match(model, questions, **settings) for model in (base, sft))
        sampled_before, sampled_after = (
            exact_match(model, questions, temperature=1.0, **settings) for model in (sft, aligned)
        )
        greedy_aligned = exact_match(aligned, questions, **settings)
        return {
            "bits_per_byte": {"pretrain": likelihood.bits_per_byte.to_dict(), **simple},
            "sft_exact_match": {
                "before": before.accuracy.value,
                "after": after.accuracy.value,
                "aligned": greedy_aligned.accuracy.value,
                "interval": list(paired_difference(before.correct, after.correct).bounds),
                "by_kind": {
                    kind: {"before": before.by_kind[kind].value, "after": after.by_kind[kind].value}
                    for kind in after.by_kind
                },
            },
            "align_reward": {
                "before": sampled_before.accuracy.value,
                "after": sampled_after.accuracy.value,
                "interval": list(paired_difference(sampled_before.correct, sampled_after.correct).bounds),
            },
            "samples": self._samples(base, aligned, questions),
        }

    def _samples(self, base: Any, aligned: Any, questions: list[Any]) -> list[dict[str, str]]:
        prompts = [prompt for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_OF_A_PROMPT)]
        texts = base.generate(prompts, max_new_tokens=48, temperature=0.7, top_p=0.95)
        asked = [example.prompt for example in questions[:4]]
        answers = aligned.generate(asked, max_new_tokens=16)
        return [
            *({"stage": "pretrain", "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)),
            *(
                {"stage": "align", "prompt": messages[-1]["content"], "text": text}
                for messages, text in zip(asked, answers)
            ),
        ]

    def _timed(self, stage: Callable[[], None]) -> None:
        name = stage.__name__
        console.rule(f"[bold]{name}")
        began = time.perf_counter()
        stage()
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def _all_seconds(self) -> dict[str, float]:
        """Seconds of each stage in the run that did its work: a stage that was skipped keeps its former time."""
        target = self.path("seconds.json")
        former = json.loads(target.read_text()) if target.exists() else {}
        seconds = {name: max(value, former.get(name, 0.0)) for name, value in self.seconds.items()}
        write_json(target, seconds)
        return seconds


def checks(summary: dict[str, Any]) -> list[Check]:
    """What the main job must show, in numbers."""
    bits, match, reward = summary["bits_per_byte"], summary["sft_exact_match"], summary["align_reward"]
    model, bigram, xz = bits["pretrain"], bits["bigram"], bits["xz"]
    change, reply = summary["int8"]["perplexity_change"], summary["chat"]["reply"]
    return [
        Check(
            "pretraining beats a bigram model and xz",
            model["high"] < bigram["value"] and model["value"] < xz,
            f"{model['value']:.3f} bits per byte [{model['low']:.3f}, {model['high']:.3f}]"
            f" against {bigram['value']:.3f} and {xz:.3f}; xz after the training text:"
            f" {bits['xz_after_training']:.3f}",
        ),
        Check(
            "SFT lifts exact match on held-out questions",
            match["interval"][0] > 0.2,
            f"{match['before']:.1%} to {match['after']:.1%}, difference {_interval(match['interval'])}",
        ),
        Check(
            "alignment lifts its reward",
            reward["interval"][0] > 0,
            f"{reward['before']:.1%} to {reward['after']:.1%}, difference {_interval(reward['interval'])}",
        ),
        Check("int8 costs at most 0.5 % perplexity", abs(change) <= 0.005, f"{change:+.3%}"),
        Check("the server streams an answer", bool(reply) and summary["chat"]["events"] > 1, f"{reply!r}"),
    ]


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:+.1%}, {bounds[1]:+.1%}]"


def _moved_paths(text: str, folder: Path) -> list[str]:
    """Overrides that put every `runs/quickstart/...` of a recipe under `folder`."""
    import yaml

    overrides: list[str] = []

    def visit(node: Any, dotted: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, f"{dotted}.{key}" if dotted else key)
        elif isinstance(node, list):
            for index, value in enumerate(node):
                visit(value, f"{dotted}.{index}")
        elif isinstance(node, str) and node.startswith("runs/quickstart/"):
            overrides.append(f"{dotted}={json.dumps(os.path.join(folder, node.removeprefix('runs/quickstart/')))}")

    visit(yaml.safe_load(text), "")
    return overrides
