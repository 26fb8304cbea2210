"""Models with adapters: applied to frozen weights, merged into them, and taken out again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.adapters import AdaptersConfig, LoraConfig, PrefixConfig, PromptTuningConfig
from maxlm.core.tree import path_of
from maxlm.models.adapters.frozen import VIRTUAL_TOKENS, Adapters
from maxlm.models.adapters.prompt import keys_and_values
from maxlm.models.virtual_tokens import with_virtual_tokens, without_virtual_tokens
from maxlm.ops.block_quantized import BlockQuantized
from maxlm.ops.linear import WEIGHTS, AdaptedWeight, ScaledWeight

_OVERWRITES = "{} replaces {}, which the merged weights no longer tell; load the base again"


def apply_adapters(model: Any, adapters: Adapters, config: AdaptersConfig) -> Any:
    """The model with adapted weights; no gradient flows to the model itself."""

    def adapted(weight: Any, adapter: dict[str, jax.Array]) -> Any:
        weight = jax.lax.stop_gradient(weight)
        match adapter:
            case {"whole": whole}:
                return whole
            case {"down": down, "up": up}:
                return AdaptedWeight(weight, down, up, scale_of(config), adapter.get("magnitude"))
            case {"output_scale": factor}:
                return ScaledWeight(weight, factor, "output")
            case {"input_scale": factor}:
                return ScaledWeight(weight, factor, "input")
            case {"bias_scale": factor}:
                return weight * factor
        return weight

    return _extended(_map_adapted(adapted, model, adapters), adapters, config)


def merge_adapters(model: Any, adapters: Adapters, config: AdaptersConfig) -> Any:
    """The model with the adapters merged into its weights, which are not quantized: it computes the same.

    Computed in float32, then rounded once to the dtype of a weight.
    """

    dtype = jnp.dtype(model.execution.parameter_dtype)

    def merged(weight: Any, adapter: dict[str, jax.Array]) -> jax.Array:
        if isinstance(weight, BlockQuantized):
            exact, rounded = weight.dequantize(), dtype
        elif not adapter:
            return weight
        else:
            exact, rounded = weight.astype(jnp.float32), weight.dtype
        match adapter:
            case {"whole": whole}:
                return whole
            case {"down": _, "up": _}:
                exact = exact + _update(adapter, config)
                if "magnitude" in adapter:
                    norms = jnp.sqrt(jnp.sum(jnp.square(exact), axis=-2))
                    exact = exact * (adapter["magnitude"] / norms)[..., None, :]
            case {"output_scale": factor}:
                exact = exact * factor[..., None, :]
            case {"input_scale": factor}:
                exact = exact * factor[..., None]
            case {"bias_scale": factor}:
                exact = exact * factor
        return exact.astype(rounded)

    return _extended(_map_adapted(merged, model, adapters), adapters, config)


def unmerge_adapters(model: Any, adapters: Adapters, config: AdaptersConfig) -> Any:
    """The base of a model that `merge_adapters` made, up to the rounding of both.

    Raises:
      ValueError: the adapters replace what they adapt (DoRA its lengths; BitFit and layers the weights), or are zero.
    """

    if isinstance(config, PrefixConfig | PromptTuningConfig):
        return without_virtual_tokens(model)

    def unmerged(weight: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
        exact = weight.astype(jnp.float32)
        match adapter:
            case {"whole": _}:
                raise ValueError(_OVERWRITES.format("an adapter", "whole weights"))
            case {"magnitude": _}:
                raise ValueError(_OVERWRITES.format("DoRA", "the lengths of weights"))
            case {"down": _, "up": _}:
                exact = exact - _update(adapter, config)
            case {"output_scale": factor}:
                exact = exact / factor[..., None, :]
            case {"input_scale": factor}:
                exact = exact / factor[..., None]
            case {"bias_scale": factor}:
                exact = exact / factor
            case _:
                return weight
        return exact.astype(weight.dtype)

    return _map_adapted(unmerged, model, adapters)


def virtual_tokens(adapters: Adapters) -> dict[str, jax.Array]:
    """Keys and values of virtual tokens by path, of adapters that add some; those of an MLP (arXiv:2101.00190, section
    4.3) are computed."""
    by_layer = {path: adapter for path, adapter in adapters.items() if path != VIRTUAL_TOKENS}
    if (shared := adapters.get(VIRTUAL_TOKENS)) is None:
        return {path: adapter["new"] for path, adapter in by_layer.items() if "new" in adapter}
    product = partial(jnp.einsum, precision="highest")
    hidden_PW = jnp.tanh(product("pd,dw->pw", shared["embedding"], shared["widen"]) + shared["widen_bias"])
    return {
        path: product("pw,...wx->...px", hidden_PW, adapter["project"]) + adapter["project_bias"][..., None, :]
        for path, adapter in by_layer.items()
        if "project" in adapter
    }


def _extended(model: Any, adapters: Adapters, config: AdaptersConfig) -> Any:
    """The model with the weights that adapters add; it is frozen or merged already."""
    if isinstance(config, PromptTuningConfig):
        values = keys_and_values(model, adapters[VIRTUAL_TOKENS]["prompt"])
        return with_virtual_tokens(model, config.tokens, values)
    if not isinstance(config, PrefixConfig):
        return model
    return with_virtual_tokens(model, config.tokens, virtual_tokens(adapters))


def scale_of(config: AdaptersConfig) -> float:
    """The factor of low-rank updates."""
    assert isinstance(config, LoraConfig)
    return config.scale


def _update(adapter: dict[str, jax.Array], config: AdaptersConfig) -> jax.Array:
    product = jnp.einsum("...ir,...ro->...io", adapter["down"], adapter["up"], precision="highest")
    return scale_of(config) * product


def _map_adapted(function: Callable[[Any, dict[str, jax.Array]], Any], model: Any, adapters: Adapters) -> Any:
    """Apply `function(weight, adapter)` to each weight; the adapter is {} for those that have none.

    A factor of outputs is also one of the bias that is added to them, which is named after its matrix.
    """
    biases = {
        f"{path}_bias": {"bias_scale": adapter["output_scale"]}
        for path, adapter in adapters.items()
        if "output_scale" in adapter
    }
    by_path = biases | adapters
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: function(weight, by_path.get(path_of(path), {})),
        model,
        is_leaf=lambda node: isinstance(node, WEIGHTS),
    )
