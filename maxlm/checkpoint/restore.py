"""Weights of a checkpoint, read as a model is laid out, and compared with what was saved."""

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
    """The weights of a checkpoint as a tree shaped, typed and sharded as `like` (arrays or ShapeDtypeStructs).

    Raises:
      CheckpointError: it is broken, or of another model.
    """
    metadata = read_metadata(checkpoint)
    flat = flatten(like)
    check_shapes(metadata["shapes"], shapes_of(flat), where=checkpoint)
    handler = ocp.StandardCheckpointer()
    weights = readable(checkpoint, lambda: handler.restore(plain_path(checkpoint) / "weights", as_abstract(flat)))
    _note_unchecked(metadata, checkpoint)
    if not is_unchanged({"weights": weights}, metadata):
        raise CheckpointError(f"{checkpoint}: the weights differ from those that were saved; use another checkpoint")
    return unflatten(weights, like)


def restore_ema(checkpoint: epath.Path, like: Any) -> Any:
    """The running mean of a checkpoint's weights, laid out as `like`: see `restore_weights`.

    Raises:
      CheckpointError: it keeps none, is broken, or of another model.
    """
    metadata = read_metadata(checkpoint)
    flat = flatten(like)
    check_shapes(metadata["shapes"], shapes_of(flat), where=checkpoint)
    if not any(path.startswith("rest/ema/") for path in metadata["checksums"]):
        raise CheckpointError(
            f"{checkpoint}: keeps no running mean of the weights; train with optim.ema_decay, or load the weights"
        )
    # The mean is in float32 whatever the weights are in, and lies beside the optimizer's state, which stays unread.
    wanted = {f"ema/{path}": leaf.update(dtype=jnp.float32) for path, leaf in as_abstract(flat).items()}
    arguments = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    mean = readable(checkpoint, lambda: handler.restore(plain_path(checkpoint) / "rest", args=arguments))
    _note_unchecked(metadata, checkpoint)
    if not is_unchanged({"rest": mean}, metadata):
        raise CheckpointError(f"{checkpoint}: the mean differs from the one that was saved; use another checkpoint")
    return unflatten({path: mean[f"ema/{path}"].astype(leaf.dtype) for path, leaf in flat.items()}, like)


def is_unchanged(read: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Whether arrays that were read from a checkpoint are those that were saved, by the checksums in its metadata."""
    # Checksums of before there were formats were computed in another way.
    return "format" not in metadata or checksums(read).items() <= metadata["checksums"].items()


def _note_unchecked(metadata: dict[str, Any], checkpoint: epath.Path) -> None:
    if "format" not in metadata and is_primary():
        told = f"{checkpoint}: was saved by an earlier version of maxlm; its weights are not checked"
        console.print(told, markup=False)


def check_shapes(saved: dict[str, list], wanted: dict[str, list], *, where: epath.Path) -> None:
    """Raise CheckpointError naming the first weights that do not fit."""
    if difference := first_difference(saved, wanted):
        raise CheckpointError(
            f"{where}: is a checkpoint of another model: {difference}; give the model section, and of adapters the lora"
            " section, that it was trained with"
        )


def first_difference(saved: dict[str, list], wanted: dict[str, list]) -> str:
    """The first array that does not fit, and how many more; empty where all fit."""
    problems = [
        f"{path} is {saved.get(path, 'not there')} and must be {shape}"
        for path, shape in wanted.items()
        if saved.get(path) != shape
    ]
    problems += [f"{path} is not wanted" for path in saved if path not in wanted]
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
