"""Matrix products of activations and weights: plain, adapted (LoRA, DoRA, IA3) and quantized.

Dimensions: I input features, O output features, R rank of an adapter; `...` leading batch dimensions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.hardware import multiplies_bfloat16, traced_platform
from maxlm.core.remat import saved
from maxlm.core.sharding import (
    gather_weight,
    gathered_spec,
    is_explicit,
    logical_to_spec,
    names_of,
    sharded_count,
    spec_of,
    without,
)
from maxlm.ops import block_quantized, eight_bit
from maxlm.ops.block_quantized import BlockQuantized
from maxlm.ops.dropout import InputDropout
from maxlm.ops.qtensor import QTensor


@partial(
    jax.tree_util.register_dataclass, data_fields=["base", "down", "up", "magnitude", "dropout"], meta_fields=["scale"]
)
@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen weight with a low-rank update: W + scale * down @ up (LoRA, arXiv:2106.09685).

    With a `magnitude`, it is the length of the weights of each output (DoRA, arXiv:2402.09353): each column of the sum
    is multiplied by magnitude / its own length. The length is not differentiated (section 4.3 of the paper).
    `dropout`: in training, of the input of the update.
    """

    base: jax.Array | BlockQuantized  # [I, O]
    down: jax.Array  # [I, R]
    up: jax.Array  # [R, O]
    scale: float
    magnitude: jax.Array | None = None  # [O]
    dropout: InputDropout | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["base", "factor"], meta_fields=["of"])
@dataclass(frozen=True)
class ScaledWeight:
    """A frozen weight [I, O] with a factor of each of its outputs, [O], or inputs, [I] (IA3, arXiv:2205.05638)."""

    base: jax.Array | BlockQuantized
    factor: jax.Array
    of: Literal["output", "input"]


@partial(jax.tree_util.register_dataclass, data_fields=["base", "down", "up", "adapters"], meta_fields=[])
@dataclass(frozen=True)
class StackedWeight:
    """A frozen weight with several low-rank updates, of which each row of a batch takes its own: W + down[a] @ up[a],
    as the batched products of Punica (arXiv:2310.18547). For inference on one device.

    adapters: the update of each row of the activations, int32 [B]; None until a batch is known.
    """

    base: jax.Array  # [I, O]
    down: jax.Array  # [A, I, R]
    up: jax.Array  # [A, R, O]
    adapters: jax.Array | None = None


Weight = jax.Array | QTensor | BlockQuantized | AdaptedWeight | ScaledWeight | StackedWeight
# Those that are several arrays.
WEIGHTS = (QTensor, BlockQuantized, AdaptedWeight, ScaledWeight, StackedWeight)


def linear(
    x: jax.Array,
    weight: Weight,
    dtype: str,
    output_axes: tuple[str | None, ...] | None = None,
    *,
    gradient_sum: str = "float32",
) -> jax.Array:
    """x [..., I] times weight [I, O], as [..., O] in the dtype of x.

    `dtype` is that of the operands: "auto", "float32", "bfloat16", or a kind of `ops/eight_bit.py`; products accumulate
    in float32 (int8 in int32). A quantized weight has its own arithmetic, and products with adapters are not 8-bit.
    `output_axes` names the logical axes of the result's sharding, if they are not those of x and weight:
    a product with a sharded contraction can then be reduce-scattered.
    `gradient_sum` is the dtype in which the weight's gradient is summed over devices.
    """
    return saved(_linear(x, weight, dtype, output_axes, gradient_sum))


def _linear(x, weight, dtype, output_axes, gradient_sum):
    if isinstance(weight, AdaptedWeight):
        adapter_dtype = "bfloat16" if dtype in eight_bit.KINDS else dtype
        kept = x if weight.dropout is None else weight.dropout.apply(x)
        narrow = _linear(kept, weight.down, adapter_dtype, None, gradient_sum)
        update = _linear(narrow, weight.up, adapter_dtype, output_axes, gradient_sum)
        y = _linear(x, weight.base, dtype, output_axes, gradient_sum) + weight.scale * update
        return y if weight.magnitude is None else y * _length_ratio(weight).astype(y.dtype)
    if isinstance(weight, StackedWeight):
        adapter_dtype = operand_dtype("bfloat16" if dtype in eight_bit.KINDS else dtype)
        narrow = _product_by_row(x, weight.down[weight.adapters], adapter_dtype)
        update = _product_by_row(narrow, weight.up[weight.adapters], adapter_dtype)
        return _linear(x, weight.base, dtype, output_axes, gradient_sum) + update
    if isinstance(weight, ScaledWeight):
        factor = gather_weight(weight.factor).astype(x.dtype)
        if weight.of == "input":
            return _linear(x * factor, weight.base, dtype, output_axes, gradient_sum)
        return _linear(x, weight.base, dtype, output_axes, gradient_sum) * factor
    if isinstance(weight, QTensor):
        return weight.multiply(x)
    out_spec = logical_to_spec(output_axes) if output_axes is not None and is_explicit() else None
    if isinstance(weight, BlockQuantized):
        # 8-bit products would round what is rounded already.
        return block_quantized.multiply(
            x, weight, "bfloat16" if dtype in eight_bit.KINDS else operand_dtype(dtype), out_spec
        )
    return _matmul(x, weight, operand_dtype(dtype), 0, out_spec, gradient_sum)


