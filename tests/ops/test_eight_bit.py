"""8-bit training products: exact integer arithmetic, straight-through gradients, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maxlm.config.mesh import MeshConfig
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import logical_to_spec, make_mesh, shard
from maxlm.errors import ConfigError
from maxlm.ops.eight_bit import scale_to
from maxlm.ops.linear import AdaptedWeight, linear
from maxlm.train.layout import check_precision


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """int8 along an axis, in float64."""
    x = np.asarray(x, np.float64)
    scales = np.float64(np.abs(x).max(axis=axis, keepdims=True).astype(np.float32) / np.float32(127))
    return np.round(x / scales) * scales


def product_and_gradients(kind, x, weight, grad):
    loss = lambda x, weight: jnp.sum(grad * linear(x, weight, kind))  # noqa: E731
    return linear(x, weight, kind), *jax.grad(loss, (0, 1))(x, weight)


def test_int8_products_match_rounded_operands():
    """y = Q(x) Q(W); dx = Q(dy) Q(W^T), each rounded along the contraction; dW = x^T dy, rounded only to bfloat16."""
    x, weight, grad = draw(6, 5, 32), draw(32, 24, seed=1), draw(6, 5, 24, seed=2)
    got, grad_x, grad_weight = product_and_gradients("int8", jnp.asarray(x), jnp.asarray(weight), grad)
    np.testing.assert_allclose(got, rounded(x, -1) @ rounded(weight, 0), atol=2e-5)
    np.testing.assert_allclose(grad_x, rounded(grad, -1) @ rounded(weight, 1).T, atol=2e-5)
    bfloat16 = lambda a: np.asarray(jnp.asarray(a).astype(jnp.bfloat16), np.float64)  # noqa: E731
    expected = bfloat16(x).reshape(-1, 32).T @ bfloat16(grad).reshape(-1, 24)
    np.testing.assert_allclose(grad_weight, expected, atol=2e-4)


@pytest.mark.parametrize(("kind", "bounds"), [("int8", (0.012, 0.012, 0.005)), ("fp8", (0.045, 0.07, 0.005))])
def test_product_error_matches_8_bits(kind, bounds):
    """Relative to the norm of the result.

    With m bits after the leading one, the RMS error of a value is about 2^-(m+1) / (sqrt(3) sqrt(2)): 0.026 in
    e4m3 and 0.051 in e5m2, so 0.036 for a product of two e4m3 and 0.057 for one with e5m2.
    """
    x, weight, grad = draw(64, 256), draw(256, 128, seed=1), draw(64, 128, seed=2)
    got = product_and_gradients(kind, jnp.asarray(x), jnp.asarray(weight), grad)
    exact = (x @ weight, grad @ weight.T, x.T @ grad)
    for value, wanted, bound in zip(got, exact, bounds):
        error = np.linalg.norm(value - wanted) / np.linalg.norm(wanted)
        assert 1e-4 < error < bound


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_and_outliers_stay_finite(kind):
    x = np.zeros((4, 16), np.float32)
    x[1, 3], x[2] = 1e30, 1e-40
    got, grad_x, grad_weight = product_and_gradients(kind, jnp.asarray(x), jnp.asarray(draw(16, 8)), draw(4, 8, seed=3))
    assert all(np.isfinite(value).all() for value in (got, grad_x, grad_weight))
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_array_equal(scale_to(jnp.zeros((2, 3)), -1, jnp.dtype(jnp.int8)).scales, 1)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=["column", "row"])
def test_mesh_changes_nothing(sizes, axes):
    """Scales are of whole rows and columns, also if the contracted axis is sharded."""
    x, weight, grad = draw(8, 8, 32), draw(32, 16, seed=1), draw(8, 8, 16, seed=2)
    alone = product_and_gradients("int8", jnp.asarray(x), jnp.asarray(weight), grad)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    in_axes = ("batch", "length", None if axes[0] == "embed" else axes[0])
    with jax.set_mesh(mesh):
        put = lambda a, axes: jax.device_put(a, NamedSharding(mesh, logical_to_spec(axes)))  # noqa: E731
        output_axes = ("batch", "residual_length", None) if axes[0] == "mlp" else None

        @jax.jit
        def compute(x, weight, grad):
            def loss(x, weight):
                y = linear(x, weight, "int8", output_axes)
                return jnp.sum(shard(grad, "batch", "length", None) * shard(y, "batch", "length", None)), y

            (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weight)
            return y, *grads

        sharded = compute(put(x, in_axes), put(weight, axes), put(grad, ("batch", None, None)))
    for name, a, b in zip(("y", "dx", "dW"), alone, sharded):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-4 if name == "dW" else 1e-5, err_msg=name)


def test_adapters_on_an_8_bit_base_are_not_rounded():
    x, base, down, up = draw(4, 32), draw(32, 24, seed=1), draw(32, 4, seed=2), draw(4, 24, seed=3)
    got = linear(jnp.asarray(x), AdaptedWeight(jnp.asarray(base), jnp.asarray(down), jnp.asarray(up), 0.5), "int8")
    base_alone = linear(jnp.asarray(x), jnp.asarray(base), "int8")
    update = linear(linear(jnp.asarray(x), jnp.asarray(down), "bfloat16"), jnp.asarray(up), "bfloat16")
    np.testing.assert_allclose(got, base_alone + 0.5 * update, rtol=1e-6, atol=1e-5)


def test_fp8_is_rejected_on_devices_without_it(tmp_path):
    config = TrainConfig(
        kind="train",
        output=str(tmp_path),
        model={},
        execution={"eight_bit": "fp8"},
        objective={"kind": "pretrain", "sources": [{"path": "x"}]},
    )
    with pytest.raises(
        ConfigError, match=r"execution\.eight_bit: fp8 needs fp8 matrix units, .* cpu has none; set int8"
    ):
        check_precision(config, jax.devices()[0])
