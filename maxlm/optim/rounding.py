"""Stochastic rounding, for parameters stored in bfloat16 and updated in float32."""

import jax
import jax.numpy as jnp

from maxlm.core.sharding import is_explicit, spec_of


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up or down at random, so that the expected value is x (arXiv:2010.06192).

    An update smaller than half the gap between two bfloat16 numbers is always lost when rounding to nearest; here it
    takes effect occasionally. The random bits depend on the key and the shape, not on the mesh.
    """
    random = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=spec_of(x) if is_explicit() else None)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: adding uniform bits below it carries with the correct probability.
    rounded = (bits + random.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
