"""The positional attention mask, and the map from dot products to logits.

The rule is static: the blockwise kernels use it to skip fully masked blocks.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp

# Stands for -infinity, but keeps every difference of two logits finite.
MASKED_LOGIT = -1e30


@dataclasses.dataclass(frozen=True)
class AttentionRule:
    """Positions i of queries and j of keys; keys start at 0, queries at `offset`.

    Attributes:
      scale: factor on the dot product, before the soft cap; usually head_dim ** -0.5.
      causal: i attends to j only if j <= i.
      window: i attends to j only if i - j < window; without `causal`, |i - j| < window.
      soft_cap: a logit x becomes soft_cap * tanh(x / soft_cap).
      offset: position of the first query relative to the first key: nonzero if both are pieces of a longer row.

    Raises:
      ValueError: the window or the soft cap is not positive.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    offset: int = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}; None means no window")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap must be positive, not {self.soft_cap}; None means no cap")

    @property
    def everything_visible(self) -> bool:
        return not self.causal and self.window is None

    @property
    def bidirectional(self) -> "AttentionRule":
        """The rule between tokens of a prefix: without causality, the window to both sides."""
        return dataclasses.replace(self, causal=False)

    def sees(self, query_position, key_position):
        """Whether a query may attend to a key: elementwise, for integers or integer arrays that broadcast."""
        return self._holds(query_position - key_position, key_position - query_position)

    def block_has_visible(self, query_start, query_end, key_start, key_end):
        """Whether any query in [query_start, query_end) may attend to any key in [key_start, key_end)."""
        return self._holds(query_start - (key_end - 1), key_start - (query_end - 1))

    def block_is_visible(self, query_start, query_end, key_start, key_end):
        """Whether every query in [query_start, query_end) may attend to every key in [key_start, key_end)."""
        return self._holds(query_end - 1 - key_start, key_end - 1 - query_start)

    def _holds(self, behind, ahead):
        """The rule for a key `behind` positions before its query, or `ahead` = -behind positions after it.

        Two arguments, because a block's nearest and farthest pairs bound them separately. Without the offset.
        """
        behind, ahead = behind + self.offset, ahead - self.offset
        conditions = []
        if self.causal:
            conditions.append(ahead <= 0)
        if self.window is not None:
            conditions.append(behind < self.window)
            if not self.causal:
                conditions.append(ahead < self.window)
        return functools.reduce(operator.and_, conditions, True)

    def logits(self, products: jax.Array) -> jax.Array:
        """Logits of float32 dot products, any shape."""
        logits = products * self.scale
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def product_gradient(self, logits: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient of the dot products, from the gradient of the logits."""
        if self.soft_cap is not None:
            gradient = gradient * (1 - jnp.square(logits / self.soft_cap))
        return gradient * self.scale


def mean_gradient(output_BTNH: jax.Array, gradient_BTNH: jax.Array) -> jax.Array:
    """sum_j P_ij dP_ij = dO_i . O_i, the term that the softmax subtracts (arXiv:2205.14135, appendix B.2).

    It holds with dropout too: if O = (P * M) V with a mask M of 0 and 1 / (1 - rate), then dP = M * (dO V^T), so
    sum_j P_ij dP_ij = sum_j (P * M)_ij (dO V^T)_ij = dO_i . O_i.
    """
    return jnp.sum(gradient_BTNH.astype(jnp.float32) * output_BTNH.astype(jnp.float32), axis=-1)
