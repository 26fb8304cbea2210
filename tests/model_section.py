"""`model:` sections for tests, from short flat settings."""

from collections.abc import Sequence
from typing import Any


def uniform(
    *,
    num_layers: int = 2,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    window_pattern: Sequence[int | None] = (None,),
    rope_theta: float = 10_000.0,
    qk_norm: bool = False,
    attention_soft_cap: float | None = None,
    norm_epsilon: float = 1e-6,
    moe: dict[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Layers that differ in their windows only, which alternate.

    Args:
      moe: settings of a mixture of experts, which replaces the MLP.
      rest: other keys of the section.
    """

    def layer(window: int | None) -> dict[str, Any]:
        attention = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "window": window}
        attention |= {"rope": {"theta": rope_theta}, "qk_norm": qk_norm, "soft_cap": attention_soft_cap}
        mlp = {"kind": "gated", "dim": mlp_dim} if moe is None else {"kind": "moe", **moe}
        return {"mixer": {"kind": "attention", **attention}, "mlp": mlp}

    repeat, rest_of_layers = divmod(num_layers, len(window_pattern))
    assert not rest_of_layers, "the pattern of windows does not divide the layers"
    layers = [layer(window) for window in window_pattern]
    return {
        "embed_dim": embed_dim,
        "norm": {"kind": "rms", "epsilon": norm_epsilon},
        "layers": {"repeat": repeat, **(layers[0] if len(layers) == 1 else {"pattern": layers})},
        **rest,
    }
