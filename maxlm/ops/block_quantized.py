"""Frozen weights in 4 or 8 bits with a scale per block: the base of adapters (QLoRA, arXiv:2305.14314).

They are dequantized a tile at a time, so that no whole matrix ever exists, and only activations have a gradient.

Dimensions: I input features, O output features, K blocks of a row, T outputs of a tile; `...` leading dimensions.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import gather_weight, gathered_spec, is_explicit, names_of, spec_of

Kind = Literal["nf4", "int4", "int8"]

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (arXiv:2305.14314, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS))
# Symmetric: the most negative code is unused.
_INT4_MAX, _INT8_MAX, _SCALE_CODES = 7, 127, 255
_MAX_TILE = 256


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "largest"], meta_fields=["kind"])
@dataclass(frozen=True)
class BlockQuantized:
    """A weight [..., I, O], stored output-first.

    codes: int8 [..., O, I]; of 4 bits uint8 [..., O, I / 2], where byte j of a block holds its values j and j + half.
    scales: of each block, [..., O, K]: float32, or 8 bits: 255ths of the largest of the output (double quantization).
    largest: the largest scale of each output, float32 [..., O]; None without double quantization.
    """

    codes: jax.Array
    scales: jax.Array
    largest: jax.Array | None
    kind: Kind

    def dequantize(self) -> jax.Array:
        """The weight, float32 [..., I, O]."""
        if not is_explicit():
            return jnp.swapaxes(_rows(self), -1, -2)
        part = self.gathered()
        spec = spec_of(part.codes)
        local = lambda weight: jnp.swapaxes(_rows(weight), -1, -2)  # noqa: E731
        return _shard_map(local, (part,), P(*spec[:-2], spec[-1], spec[-2]))

    def output_squares(self) -> jax.Array:
        """The squared length of the weights of each output, float32 [..., O]."""
        part = self.gathered()
        axes = names_of(spec_of(part.codes)[-1]) if is_explicit() else ()

        def local(weight: Self) -> jax.Array:
            # The compiler dequantizes within the loop of the sum.
            return _sum_over(jnp.sum(jnp.square(_rows(weight)), axis=-1), axes)

        return local(part) if not is_explicit() else _shard_map(local, (part,), P(*spec_of(part.codes)[:-1]))

    def gathered(self) -> Self:
        """The same, on each device but for its tensor-parallel part: quantized values are what is sent."""
        return jax.tree.map(gather_weight, self)


def quantize(weight: jax.Array, kind: Kind, *, block_size: int, double: bool) -> BlockQuantized:
    """Quantize a weight [..., I, O] in blocks of `block_size` inputs: scale = max |w|, value = the nearest level.

    The nearest level is that for the scale as it is stored. `block_size` is even and divides I on each device.
    """
    quantize_part = partial(_quantize, kind=kind, block_size=block_size, double=double)
    if not is_explicit():
        return quantize_part(weight, axes=())
    *lead, inputs, outputs = spec_of(weight)
    spec = P(*lead, outputs, inputs)
    of_outputs = P(*lead, outputs) if double else None
    specs: Any = BlockQuantized(cast(Any, spec), cast(Any, spec), cast(Any, of_outputs), kind)
    return _shard_map(partial(quantize_part, axes=names_of(inputs)), (weight,), specs)


def _quantize(weight, *, kind: Kind, block_size: int, double: bool, axes: tuple[str, ...]) -> BlockQuantized:
    rows = jnp.swapaxes(weight, -1, -2).astype(jnp.float32)
    blocks = rows.reshape(*rows.shape[:-1], -1, block_size)
    scales, largest = jnp.max(jnp.abs(blocks), axis=-1), None
    if double:
        largest = jnp.max(scales, axis=-1)
        largest = jax.lax.pmax(largest, axes) if axes else largest
        part = scales / jnp.where(largest > 0, largest, 1.0)[..., None]
        scales = jnp.clip(jnp.round(_SCALE_CODES * part), 1, _SCALE_CODES).astype(jnp.uint8)
    stored = _scales(scales, largest)
    scaled = blocks / jnp.where(stored > 0, stored, 1.0)[..., None]
    if kind == "int8":
        codes = jnp.clip(jnp.round(_INT8_MAX * scaled), -_INT8_MAX, _INT8_MAX).astype(jnp.int8)
    elif kind == "int4":
        codes = _pack(jnp.clip(jnp.round(_INT4_MAX * scaled), -_INT4_MAX, _INT4_MAX) + _INT4_MAX)
    else:
        codes = _pack(jnp.sum(jnp.stack([scaled > each for each in _MIDPOINTS]), axis=0))
    return BlockQuantized(codes.reshape(*rows.shape[:-1], -1), scales, largest, kind)


def _pack(codes: jax.Array) -> jax.Array:
    """4-bit codes [..., K, block] as bytes [..., K, block / 2]."""
    first, second = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return first | (second << 4)


def _scales(scales: jax.Array, largest: jax.Array | None) -> jax.Array:
    return scales if largest is None else scales.astype(jnp.float32) * (largest / _SCALE_CODES)[..., None]


def _rows(weight: BlockQuantized) -> jax.Array:
    """The weight of each output, float32 [..., O, I]."""
    scales = _scales(weight.scales, weight.largest)
    blocks = weight.codes.reshape(*scales.shape, -1)
    if weight.kind == "int8":
        values = blocks.astype(jnp.float32) / _INT8_MAX
    else:
        codes = jnp.concatenate([blocks & 15, blocks >> 4], axis=-1)
        values = _look_up(codes, NF4_LEVELS) if weight.kind == "nf4" else (codes.astype(jnp.float32) - 7) / _INT4_MAX
    return (values * scales[..., None]).reshape(*scales.shape[:-1], -1)


def _look_up(codes: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """levels[codes]. A tree of selections: gathers from a table are slow on vector units."""
    values: list[Any] = [jnp.float32(level) for level in levels]
    for bit in range(4):
        is_set = (codes >> bit) & 1 != 0
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2])]
    return values[0]


def multiply(x: jax.Array, weight: BlockQuantized, dtype: str, out_spec: P | None) -> jax.Array:
    """x [..., I] times a weight [I, O], as [..., O] in the dtype of x; operands have `dtype`, sums are float32.

    Args:
      out_spec: the sharding of the result; None: that of x and the weight.
    """
    return _multiply(x, weight, dtype, spec_of(x) if is_explicit() else None, out_spec)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _multiply(x, weight, dtype, x_spec, out_spec):
    del x_spec
    return _over_devices(_forward_tiles, x, weight, -1, dtype, out_spec)


def _multiply_forward(x, weight, dtype, x_spec, out_spec):
    # The weight is the only residual: it has no gradient itself.
    return _multiply(x, weight, dtype, x_spec, out_spec), weight


def _multiply_backward(dtype, x_spec, out_spec, weight, grad):
    del out_spec
    if x_spec is not None:
        outputs = gathered_spec(spec_of(weight.codes))[-2]
        grad = jax.reshard(grad, P(*x_spec[:-1], outputs))
    return _over_devices(_backward_tiles, grad, weight, -2, dtype, x_spec), None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _over_devices(tiles: Callable, x, weight: BlockQuantized, contracted: int, dtype: str, out_spec: P | None):
    """A product on each device's own part, and the sum over devices that share the contraction.

    Args:
      contracted: the axis of the codes that is summed over.
    """
    if not is_explicit():
        return tiles(x, weight, dtype).astype(x.dtype)
    weight = weight.gathered()
    spec, rows = spec_of(weight.codes), spec_of(x)[:-1]
    axes, kept = names_of(spec[contracted]), spec[-1 if contracted == -2 else -2]
    out_spec = P(*rows, kept) if out_spec is None else out_spec
    # Where the result is sharded further than x, the sum is scattered.
    scattered = [axis for axis, (have, want) in enumerate(zip(rows, out_spec)) if axes and have != want]

    def local(x, weight):
        y = tiles(x, weight, dtype).astype(x.dtype)
        if scattered:
            return jax.lax.psum_scatter(y, axes, scatter_dimension=scattered[0], tiled=True)
        return _sum_over(y, axes)

    return _shard_map(local, (x, weight), out_spec)


def _forward_tiles(x, weight: BlockQuantized, dtype: str):
    """[..., O] float32."""

    def tile(part: BlockQuantized):
        return _dot(x.astype(dtype), _rows(part).astype(dtype), 1)

    return _merge(jax.lax.map(tile, _tiled(weight)))


def _backward_tiles(grad, weight: BlockQuantized, dtype: str):
    """[..., O] times the transposed weight: [..., I] float32."""
    tiles = _tiled(weight)

    def add(total, part):
        weight, grad = part
        return total + _dot(grad.astype(dtype), _rows(weight).astype(dtype), 0), None

    num_inputs = weight.codes.shape[-1] * (1 if weight.kind == "int8" else 2)
    zeros = jnp.zeros((*grad.shape[:-1], num_inputs), jnp.float32)
    return jax.lax.scan(add, zeros, (tiles, _split(grad, tiles.codes.shape[0])))[0]


def _tiled(weight: BlockQuantized) -> BlockQuantized:
    """[tiles, T, ...] of each array."""
    num_outputs = weight.codes.shape[0]
    size = max(each for each in range(1, min(num_outputs, _MAX_TILE) + 1) if num_outputs % each == 0)
    return jax.tree.map(lambda x: x.reshape(num_outputs // size, size, *x.shape[1:]), weight)


def _merge(y):
    """[tiles, ..., T] as [..., O]."""
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1)


def _split(y, count: int):
    """[..., O] as [tiles, ..., T]."""
    return jnp.moveaxis(y.reshape(*y.shape[:-1], count, -1), -2, 0)


def _dot(x, matrix, axis: int):
    return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _shard_map(function: Callable, operands: tuple, out_specs: Any) -> Any:
    """`function` on the parts of its operands that each device has."""
    specs = jax.tree.map(spec_of, operands)
    return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(*operands)


def num_bytes(weight: BlockQuantized) -> int:
    """Bytes of its arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weight))
