"""Verify a configuration: run all variants and report."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from maxlm.config.train import TrainConfig
from maxlm.core.sharding import make_mesh
from maxlm.errors import CheckFailed, RequestError
from maxlm.runtime.progress import progress_bar
from maxlm.verify import examples
from maxlm.verify.reduce import NUM_DEVICES, NUM_ROWS, ROW_LENGTH, describe_subject, full_model, reduced_config
from maxlm.verify.report import Finding, Report, compare
from maxlm.verify.rollout import compare_rollout
from maxlm.verify.subject import Measured, Subject
from maxlm.verify.variants import Variant, plain, variants_of
from maxlm.verify.workspace import VOCAB_SIZE, Workspace, open_workspace


def verify(config: TrainConfig, *, title: str = "", only: Sequence[str] = (), all_products: bool = False) -> Report:
    """Compare loss terms and per-parameter gradients over all ways of computing a training step of `config`.

    Args:
      config: for any objective; neither its data nor its starting checkpoints need to exist.
      title: of the report.
      only: names of variants or groups, or parts of names; empty for all variants.
      all_products: every product of two and three mesh axes, instead of a few that contain each pair of axes.

    Raises:
      RequestError: no variant matches a name.
    """
    began = time.perf_counter()
    model, execution, origin = full_model(config)
    full = config.model_copy(update={"model": model, "execution": execution})
    reduced = reduced_config(full, vocab_size=VOCAB_SIZE)
    subject = Subject(reduced)
    num_devices = min(NUM_DEVICES, jax.device_count())
    chosen = choose(variants_of(full, reduced, num_devices=num_devices, all_products=all_products), only)
    findings = []
    # Losses need no files; sampling needs a tokenizer and prompts.
    needs_files = any(variant.group == "rollout" for variant in chosen)
    bar = progress_bar(f"verify {title}".strip(), len(chosen) + 1)
    with open_workspace() if needs_files else contextlib.nullcontext() as workspace, bar as (progress, task):
        progress.update(task, note="baseline")
        baseline = subject.measure(execution=plain(reduced.execution))
        check_baseline(baseline)
        moved = _moved(subject, baseline, chosen)
        for variant in chosen:
            progress.update(task, advance=1, note=variant.name)
            pair = moved if variant.moves_tokens else (subject, baseline)
            findings.append(_find(*pair, workspace, variant))
        progress.update(task, advance=1, note="")
    return Report(title, describe_subject(reduced, full, origin), tuple(findings), time.perf_counter() - began)


def choose(variants: Iterable[Variant], only: Sequence[str]) -> list[Variant]:
    """The variants with one of these names (`Variant.names`); if none matches exactly, those that contain it.

    Raises:
      RequestError: no variant matches a name.
    """
    variants = list(variants)
    if not only:
        return variants
    chosen: set[str] = set()
    for wanted in only:
        found = [variant for variant in variants if wanted in variant.names]
        found = found or [variant for variant in variants if wanted in variant.name]
        if not found:
            groups = ", ".join(dict.fromkeys(variant.group for variant in variants))
            raise RequestError(
                f"--only {wanted!r}: matches no variant; groups are {groups}; mesh.AXIS is every mesh with that axis"
            )
        chosen.update(variant.name for variant in found)
    return [variant for variant in variants if variant.name in chosen]


def _moved(subject: Subject, baseline: Measured, variants: list[Variant]) -> tuple[Subject, Measured]:
    """What variants that move tokens to another row or place are compared with: nothing random."""
    quiet = subject.without_noise()
    if quiet == subject or not any(variant.moves_tokens for variant in variants):
        return subject, baseline
    return quiet, quiet.measure(execution=plain(quiet.config.execution))


def _find(subject: Subject, baseline: Measured, workspace: Workspace | None, variant: Variant) -> Finding:
    """The finding of one variant."""
    if variant.skipped is not None:
        return Finding(variant.group, variant.detail, skipped=variant.skipped)
    began = time.process_time()
    mesh = None if variant.mesh is None else make_mesh(variant.mesh)
    if variant.group == "rollout":
        sampling = subject if variant.sampler is None else subject.with_sampler(variant.sampler)
        numbers = compare_rollout(sampling, workspace, execution=variant.execution, mesh=mesh)
    else:
        measured = subject.measure(
            execution=variant.execution, mesh=mesh, accumulate=variant.accumulate, **_laid_out(subject, variant)
        )
        numbers = compare(baseline, measured, subject.order)
    return Finding(variant.group, variant.detail, **numbers, seconds=time.process_time() - began)


def _laid_out(subject: Subject, variant: Variant) -> dict[str, Any]:
    """The arguments of `measure` with the examples."""
    rows = 0 if variant.mesh is None else NUM_ROWS
    match variant.examples:
        case "unpacked":
            return {"batch": subject.example(unpacked=True)}
        case "padded":
            # A batch of sampled answers is kept whole: its metrics count all rows.
            rows = 0 if subject.config.objective.samples else rows or 3
            columns = ROW_LENGTH if variant.mesh is not None else 7
            return {"batch": examples.with_filler(examples.padded(subject.batch, rows=rows, columns=columns))}
        case "renamed":
            vocab_size = subject.config.model.vocab_size
            return {"new_ids_V": np.random.default_rng(0).permutation(vocab_size).astype(np.int32)}
    return {}


def check_baseline(baseline: Measured) -> None:
    """Check that the baseline has no zero or non-finite gradients, which would make the comparison meaningless.

    Raises:
      CheckFailed: the baseline itself is wrong.
    """
    for path, gradient in baseline.gradient.items():
        if not np.isfinite(gradient).all() or not np.any(gradient):
            what = "zero" if np.isfinite(gradient).all() else "not finite"
            raise CheckFailed(f"the gradient of {path} is {what} in the baseline already, computed on one device")
