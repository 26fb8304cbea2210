"""`maxlm eval`: all requested measurements of a model, as one result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.core.interval import Interval, paired_difference
from maxlm.errors import DataError
from maxlm.eval.baselines import Baselines, baselines
from maxlm.eval.inputs import find_data_folders, read_held_out_by_source, read_training
from maxlm.eval.likelihood import (
    Likelihood,
    bits_per_byte,
    bits_per_byte_by_source,
    likelihood_difference,
)
from maxlm.eval.tasks import Example, TaskResult, read_examples, run_task
from maxlm.generate.model import LoadedModel, load
from maxlm.interop.load import check_folder


@dataclass(frozen=True)
class TextEvaluation:
    """Held-out text: the model, the compared model, the difference in bits per byte (compared minus model), baselines.

    sources: the source of each document, as a short name.
    """

    name: str
    model: Likelihood
    sources: list[str]
    other: Likelihood | None = None
    difference: Interval | None = None
    baselines: Baselines | None = None

    def to_dict(self) -> dict:
        return {
            "data": self.name,
            **_likelihood_dict(self.model, self.sources),
            "compare": self.other and _likelihood_dict(self.other, self.sources),
            "difference": self.difference and self.difference.to_dict(),
            "baselines": self.baselines and self.baselines.to_dict(),
        }


@dataclass(frozen=True)
class TaskEvaluation:
    """A task file: the model, the compared model, and the latter's accuracy minus the model's."""

    name: str
    examples: list[Example]
    model: TaskResult
    other: TaskResult | None = None
    difference: Interval | None = None

    def to_dict(self) -> dict:
        return {
            "task": self.name,
            "num_examples": len(self.examples),
            **_task_dict(self.model),
            "compare": self.other and _task_dict(self.other),
            "difference": self.difference and self.difference.to_dict(),
            "examples": [
                {
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "output": self.model.outputs[index],
                    "correct": bool(self.model.correct[index]),
                    **({"compare_output": self.other.outputs[index]} if self.other else {}),
                }
                for index, example in enumerate(self.examples)
            ],
        }


@dataclass(frozen=True)
class Evaluation:
    """Result of `maxlm eval`. Differences are the compared model's value minus the model's."""

    model: str
    other: str | None
    seed: int
    text: TextEvaluation | None = None
    tasks: list[TaskEvaluation] = field(default_factory=list)

    def to_dict(self) -> dict:
        return {
            "model": self.model,
            "compare": self.other,
            "seed": self.seed,
            "text": self.text and self.text.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
        }


def evaluate(
    model_path: str | Path,
    *,
    data: str | Path | None = None,
    task_files: Sequence[str | Path] = (),
    compare: str | Path | None = None,
    with_baselines: bool = True,
    max_documents: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    ignore_keys: Sequence[str] = (),
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model on held-out text, on task files, or on both.

    Args:
      data: a data folder or a text file; None takes the model's training data, unless there are tasks.
      ignore_keys: unknown keys of task files to ignore; others raise an error.
      compare: another model, measured on the same documents and examples.

    Raises:
      MaxlmError: an error the user can fix: a model, data or task file is missing or cannot be read.
    """
    # Inputs first, so that mistakes in them show before the slow model loading.
    for path in (model_path, compare):
        if path is not None:
            check_folder(path)
    tasks = [(str(path), read_examples(path, ignore_keys=ignore_keys)) for path in task_files]
    if data is None and not tasks:
        folders = find_data_folders(model_path)
        if not folders:
            raise DataError(f"{model_path}: its training data was not found; give a data folder or a file with --data")
        data = folders[0]
    valid, sources = read_held_out_by_source(data, limit=max_documents) if data is not None else ([], [])
    train = _training_texts(data, model_path) if data is not None and with_baselines else []

    model, other = load(model_path), load(compare) if compare is not None else None
    text = None
    if valid:
        text = _evaluate_text(str(data), model, other, valid, sources, train, seed=seed)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stop": stop, "seed": seed}
    return Evaluation(
        str(model_path),
        None if compare is None else str(compare),
        seed,
        text,
        [_evaluate_task(name, model, other, examples, settings) for name, examples in tasks],
    )


def _training_texts(data: str | Path, model_path: str | Path) -> list[str]:
    """Training documents for the baselines: from the same data folder as the held-out ones, or the model's."""
    folders = [Path(data)] if Path(data).is_dir() else find_data_folders(model_path)
    return read_training(folders[0]) if folders else []


def _evaluate_text(
    name: str,
    model: LoadedModel,
    other: LoadedModel | None,
    valid: list[str],
    sources: list[str],
    train: list[str],
    *,
    seed: int,
) -> TextEvaluation:
    measured = bits_per_byte(model, valid, seed=seed)
    compared = bits_per_byte(other, valid, seed=seed) if other is not None else None
    return TextEvaluation(
        name,
        measured,
        sources,
        compared,
        None if compared is None else likelihood_difference(measured, compared, seed=seed),
        baselines(train, valid, model.tokenizer, seed=seed) if train else None,
    )


def _evaluate_task(
    name: str, model: LoadedModel, other: LoadedModel | None, examples: list[Example], settings: dict
) -> TaskEvaluation:
    measured = run_task(model, examples, **settings)
    if other is None:
        return TaskEvaluation(name, examples, measured)
    compared = run_task(other, examples, **settings)
    difference = paired_difference(measured.correct, compared.correct, seed=settings["seed"])
    return TaskEvaluation(name, examples, measured, compared, difference)


def _likelihood_dict(likelihood: Likelihood, sources: list[str]) -> dict:
    return {
        "bits_per_byte": likelihood.bits_per_byte.to_dict(),
        "by_source": {
            name: interval.to_dict() for name, interval in bits_per_byte_by_source(likelihood, sources).items()
        },
        "perplexity": likelihood.perplexity.to_dict(),
        "documents": len(likelihood.bits),
        "bytes": int(likelihood.num_bytes.sum()),
        "tokens": int(likelihood.num_tokens.sum()),
    }


def _task_dict(result: TaskResult) -> dict:
    return {
        "accuracy": result.accuracy.to_dict(),
        "by_kind": {kind: interval.to_dict() for kind, interval in result.by_kind.items()},
        "too_long": result.too_long,
        "unreadable": result.unreadable,
    }
