"""Training metrics: JSONL, TensorBoard, and a progress line."""

import json
import operator
import os
import time
from typing import Any, Self

import jax
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import console
from maxlm.runtime.storage import LineLog, storage_path
from maxlm.runtime.written import read_written_lines
from maxlm.train.goodput import GoodputLog

_SHOWN_PARTS = 6


class StepWindow:
    """Accumulates step metrics on the device, and transfers them to the host once per window."""

    def __init__(self, active_parameters: float, goodput: GoodputLog, *, peak: float | None, num_devices: int):
        """`active_parameters`: how many process one token."""
        # 6 FLOPs per parameter and token (2 forward, 4 backward), without attention.
        self.flops_per_token = 6 * active_parameters
        self.peak = peak and peak * num_devices
        self._goodput = goodput
        self.seconds, self.tokens = 0.0, 0
        self._first_rate = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new window, discarding the current one."""
        self._metrics: list[dict] = []
        self._tokens = 0

    @property
    def is_empty(self) -> bool:
        """Whether there was no step since the last window was closed."""
        return not self._metrics

    def add(self, metrics: dict[str, Any], *, num_tokens: int) -> None:
        """Add one step's metrics, still on the device, and its number of tokens, including padding."""
        self._metrics.append(metrics)
        self._tokens += num_tokens

    def close(self, step: int, *, learning_rate: float) -> dict[str, Any]:
        """End the window, and return its means as one record."""
        metrics = jax.device_get(self._metrics)
        seconds = self._goodput.close(step)
        waited = seconds.get("data_wait", 0.0)
        elapsed = max(seconds.get("step", 0.0) + seconds.get("compile", 0.0) + waited, 1e-9)
        terms = metrics[0]["terms"]
        for other in metrics[1:]:
            terms = jax.tree.map(operator.add, terms, other["terms"])
        rate = self._tokens / elapsed
        record = {
            "step": step,
            "loss": sum(float(m["loss"]) for m in metrics) / len(metrics),
            **{name: float(term.mean()) for name, term in terms.items()},
            "grad_norm": float(metrics[-1]["grad_norm"]),
            "learning_rate": learning_rate,
            "tokens_per_second": rate,
            "data_wait": waited / elapsed,
            "skipped": int(metrics[-1]["skipped"]),
            "skipped_in_a_row": int(metrics[-1]["skipped_in_a_row"]),
        }
        if self.peak:
            record["mfu"] = rate * self.flops_per_token / self.peak
        # The first window includes compilation, so its speed is not representative.
        if self._first_rate:
            self.seconds += elapsed
            self.tokens += self._tokens
        else:
            self._first_rate = rate
        self.reset()
        return record

    def tokens_per_second_overall(self) -> float:
        """Throughput over all windows except the first; of the first if it is the only one."""
        return self.tokens / self.seconds if self.seconds else self._first_rate


class MetricsLog:
    """`metrics.jsonl`, `tensorboard/` and the progress line. A resumed run drops records after its start.

    Only process 0 writes.
    """

    def __init__(self, folder: epath.Path, *, start_step: int, total_steps: int):
        self.folder = folder
        self.start_step, self.total_steps = start_step, total_steps
        self._lines = LineLog(folder / "metrics.jsonl", keep=lambda line: json.loads(line)["step"] <= start_step)

    def __enter__(self) -> Self:
        if not is_primary():
            return self
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start_step + 1)
        self._progress = Progress(
            TextColumn(self.folder.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task("train", total=self.total_steps, completed=self.start_step, note="")
        return self

    def __exit__(self, *error) -> None:
        if is_primary():
            self._progress.stop()
            self._writer.close()

    def train(self, record: dict[str, Any]) -> None:
        """Log a window of training."""
        if not is_primary():
            return
        self._write(record, "train")
        note = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["skipped"]:
            note += f"  skipped {record['skipped']}"
        self._progress.update(self._task, completed=record["step"], note=note)
        if not console.is_terminal:
            console.print(f"{self.folder.name}: step {record['step']}/{self.total_steps}  {note}", markup=False)

    def valid(self, step: int, values: dict[str, float]) -> None:
        """Log a validation."""
        if not values or not is_primary():
            return
        self._write({"step": step, **{f"valid_{name}": value for name, value in values.items()}}, "valid")
        text = "  ".join(
            f"{name} {value:.4f}{_parts(values, name)}" for name, value in values.items() if "/" not in name
        )
        console.print(f"{self.folder.name}: step {step}/{self.total_steps}  valid {text}", markup=False)

    def has_valid(self, step: int) -> bool:
        """Whether the file has a validation after this step."""
        lines = read_metrics(self.folder)
        return any(line["step"] == step and any(name.startswith("valid_") for name in line) for line in lines)

    def _write(self, record: dict[str, Any], group: str) -> None:
        self._lines.append(json.dumps({**record, "time": time.time()}))
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name.removeprefix('valid_')}", value, record["step"])
        self._writer.flush()


def _parts(values: dict[str, float], name: str) -> str:
    """The values of a metric for each source, `name/SOURCE`, in parentheses; at most the first few."""
    parts = [f"{part.partition('/')[2]} {value:.4f}" for part, value in values.items() if part.startswith(f"{name}/")]
    shown = parts[:_SHOWN_PARTS] + ([f"{len(parts) - _SHOWN_PARTS} more"] if len(parts) > _SHOWN_PARTS else [])
    return f" ({', '.join(shown)})" if shown else ""


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a run, oldest first."""
    return read_written_lines(storage_path(folder) / "metrics.jsonl")
