"""Restore weights of a checkpoint with a model's sharding, and verify their checksums."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from maxlm.checkpoint.checksums import checksums
from maxlm.checkpoint.folder import read_metadata, readable
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckpointError
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import console
from maxlm.runtime.storage import plain_path


def restore_weights(checkpoint: epath.Path, like: Any) -> Any:
    """Restore weights as a tree with the structure, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

    Raises:
      CheckpointError: it is corrupt, or of another model.
    """
    metadata = read_metadata(checkpoint)
    flat = flatten(like)
    check_shapes(metadata["shapes"], shapes_of(flat), where=checkpoint)
    handler = ocp.StandardCheckpointer()
    weights = readable(checkpoint, lambda: handler.restore(plain_path(checkpoint) / "weights", as_abstract(flat)))
    _note_unchecked(metadata, checkpoint)
    if not is_unchanged({"weights": weights}, metadata):
        raise CheckpointError(f"{checkpoint}: the weights differ from the saved ones; use another checkpoint")
    return unflatten(weights, like)


def restore_ema(checkpoint: epath.Path, like: Any) -> Any:
    """Restore the EMA weights of a checkpoint with the structure of `like`: see `restore_weights`.

    Raises:
      CheckpointError: it has none, is corrupt, or of another model.
    """
    metadata = read_metadata(checkpoint)
    flat = flatten(like)
    check_shapes(metadata["shapes"], shapes_of(flat), where=checkpoint)
    if not any(path.startswith("rest/ema/") for path in metadata["checksums"]):
        raise CheckpointError(f"{checkpoint}: has no EMA weights; train with optim.ema_decay, or load the weights")
    # The EMA is always float32, and is stored next to the optimizer state, which is not read.
    wanted = {f"ema/{path}": leaf.update(dtype=jnp.float32) for path, leaf in as_abstract(flat).items()}
    arguments = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    mean = readable(checkpoint, lambda: handler.restore(plain_path(checkpoint) / "rest", args=arguments))
    _note_unchecked(metadata, checkpoint)
    if not is_unchanged({"rest": mean}, metadata):
        raise CheckpointError(f"{checkpoint}: the EMA weights differ from the saved ones; use another checkpoint")
    return unflatten({path: mean[f"ema/{path}"].astype(leaf.dtype) for path, leaf in flat.items()}, like)


def is_unchanged(read: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Whether arrays read from a checkpoint match the checksums in its metadata."""
    # Checkpoints without a format used another checksum.
    return "format" not in metadata or checksums(read).items() <= metadata["checksums"].items()


def _note_unchecked(metadata: dict[str, Any], checkpoint: epath.Path) -> None:
    if "format" not in metadata and is_primary():
        note = f"{checkpoint}: was saved by an earlier version of maxlm; its weights are not verified"
        console.print(note, markup=False)


def check_shapes(saved: dict[str, list], wanted: dict[str, list], *, where: epath.Path) -> None:
    """Raise CheckpointError naming the first array whose shape or dtype differs."""
    if difference := first_difference(saved, wanted):
        raise CheckpointError(
            f"{where}: is a checkpoint of another model: {difference}; give the model section, and for adapters the"
            " adapters section, that it was trained with"
        )


def first_difference(saved: dict[str, list], wanted: dict[str, list]) -> str:
    """The first array whose shape or dtype differs, and the number of others; empty if all match."""
    problems = [
        f"{path} is {saved.get(path, 'missing')} and must be {shape}"
        for path, shape in wanted.items()
        if saved.get(path) != shape
    ]
    problems += [f"{path} is unexpected" for path in saved if path not in wanted]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return problems[0] + more if problems else ""


def shapes_of(flat: dict[str, Any]) -> dict[str, list]:
    return {path: [*leaf.shape, str(jnp.dtype(leaf.dtype))] for path, leaf in flat.items()}


def as_abstract(flat: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default)
        for path, x in flat.items()
    }
