"""Products of activations and weights: plain, adapted, quantized and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maxlm.config.mesh import MeshConfig
from maxlm.core import hardware
from maxlm.core.sharding import logical_to_spec, make_mesh, shard
from maxlm.ops.linear import AdaptedWeight, embed, linear, operand_dtype, unembed
from maxlm.ops.qtensor import quantize


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("leading", [(), (1, 1), (5,), (2, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
class TestLinear:
    def test_product(self, leading, dtype, tolerance):
        x, weight = draw(*leading, 24), draw(24, 16, seed=1)
        got = linear(jnp.asarray(x), jnp.asarray(weight), dtype)
        assert got.shape == (*leading, 16)
        assert got.dtype == jnp.float32
        x, weight = float64(x, weight)
        np.testing.assert_allclose(got, x @ weight, atol=tolerance * np.sqrt(24))

    def test_gradients(self, leading, dtype, tolerance):
        """d/dx sum(G * (x W)) = G W^T, and d/dW = x^T G, summed over all tokens."""
        x, weight, grad = draw(*leading, 24), draw(24, 16, seed=1), draw(*leading, 16, seed=2)
        loss = lambda x, weight: jnp.sum(grad * linear(x, weight, dtype))  # noqa: E731
        grad_x, grad_weight = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), jnp.asarray(weight))
        assert grad_x.dtype == grad_weight.dtype == jnp.float32
        x, weight, grad = float64(x, weight, grad)
        np.testing.assert_allclose(grad_x, grad @ weight.T, atol=tolerance * np.sqrt(16))
        tokens = x.reshape(-1, 24)
        expected = tokens.T @ grad.reshape(-1, 16)
        np.testing.assert_allclose(grad_weight, expected, atol=tolerance * np.sqrt(len(tokens)))

    def test_product_with_a_table(self, leading, dtype, tolerance):
        x, table, grad = draw(*leading, 24), draw(40, 24, seed=1), draw(*leading, 40, seed=2)
        loss = lambda x, table: jnp.sum(grad * unembed(x, table, dtype))  # noqa: E731
        got = unembed(jnp.asarray(x), jnp.asarray(table), dtype)
        grad_x, grad_table = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), jnp.asarray(table))
        x, table, grad = float64(x, table, grad)
        np.testing.assert_allclose(got, x @ table.T, atol=tolerance * np.sqrt(24))
        np.testing.assert_allclose(grad_x, grad @ table, atol=tolerance * np.sqrt(40))
        tokens = x.reshape(-1, 24)
        expected = grad.reshape(-1, 40).T @ tokens
        np.testing.assert_allclose(grad_table, expected, atol=tolerance * np.sqrt(len(tokens)))


def test_bfloat16_operands_accumulate_in_float32():
    """In bfloat16, 256 + 1 is 256: a bfloat16 sum of 1,024 ones would stop there."""
    ones = jnp.ones((1, 1024))
    assert linear(ones, jnp.ones((1024, 1)), "bfloat16")[0, 0] == 1024


def test_activations_keep_their_dtype():
    x, weight = jnp.asarray(draw(2, 8), jnp.bfloat16), jnp.asarray(draw(8, 4))
    assert linear(x, weight, "bfloat16").dtype == jnp.bfloat16
    grad_x, grad_weight = jax.grad(lambda x, w: linear(x, w, "bfloat16").sum().astype(jnp.float32), (0, 1))(x, weight)
    assert grad_x.dtype == jnp.bfloat16
    assert grad_weight.dtype == jnp.float32


class TestAdaptedWeight:
    def adapted(self):
        return AdaptedWeight(*(jnp.asarray(draw(*s, seed=i)) for i, s in enumerate([(24, 16), (24, 3), (3, 16)])), 0.5)

    def test_adapted_product_is_weight_plus_update(self):
        weight, x = self.adapted(), draw(2, 5, 24, seed=9)
        base, down, up = float64(weight.base, weight.down, weight.up)
        got = linear(jnp.asarray(x), weight, "float32")
        np.testing.assert_allclose(got, x.astype(np.float64) @ (base + 0.5 * down @ up), atol=1e-4)

    def test_gradients_reach_the_adapter(self):
        weight, x, grad = self.adapted(), draw(5, 24, seed=9), draw(5, 16, seed=8)
        grads = jax.grad(lambda weight: jnp.sum(grad * linear(jnp.asarray(x), weight, "float32")))(weight)
        x, grad, down, up = float64(x, grad, weight.down, weight.up)
        np.testing.assert_allclose(grads.down, 0.5 * x.T @ grad @ up.T, atol=1e-4)
        np.testing.assert_allclose(grads.up, 0.5 * (x @ down).T @ grad, atol=1e-4)

    def test_over_a_quantized_weight(self):
        weight, x = self.adapted(), jnp.asarray(draw(5, 24, seed=9))
        base = quantize(weight.base.T)
        got = linear(x, AdaptedWeight(base, weight.down, weight.up, 0.5), "float32")
        np.testing.assert_allclose(got, base.multiply(x) + 0.5 * x @ weight.down @ weight.up, atol=1e-4)


class TestQuantized:
    def test_weights_and_tables_are_multiplied_as_integers(self):
        x, weight = jnp.asarray(draw(3, 24)), jnp.asarray(draw(24, 16, seed=1))
        expected = quantize(weight.T).multiply(x)
        np.testing.assert_array_equal(linear(x, quantize(weight.T), "bfloat16"), expected)
        np.testing.assert_array_equal(unembed(x, quantize(weight.T), "bfloat16"), expected)

    def test_rows_of_a_table(self):
        table, tokens = draw(11, 8), jnp.asarray([[3, 0], [10, 3]])
        got = embed(quantize(jnp.asarray(table)), tokens, "bfloat16")
        assert got.dtype == jnp.bfloat16
        assert np.abs(np.asarray(got, np.float32) - table[np.asarray(tokens)]).max() < 0.02 * np.abs(table).max()


def test_embed_selects_rows():
    table, tokens = draw(11, 8), np.array([[3, 0], [10, 3]])
    np.testing.assert_array_equal(embed(jnp.asarray(table), jnp.asarray(tokens), "float32"), table[tokens])


@pytest.mark.parametrize("weight_axes", [("embed", "mlp"), ("mlp", "embed")])
def test_values_and_gradients_do_not_depend_on_mesh(weight_axes):
    """Fully sharded (the weight is gathered) and tensor parallel, along the output or the contraction."""
    x, weight, grad = draw(8, 4, 16), draw(16, 32, seed=1), draw(8, 4, 32, seed=2)

    def loss(x, weight, grad):
        x = shard(x, "batch", "length", "mlp" if weight_axes[0] == "mlp" else None)
        return jnp.sum(grad * shard(linear(x, weight, "float32"), "batch", "length", None))

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = value_and_grad(*map(jnp.asarray, (x, weight, grad)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, logical_to_spec(("batch", None, None)))
        placed = jax.device_put(weight, NamedSharding(mesh, logical_to_spec(weight_axes)))
        got = value_and_grad(jax.device_put(x, rows), placed, jax.device_put(grad, rows))
        assert got[1][1].sharding.spec == placed.sharding.spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize("product", [linear, unembed])
@pytest.mark.parametrize(
    ("fsdp", "gradient_sum", "expected"), [(8, "float32", 8 * 257), (8, "bfloat16", 8 * 256), (1, "bfloat16", 8 * 257)]
)
def test_dtype_in_which_gradients_are_summed_over_devices(product, fsdp, gradient_sum, expected):
    """A device's sum of 257 ones is 256 in bfloat16. Within a device all sums are float32."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    with jax.set_mesh(mesh):
        x, weight = shard(jnp.ones((8, 257, 8)), "batch", None, None), shard(jnp.ones((8, 8)), "embed", None)
        loss = lambda weight, x: jnp.sum(product(x, weight, "bfloat16", gradient_sum=gradient_sum))  # noqa: E731
        grad = jax.jit(jax.grad(loss))(weight, x)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"expert": 2, "context": 4},
        {"fsdp": 2, "expert": 2, "context": 2},
    ],
    ids=str,
)
def test_embedding_and_its_gradient_do_not_depend_on_mesh(sizes):
    table, tokens, grad = draw(16, 16), np.arange(64).reshape(8, 8) % 13, draw(8, 8, 16, seed=1)

    def loss(table, tokens, grad):
        x = shard(embed(table, tokens, "float32"), "batch", "length", None)
        return jnp.sum(grad * x), x

    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, logical_to_spec(axes)))  # noqa: E731
        placed = place(table, "vocab", "embed")
        arguments = placed, place(tokens, "batch", "length"), place(grad, "batch", "length", None)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments).compile()
        got_grad, x = compiled(*arguments)
    np.testing.assert_array_equal(x, table[tokens])
    assert got_grad.sharding.spec == placed.sharding.spec
    expected = np.zeros(table.shape)
    np.add.at(expected, tokens, np.asarray(grad, np.float64))
    np.testing.assert_allclose(got_grad, expected, atol=1e-6)
    # No device holds the whole table or its whole gradient.
    assert f"f32[{table.shape[0]},{table.shape[1]}]" not in compiled.as_text()