def _product_by_row(x: jax.Array, weights: jax.Array, dtype: str) -> jax.Array:
    """x [B, L, I] times a matrix [I, O] of each row."""
    y = jnp.einsum("bli,bio->blo", x.astype(dtype), weights.astype(dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def whole(weight: Weight) -> jax.Array:
    """A weight as a matrix [I, O], on each device but for its tensor-parallel part."""
    assert not isinstance(weight, StackedWeight), "it is another matrix for each row"
    if isinstance(weight, AdaptedWeight):
        sum_IO = whole(weight.base) + weight.scale * (gather_weight(weight.down) @ gather_weight(weight.up))
        return sum_IO if weight.magnitude is None else sum_IO * _length_ratio(weight)
    if isinstance(weight, ScaledWeight):
        factor = gather_weight(weight.factor)
        return whole(weight.base) * (factor if weight.of == "output" else factor[:, None])
    if isinstance(weight, BlockQuantized):
        return weight.dequantize()
    return weight.dequantize().T if isinstance(weight, QTensor) else gather_weight(weight)


def output_squares(weight: jax.Array | BlockQuantized) -> jax.Array:
    """The squared length of the weights [..., I, O] of each output, float32 [..., O], on each device but for its
    tensor-parallel part."""
    if isinstance(weight, BlockQuantized):
        return weight.output_squares()
    return jnp.sum(jnp.square(gather_weight(weight).astype(jnp.float32)), axis=-2)


def _length_ratio(weight: AdaptedWeight) -> jax.Array:
    """magnitude / ||W + scale * down @ up|| of each output, [O], without making the sum."""
    down_IR, up_RO = (jax.lax.stop_gradient(gather_weight(x)) for x in (weight.down, weight.up))
    base = jax.lax.stop_gradient(weight.base)
    cross_RO = _linear(down_IR.T, base, "float32", None, "float32")
    gram_RR = _dot(down_IR.T, down_IR, 0, None)
    update_RO = _dot(gram_RR, up_RO, 0, None)
    squares_O = output_squares(base) + jnp.sum(
        up_RO * (2 * weight.scale * cross_RO + weight.scale**2 * update_RO), axis=0
    )
    return gather_weight(weight.magnitude) * jax.lax.rsqrt(jax.lax.stop_gradient(squares_O))


def operand_dtype(dtype: str) -> str:
    """`dtype`, with "auto" resolved for the target platform."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if multiplies_bfloat16() else "float32"


def unembed(x: jax.Array, table: jax.Array | QTensor, dtype: str, *, gradient_sum: str = "float32") -> jax.Array:
    """x [..., embed] times the rows of table [vocab, embed], as [..., vocab] in the dtype of x; as in `linear`."""
    if isinstance(table, QTensor):
        return table.multiply(x)
    return _matmul(x, table, operand_dtype(dtype), 1, None, gradient_sum)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _matmul(x, weight, dtype, input_axis, out_spec, gradient_sum):
    # A custom vjp, so that the backward products also have `dtype` operands and float32 sums: autodiff would
    # multiply the float32 cotangent by a bfloat16 operand, which no matrix unit supports.
    del gradient_sum
    if dtype in eight_bit.KINDS:
        kind = eight_bit.activation_dtype(dtype)
        return _eight_bit_dot(x, weight, kind, kind, input_axis, out_spec).astype(x.dtype)
    return _dot(x.astype(dtype), gather_weight(weight.astype(dtype)), input_axis, out_spec).astype(x.dtype)


def _matmul_forward(x, weight, dtype, input_axis, out_spec, gradient_sum):
    # The residual is the sharded weight: the backward pass gathers it again instead of keeping it whole.
    y = _matmul(x, weight, dtype, input_axis, out_spec, gradient_sum)
    return y, (x.astype(_gradient_dtype(dtype)), weight)


def _matmul_backward(dtype, input_axis, out_spec, gradient_sum, residuals, grad):
    x, weight = residuals
    if out_spec is not None:
        # The sum was reduce-scattered over the devices that share the contraction: gather its whole cotangent.
        whole = gathered_spec(spec_of(weight))
        grad = jax.reshard(grad, P(*spec_of(x)[:-1], whole[1 - input_axis]))
    if dtype in eight_bit.KINDS:
        kinds = eight_bit.cotangent_dtype(dtype), eight_bit.activation_dtype(dtype)
        grad_x = _eight_bit_dot(grad, weight, *kinds, 1 - input_axis, None)
    else:
        grad_x = _dot(grad.astype(dtype), gather_weight(weight.astype(dtype)), 1 - input_axis, None)
    # Contracting the batch dimensions leaves partial sums on the devices that rows and tokens are sharded over. The
    # compiler adds them in the dtype of the product.
    left, right = (x, grad) if input_axis == 0 else (grad, x)
    batch_dims = tuple(range(x.ndim - 1))
    grad_weight = jax.lax.dot_general(
        left.astype(_gradient_dtype(dtype)),
        right.astype(_gradient_dtype(dtype)),
        ((batch_dims, batch_dims), ((), ())),
        preferred_element_type=gradient_sum if sharded_count(spec_of(x)[:-1]) > 1 else jnp.float32,
        out_sharding=P(spec_of(left)[-1], spec_of(right)[-1]) if is_explicit() else None,
    )
    if is_explicit():
        grad_weight = jax.reshard(grad_weight, spec_of(weight))
    return grad_x.astype(grad.dtype), grad_weight.astype(weight.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _gradient_dtype(dtype: str) -> str:
    """Operand dtype of the product for the gradient of the weights."""
    return "bfloat16" if dtype in eight_bit.KINDS else dtype


def _dot(x, weight, axis, out_spec, sum_dtype=jnp.float32):
    """Contract the last axis of x with `axis` of a matrix."""
    # If both operands are sharded along the contraction (row-parallel), the output's sharding requests the sum.
    if out_spec is None and is_explicit():
        out_spec = P(*spec_of(x)[:-1], spec_of(weight)[1 - axis])
    if _is_slow_row(x):
        return _dot(jnp.stack([x, x]), weight, axis, None, sum_dtype)[0]
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=sum_dtype, out_sharding=out_spec
    )


def _is_slow_row(x) -> bool:
    """Whether x is a single row that XLA's CPU backend multiplies in a loop up to ten times slower than two rows."""
    return x.size == x.shape[-1] and x.dtype != jnp.float32 and traced_platform() == "cpu" and not is_explicit()


def _eight_bit_dot(x, weight, x_dtype, weight_dtype, axis, out_spec):
    """`_dot` of operands rounded to 8 bits, with a scale per row of x and per output of the matrix: float32."""
    x, weight = eight_bit.scale_to(x, -1, x_dtype), eight_bit.scale_to(weight, axis, weight_dtype)
    # Rounded before the all-gather, to send half the bytes.
    sums = _dot(x.values, gather_weight(weight.values), axis, out_spec, eight_bit.sum_dtype(x_dtype))
    weight_scales = weight.scales.reshape(-1)
    row_scales = x.scales
    if is_explicit():
        spec = spec_of(sums)
        row_scales, weight_scales = (
            jax.reshard(row_scales, P(*spec[:-1], None)),
            jax.reshard(weight_scales, P(spec[-1])),
        )
    return sums.astype(jnp.float32) * row_scales * weight_scales


def embed(table: jax.Array | QTensor, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of table [vocab, embed] for tokens [batch, length], as [batch, length, embed]."""
    if isinstance(table, QTensor):
        return table.rows(tokens).astype(dtype)
    if not is_explicit():
        return table[tokens].astype(dtype)
    # Each device looks up its own channels, for the tokens of all devices that the channels are sharded over. Then
    # channels are exchanged for tokens. So neither the whole table nor its whole gradient is ever on one device.
    rows, positions = spec_of(tokens)
    channels = spec_of(table)[1]
    whole_rows, whole_positions = gathered_spec(spec_of(tokens))
    everywhere = jax.reshard(tokens, P(whole_rows, whole_positions))
    x = table.at[everywhere].get(out_sharding=P(whole_rows, whole_positions, channels)).astype(dtype)
    # One all-to-all for rows and one for positions: the compiler would gather if asked for both at once.
    x = jax.reshard(x, P(whole_rows, positions, without(channels, names_of(positions))))
    return jax.reshard(x, P(rows, positions, None))
