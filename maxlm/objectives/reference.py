"""Values of examples under the starting model, computed once before training and kept in the run folder.

Then the starting model is not in memory during training, unless adapters are trained on it.

Dimensions: B examples of a batch, N examples of a file.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import PartitionSpec as P

from maxlm.core.batch import Batch, put_batch
from maxlm.core.sharding import is_explicit
from maxlm.data.examples.chat import share_of
from maxlm.objectives.record_data import Examples
from maxlm.runtime.agree import from_primary
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import track
from maxlm.train.objective import RunContext

# (starting model, batch) -> values [B] by name.
ReferenceFunction = Callable[[Any, Batch], Mapping[str, jax.Array]]


@dataclass(frozen=True)
class WithReference:
    """Examples with values under the starting model.

    values: [N] by name; those of examples that are not read are NaN.
    """

    examples: Examples
    values: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.examples)

    def places(self, index: int) -> list[str]:
        return self.examples.places(index)

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.examples.batch(indices)
        added = {name: np.where(indices >= 0, values_N[indices], 0.0) for name, values_N in self.values.items()}
        return replace(batch, values={**batch.values, **{name: x.astype(np.float32) for name, x in added.items()}})


def with_reference(
    examples: Examples, context: RunContext, indices: np.ndarray, compute: ReferenceFunction, *, key: str
) -> WithReference:
    """Add values under the starting model, from a file in the run folder if they were computed before.

    Args:
      indices: examples that will be read.
      key: other settings that the values depend on.
    """
    config, rows = context.config, context.rows
    size = config.batch_size
    padded = np.full(-(-len(indices) // size) * size, -1)
    padded[: len(indices)] = indices
    parts = padded.reshape(-1, size)
    digest = xxhash.xxh3_128(f"{context.reference_hash} {config.execution.model_dump_json()} {key}".encode())
    for part in parts:
        for x in (part, *jax.tree.leaves(examples.batch(part))):
            digest.update(np.ascontiguousarray(x).tobytes())
    file = None if context.folder is None else context.folder / "reference" / f"{digest.hexdigest()}.npz"
    if file is not None and (saved := _read(file)) is not None:
        return WithReference(examples, saved)

    model = context.reference()
    step = jax.jit(lambda model, batch: jax.tree.map(_replicated, dict(compute(model, batch))))
    values: dict[str, np.ndarray] = {}
    for part in track(parts, "reference log-probabilities"):
        mine = share_of(part, rows.index, rows.count)
        of_part = step(model, put_batch(examples.batch(mine), context.mesh))
        for name, x in of_part.items():
            of_file = values.setdefault(name, np.full(len(examples), np.nan, np.float32))
            of_file[part[part >= 0]] = np.asarray(x.addressable_data(0))[part >= 0]
    if file is not None and is_primary():
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **values)
        partial = file.parent / f"{file.name}.partial"
        partial.write_bytes(content.getvalue())
        partial.replace(file)
    return WithReference(examples, values)


def _read(file: Any) -> dict[str, np.ndarray] | None:
    """The values of a file, the same for all processes; None if the first process finds no such file."""
    saved = None
    if is_primary() and file.exists():
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            saved = {name: values_N.tolist() for name, values_N in arrays.items()}
    saved = from_primary(saved)
    return None if saved is None else {name: np.array(values, np.float32) for name, values in saved.items()}


def _replicated(x: jax.Array) -> jax.Array:
    return jax.reshard(x, P(*[None] * x.ndim)) if is_explicit() else x
