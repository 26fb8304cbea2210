"""Parameters that are stored in bfloat16 and learn in float32."""

import jax
import jax.numpy as jnp

from maxlm.core.sharding import is_explicit, spec_of


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down at random, such that the expected value is x (arXiv:2010.06192).

    An update that is smaller than half the distance of two bfloat16 numbers is lost for ever when it is rounded to the
    nearest; here it takes effect once in a while. The bits drawn depend on the key and on the shape, not on the mesh.
    """
    random = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=spec_of(x) if is_explicit() else None)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: adding uniform bits below it carries with the right probability.
    rounded = (bits + random.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
