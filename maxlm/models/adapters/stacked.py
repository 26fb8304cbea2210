"""Several low-rank adapters of one model in memory, of which each row of a batch takes its own (arXiv:2311.03285).

Number 0 is no adapter, and number n the n-th of those that were stacked.

Dimensions: A adapters and none, I inputs and O outputs of a matrix, R the largest rank, B rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.adapters import AdaptersConfig, LoraConfig
from maxlm.core.tree import path_of
from maxlm.errors import RequestError
from maxlm.models.adapters.frozen import Adapters, weights_of
from maxlm.models.decoder import Decoder
from maxlm.ops.linear import WEIGHTS, StackedWeight


def stackable(name: str, adapters: Adapters, config: AdaptersConfig) -> LoraConfig:
    """The configuration of adapters that can be applied row by row.

    Raises:
      RequestError: they cannot.
    """
    if not isinstance(config, LoraConfig):
        problem = f"are of kind {config.kind}"
    elif config.decomposed:
        problem = "are decomposed (DoRA)"
    elif config.base is not None:
        problem = f"were trained on a base quantized to {config.base.kind}, whose rounding they correct"
    elif whole := [path for path, adapter in adapters.items() if "whole" in adapter]:
        problem = f"have weights of their own ({whole[0]})"
    else:
        return config
    raise RequestError(
        f"{name}: its adapters {problem}, and only low-rank updates (kind: lora) share a model in memory; serve the run"
        " alone"
    )


def with_stacked(model: Decoder, stack: Sequence[tuple[Adapters, LoraConfig]]) -> Decoder:
    """The model with adapters to choose from: see `for_rows`.

    Ranks are padded with zeros to the largest, and each factor alpha / rank is multiplied into the second matrix.

    Raises:
      RequestError: a matrix is used in a way that has no product by row.
    """
    paths = {path for adapters, _ in stack for path in adapters}
    for path in sorted(paths):
        _check_used_in_products(model, path)

    def stacked(path: str, weight: jax.Array) -> StackedWeight:
        *lead, inputs, outputs = weight.shape
        rank = max(adapters[path]["down"].shape[-1] for adapters, _ in stack if path in adapters)
        downs, ups = [jnp.zeros((*lead, inputs, rank))], [jnp.zeros((*lead, rank, outputs))]
        for adapters, config in stack:
            if path not in adapters:
                downs.append(downs[0])
                ups.append(ups[0])
                continue
            down, up = adapters[path]["down"], config.scale * adapters[path]["up"]
            sides = [(0, 0)] * len(lead)
            downs.append(jnp.pad(down, (*sides, (0, 0), (0, rank - down.shape[-1]))))
            ups.append(jnp.pad(up, (*sides, (0, rank - up.shape[-2]), (0, 0))))
        # Where the weight is stored for products in bfloat16, so are these.
        down, up = (jnp.stack(each, axis=len(lead)).astype(weight.dtype) for each in (downs, ups))
        return StackedWeight(weight, down, up)

    return _map_weights(lambda path, weight: stacked(path, weight) if path in paths else weight, model)


def for_rows(model: Decoder, adapters_B: jax.Array) -> Decoder:
    """The model for a batch of which each row has the adapter of this number, int32 [B]."""

    def chosen(_: str, weight: Any) -> Any:
        if not isinstance(weight, StackedWeight):
            return weight
        lead = weight.base.shape[:-2]
        return replace(weight, adapters=jnp.broadcast_to(adapters_B, (*lead, *adapters_B.shape)))

    return _map_weights(chosen, model)


def without_stacked(model: Decoder) -> Decoder:
    """The model itself."""
    return _map_weights(lambda _, weight: weight.base if isinstance(weight, StackedWeight) else weight, model)


def of_served(adapters: Adapters, model: Decoder) -> Adapters:
    """The adapters without those of parts that are left out to generate text: the critic, prediction modules."""
    kept = weights_of(model)
    return {path: adapter for path, adapter in adapters.items() if path in kept}


def _check_used_in_products(model: Decoder, path: str) -> None:
    """Latent attention reads its keys and values from a cache of latents, by a matrix that has no rows."""
    parts = path.split("/")
    if parts[0] != "layers" or parts[-1] not in ("key", "value"):
        return
    mixer = model.config.layers[int(parts[1])].pattern[int(parts[2])].mixer
    if mixer.kind == "mla":
        raise RequestError(
            f"{path}: latent attention multiplies queries by this matrix, which adapters that share a model cannot"
            " change row by row; serve the run alone, or train with adapters.targets that leave it out"
        )


def _map_weights(function: Any, model: Decoder) -> Decoder:
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: function(path_of(path), weight), model, is_leaf=lambda node: isinstance(node, WEIGHTS)
    )
