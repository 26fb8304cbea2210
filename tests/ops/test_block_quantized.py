"""Weights in blocks of 4 and 8 bits against the equations in float64: their levels, products and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh, named_sharding
from maxlm.ops.block_quantized import NF4_LEVELS, BlockQuantized, quantize
from maxlm.ops.linear import linear, whole

NUM_INPUTS, NUM_OUTPUTS, BLOCK = 64, 512, 16
KINDS = list(itertools.product(("nf4", "int4", "int8"), (True, False)))
STEPS = {"int4": np.arange(-7, 8) / 7, "int8": np.arange(-127, 128) / 127, "nf4": np.array(NF4_LEVELS)}


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT, X = draw(NUM_INPUTS, NUM_OUTPUTS, seed=0), draw(2, 4, NUM_INPUTS, seed=1)


def expected_weight(weight: np.ndarray, kind: str, double: bool) -> np.ndarray:
    """Each block of inputs of an output times its largest magnitude, at the nearest level."""
    blocks = weight.T.astype(np.float64).reshape(weight.shape[1], -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1)
    if double:
        largest = scales.max(axis=-1, keepdims=True)
        scales = np.round(255 * scales / largest) * largest / 255
    levels = STEPS[kind]
    nearest = np.abs(blocks[..., None] / scales[..., None, None] - levels).argmin(axis=-1)
    return (levels[nearest] * scales[..., None]).reshape(weight.shape[::-1]).T


def test_levels_are_those_of_the_paper():
    """Quantiles of the normal distribution: 8 positive and 7 negative ones, and zero; the largest becomes 1."""
    offset = 0.9677083
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_values_are_the_nearest_levels(kind, double):
    quantized = quantize(jnp.asarray(WEIGHT), kind, block_size=BLOCK, double=double)
    np.testing.assert_allclose(quantized.dequantize(), expected_weight(WEIGHT, kind, double), atol=1e-6)
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(quantized)) / WEIGHT.size
    of_scales = 8 / BLOCK + 32 / NUM_INPUTS if double else 32 / BLOCK
    assert bits == (8 if kind == "int8" else 4) + of_scales


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_zeros_and_stacks_are_quantized_like_single_matrices(kind):
    stack = np.stack([WEIGHT, np.zeros_like(WEIGHT)])
    quantized = quantize(jnp.asarray(stack), kind, block_size=BLOCK, double=True).dequantize()
    alone = quantize(jnp.asarray(WEIGHT), kind, block_size=BLOCK, double=True).dequantize()
    np.testing.assert_array_equal(quantized[0], alone)
    np.testing.assert_array_equal(quantized[1], 0)


def products(weight: BlockQuantized, x, cotangent, output_axes=None):
    """x times the weight, the gradient of x, and the squared lengths of outputs."""
    y, pull_back = jax.vjp(lambda x: linear(x, weight, "float32", output_axes), x)
    return y, pull_back(cotangent)[0], weight.output_squares(), whole(weight)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_products_and_gradients(kind, double):
    """512 outputs are two tiles."""
    quantized = quantize(jnp.asarray(WEIGHT), kind, block_size=BLOCK, double=double)
    cotangent = draw(2, 4, NUM_OUTPUTS, seed=2)
    y, grad, squares, matrix = products(quantized, jnp.asarray(X), jnp.asarray(cotangent))
    exact = expected_weight(WEIGHT, kind, double)
    np.testing.assert_allclose(y, X.astype(np.float64) @ exact, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(grad, cotangent.astype(np.float64) @ exact.T, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(squares, (exact**2).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(matrix, quantized.dequantize())


@pytest.mark.parametrize(
    ("weight_axes", "x_axes", "output_axes"),
    [
        (("embed", "heads"), ("batch", "length", None), None),
        (("heads", "embed"), ("batch", "length", "heads"), None),
        (("heads", "embed"), ("batch", "length", "heads"), ("batch", "residual_length", None)),
    ],
    ids=["outputs sharded", "inputs sharded", "sum scattered"],
)
def test_sharded_products_are_the_same(weight_axes, x_axes, output_axes):
    cotangent = draw(2, 4, NUM_OUTPUTS, seed=2)

    def compute(weight, x, cotangent):
        quantized = quantize(weight, "nf4", block_size=8, double=True)
        return products(quantized, x, cotangent, output_axes)

    expected = jax.jit(compute)(WEIGHT, X, cotangent)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    of_result = output_axes or (*x_axes[:2], weight_axes[1] if weight_axes[1] == "heads" else None)
    with jax.set_mesh(mesh):
        operands = [
            jax.device_put(array, named_sharding(mesh, axes))
            for array, axes in ((WEIGHT, weight_axes), (X, x_axes), (cotangent, of_result))
        ]
        found = jax.jit(compute)(*operands)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-4)


def test_no_whole_matrix_is_made():
    """Compiled for a matrix of 64 MiB in float32, a product and its gradient need little more than their results."""
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((2048, 8192)), "nf4", block_size=64, double=True))
    x = jax.ShapeDtypeStruct((8, 2048), jnp.float32)
    grad = jax.grad(lambda x, weight: jnp.sum(jnp.square(linear(x, weight, "float32"))))
    memory = jax.jit(grad).lower(x, weight).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 0.14 * 4 * 2048 * 8192
    assert memory.temp_size_in_bytes < 0.2 * 4 * 2048 * 8192
