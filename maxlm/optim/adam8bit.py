"""Adam with 8-bit moments (after arXiv:2110.02861).

A matrix is divided into tiles, each with a float32 scale: the largest magnitude of its values. A value is stored as
scale * (code / largest code)^power: codes are denser where values are small, as in floating point, and need no
table. The second moment spans twice as many decades as the first and has the higher power.

Rounding is stochastic: with beta2 near 1 a step changes a moment by less than the gap between two codes, so rounding
to nearest would never change it.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maxlm.core.parameters import Parameter
from maxlm.core.sharding import current_mesh, is_explicit, spec_of
from maxlm.core.tree import flatten, unflatten
from maxlm.optim.groups import Plan
from maxlm.optim.spread import axis_names

# Sides of a tile. Unlike blocks along one axis, tiles fit the shards of a matrix sharded along either axis.
TILE = 16
MIN_TILE_SIZE = 64
FIRST_POWER, FIRST_CODES = 3, 127
SECOND_POWER, SECOND_CODES = 4, 255


def scale_by_adam8bit(plan: Plan, beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction, with bias correction (arXiv:1412.6980)."""

    def init(params):
        return {
            "count": jnp.zeros((), jnp.int32),
            "moments": {path: _init_moments(plan[path], leaf) for path, leaf in flatten(params).items()},
        }

    def update(updates, state, params=None):
        del params
        count = state["count"] + 1
        correction1, correction2 = (1 - beta**count for beta in (beta1, beta2))
        key = jax.random.fold_in(jax.random.key(0), count)
        directions, moments = {}, {}
        for path, grad in flatten(updates).items():
            old = state["moments"][path]
            first, second = _read(old)
            first = beta1 * first + (1 - beta1) * grad
            second = beta2 * second + (1 - beta2) * jnp.square(grad)
            directions[path] = (first / correction1) / (jnp.sqrt(second / correction2) + epsilon)
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            moments[path] = _write(old, first, second, own_key)
        return unflatten(directions, updates), {"count": count, "moments": moments}

    return optax.GradientTransformation(init, update)


def encode(x: jax.Array, noise: jax.Array, *, power: int, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """Codes of x [..., rows, columns] and the scales of its tiles [..., rows / side, columns / side].

    Args:
      x: float32; the codes have its shape and are int8 if x is signed (127 codes), uint8 if not (255).
      noise: uniform in [0, 1), of the shape of x: a value between two codes is rounded up where the noise is below its
        fraction, so that the expected value is x.
    """
    scale = jnp.max(jnp.abs(_tiles(x)), axis=(-3, -1))
    part = jnp.abs(x) / jnp.maximum(_spread_scale(scale, x), jnp.finfo(jnp.float32).tiny)
    low = jnp.floor(jnp.minimum(part, 1.0) ** (1 / power) * num_codes)
    low_value, high_value = (low / num_codes) ** power, ((low + 1) / num_codes) ** power
    code = low + (noise * (high_value - low_value) < part - low_value)
    code = jnp.minimum(code, num_codes)
    if num_codes == SECOND_CODES:
        # A zero second moment with a nonzero first moment would make the update unbounded.
        return jnp.maximum(code, 1).astype(jnp.uint8), scale
    return (jnp.sign(x) * code).astype(jnp.int8), scale


def decode(codes: jax.Array, scale: jax.Array, *, power: int, num_codes: int) -> jax.Array:
    """The float32 values of codes from `encode`."""
    part = codes.astype(jnp.float32) / num_codes
    return jnp.sign(part) * jnp.abs(part) ** power * _spread_scale(scale, codes)


def _init_moments(parameter: Parameter, leaf: jax.Array) -> dict[str, jax.Array]:
    # Scales of small tiles would take as much memory as they save, and norm vectors are few.
    if not parameter.is_matrix or math.prod(_sides(leaf.shape)) < MIN_TILE_SIZE:
        return {"first": jnp.zeros_like(leaf), "second": jnp.zeros_like(leaf)}
    scale = jnp.zeros_like(jnp.max(_tiles(leaf), axis=(-3, -1)))
    return {
        "first": jnp.zeros_like(leaf, dtype=jnp.int8),
        "first_scale": scale,
        "second": jnp.zeros_like(leaf, dtype=jnp.uint8),
        "second_scale": scale,
    }


def _read(moments):
    if "first_scale" not in moments:
        return moments["first"], moments["second"]
    return (
        decode(moments["first"], moments["first_scale"], power=FIRST_POWER, num_codes=FIRST_CODES),
        decode(moments["second"], moments["second_scale"], power=SECOND_POWER, num_codes=SECOND_CODES),
    )


def _write(old, first, second, key):
    if "first_scale" not in old:
        return {"first": first, "second": second}
    bits = jax.random.bits(key, first.shape, jnp.uint32, out_sharding=spec_of(first) if is_explicit() else None)
    noise = [(half & 0xFFFF).astype(jnp.float32) / 65536 for half in (bits, bits >> 16)]
    first_codes, first_scale = encode(first, noise[0], power=FIRST_POWER, num_codes=FIRST_CODES)
    second_codes, second_scale = encode(second, noise[1], power=SECOND_POWER, num_codes=SECOND_CODES)
    return {
        "first": first_codes,
        "first_scale": first_scale,
        "second": second_codes,
        "second_scale": second_scale,
    }


def _sides(shape) -> tuple[int, int]:
    """Sides of the tiles: the largest powers of two up to TILE that divide the last two axes."""
    return math.gcd(shape[-2], TILE), math.gcd(shape[-1], TILE)


def _tiles(x):
    """[..., rows, columns] to [..., rows / side, side, columns / side, side]."""
    shape = _tiled_shape(x.shape)
    if not is_explicit():
        return x.reshape(shape)
    rows, columns = _tiled_spec(x)
    whole_tiles = jax.reshard(x, P(*spec_of(x)[:-2], rows, columns))
    return jax.lax.reshape(whole_tiles, shape, out_sharding=P(*spec_of(x)[:-2], rows, None, columns, None))


def _spread_scale(scale, like):
    """The scales of tiles, broadcast to the values of `like`."""
    tiles = jnp.broadcast_to(scale[..., :, None, :, None], _tiled_shape(like.shape))
    if not is_explicit():
        return tiles.reshape(like.shape)
    spread = jax.lax.reshape(tiles, like.shape, out_sharding=P(*spec_of(like)[:-2], *_tiled_spec(like)))
    return jax.reshard(spread, spec_of(like))


def _tiled_shape(shape):
    row_side, column_side = _sides(shape)
    return (*shape[:-2], shape[-2] // row_side, row_side, shape[-1] // column_side, column_side)


def _tiled_spec(x):
    """The mesh axes that shard the last two axes; None where they would split tiles."""
    mesh = current_mesh()
    entries = []
    for size, side, entry in zip(x.shape[-2:], _sides(x.shape), spec_of(x)[-2:]):
        num_parts = math.prod(mesh.shape[name] for name in axis_names(entry))
        entries.append(entry if (size // side) % num_parts == 0 else None)
    return entries