def test_embedding_gradient_is_summed_in_float32():
    """In bfloat16, 256 + 1 is 256: a bfloat16 sum of 1,024 ones would stop there."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, logical_to_spec(axes)))  # noqa: E731
        arguments = place(jnp.ones((4, 8)), "vocab", "embed"), place(jnp.ones((8, 128), int), "batch", "length")
        loss = lambda table, tokens: jnp.sum(embed(table, tokens, "bfloat16"), dtype=jnp.float32)  # noqa: E731
        grad = jax.jit(jax.grad(loss))(*arguments)
    assert np.asarray(grad)[1].tolist() == [1024] * 8


@pytest.mark.parametrize(
    ("flags", "xla_flags", "expected"),
    [
        ("fma avx2", "", "float32"),
        ("avx512f avx512_bf16", "", "bfloat16"),
        ("avx512f amx_bf16 amx_tile", "--xla_dump_to=x", "bfloat16"),
        ("avx512_bf16 amx_bf16", "--xla_cpu_max_isa=AVX2", "float32"),
        ("avx512_bf16 amx_bf16", "--xla_cpu_max_isa=AVX512_BF16", "bfloat16"),
    ],
)
def test_auto_uses_bfloat16_operands_if_the_processor_supports_them(monkeypatch, flags, xla_flags, expected):
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    monkeypatch.setattr(hardware.Path, "read_text", lambda path, encoding: f"processor : 0\nflags : {flags}\n")
    hardware._cpu_multiplies_bfloat16.cache_clear()
    try:
        x, weight = jnp.asarray(draw(3, 24)), jnp.asarray(draw(24, 16, seed=1))
        np.testing.assert_array_equal(linear(x, weight, "auto"), linear(x, weight, expected))
        assert operand_dtype("auto") == expected
    finally:
        hardware._cpu_multiplies_bfloat16.cache_clear()
