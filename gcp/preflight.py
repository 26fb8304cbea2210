"""Check that a configuration fits the requested TPU, and that its inputs will be on the workers."""

import math
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from maxlm_gcp.job import TpuJob

from maxlm.config import TrainConfig


def find_problems(job: TpuJob, config: TrainConfig) -> list[str]:
    """One sentence for each problem that would only show up on the running TPU."""
    return [*_mesh_problem(job, config), *_missing_inputs(job, config)]


def _mesh_problem(job: TpuJob, config: TrainConfig) -> Iterator[str]:
    sizes = config.mesh.model_dump()
    fixed = math.prod(max(size, 1) for size in sizes.values())
    chips, what = job.num_chips, f"{job.accelerator_type} has {job.num_chips} chips"
    if fixed > chips:
        yield f"mesh: needs {fixed} devices, but {what}; use smaller sizes or a larger accelerator"
    elif -1 in sizes.values() and chips % fixed:
        yield f"mesh: its sizes multiply to {fixed}, which does not divide the number of chips: {what}"
    elif -1 not in sizes.values() and fixed < chips:
        yield f"mesh: uses {fixed} devices, but {what}; set one axis to -1, which takes the remaining ones"


def _missing_inputs(job: TpuJob, config: TrainConfig) -> Iterator[str]:
    committed = None
    for key, path in _read_paths(config):
        if "://" in path:
            continue
        if os.path.isabs(path) or ".." in Path(path).parts:
            yield f"{key}: {path} is outside the code folder, so it is not on the workers; give --input PATH=gs://..."
            continue
        if any(_is_below(path, brought) for brought in job.inputs):
            continue
        if committed is None:
            committed = _committed_files(job.code)
        if not any(_is_below(file, path) for file in committed):
            yield f"{key}: {path} is not in the archive that is sent; add it with --input {path}=gs://... or commit it"


def _read_paths(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Every path that training reads, with its key."""
    objective = config.objective
    named = {
        "init_from": config.init_from,
        "tokenizer": config.tokenizer,
        **{f"objective.{field}": getattr(objective, field, None) for field in ("train_file", "valid_file", "teacher")},
        **{
            f"objective.sources.{index}.path": source.path
            for index, source in enumerate(getattr(objective, "sources", ()))
        },
    }
    return ((key, path) for key, path in named.items() if path is not None)


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def _committed_files(code: Path) -> list[str]:
    """Files of the archive or the last commit; empty if the folder is not a checkout, which is reported later."""
    if code.is_file():
        with tarfile.open(code) as archive:
            return archive.getnames()
    listed = subprocess.run(
        ["git", "-C", str(code), "ls-tree", "-r", "--name-only", "-z", "HEAD", "."], capture_output=True, check=False
    )
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
