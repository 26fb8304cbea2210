"""int8 weights and two-digit activations: stored values, error bounds, and exact integer products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops.qtensor import QTensor, quantize, split

# Row magnitudes over six decades, since those of real layers vary too.
ROW_SIZES = np.logspace(-3, 3, 7)[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference_digits(x):
    """Both digits [2, ..., I] and the scales of x in float64."""
    x = x.astype(np.float64)
    scales = np.abs(x).max(axis=-1, keepdims=True) / 127
    high = np.round(x / scales)
    return np.stack([high, np.clip(np.round((x / scales - high) * 256), -127, 127)]), scales[..., 0]


class TestQuantize:
    def test_follows_the_formula(self):
        x = draw(7, 33) * ROW_SIZES.astype(np.float32)
        got = quantize(jnp.asarray(x))
        scales = np.abs(x.astype(np.float64)).max(axis=-1) / 127
        np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
        np.testing.assert_array_equal(got.values, np.round(x.astype(np.float64) / scales[:, None]))
        assert got.values.dtype == jnp.int8
        assert got.scales.dtype == jnp.float32

    def test_error_is_at_most_half_a_step(self):
        x = draw(7, 1000) * ROW_SIZES.astype(np.float32)
        got = quantize(jnp.asarray(x))
        error = np.abs(x - np.asarray(got.dequantize(), np.float64))
        assert (error <= np.asarray(got.scales)[:, None] * 0.5 * (1 + 1e-4)).all()
        assert error.max(axis=-1) == pytest.approx(np.asarray(got.scales) * 0.5, rel=0.1)

    def test_the_largest_value_of_a_row_is_kept(self):
        x = draw(5, 64)
        got = np.asarray(quantize(jnp.asarray(x)).dequantize())
        largest = np.abs(x).argmax(axis=-1)
        np.testing.assert_allclose(got[range(5), largest], x[range(5), largest], rtol=1e-6)

    def test_is_symmetric(self):
        x = jnp.asarray(draw(5, 64))
        np.testing.assert_array_equal(quantize(-x).values, -quantize(x).values)
        assert int(quantize(x).values.min()) >= -127

    def test_zeros_stay_zeros(self):
        got = quantize(jnp.zeros((3, 8)))
        assert not got.values.any()
        np.testing.assert_array_equal(got.dequantize(), np.zeros((3, 8)))

    @pytest.mark.parametrize("size", [1e-45, 2e-43, 1e-40, 1e-38, 3e38])
    def test_extreme_rows_do_not_wrap_around(self, size):
        x = jnp.asarray(np.array([[1, -1, 0.5, -0.5]], np.float64) * size, jnp.float32)
        values = np.asarray(quantize(x).values)
        assert (np.sign(values) * np.sign(np.asarray(x)) >= 0).all()

    def test_non_finite_values_stay_non_finite(self):
        weight = quantize(jnp.asarray(draw(3, 4)))
        for bad in (np.nan, np.inf):
            got = weight.multiply(jnp.asarray([[1.0, bad, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]]))
            assert np.isnan(got[0]).all()
            assert np.isfinite(got[1]).all()


class TestSplit:
    def test_follows_the_formula(self):
        x = draw(7, 33) * ROW_SIZES.astype(np.float32)
        got, (digits, scales) = split(jnp.asarray(x)), reference_digits(x)
        np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
        np.testing.assert_array_equal(got.values[0], digits[0])
        # float32 leaves two decimal digits of a step for the low digit: half-way values may round to either side.
        assert np.abs(np.asarray(got.values[1], np.float64) - digits[1]).max() <= 1
        assert (np.asarray(got.values[1]) == digits[1]).mean() > 0.95
        assert got.values.dtype == jnp.int8

    def test_error_is_at_most_a_32000th_of_the_largest_value(self):
        x = draw(7, 1000) * ROW_SIZES.astype(np.float32)
        got = split(jnp.asarray(x))
        values = np.asarray(got.values, np.float64)
        restored = (values[0] + values[1] / 256) * np.asarray(got.scales, np.float64)[:, None]
        largest = np.abs(x).max(axis=-1, keepdims=True)
        assert (np.abs(restored - x) <= largest / 32_512 * 1.01).all()

    @pytest.mark.parametrize("size", [1e-45, 2e-43, 1e-40, 1e-38, 3e38])
    def test_extreme_rows_do_not_wrap_around(self, size):
        x = jnp.asarray(np.array([[1, -1, 0.5, -0.5]], np.float64) * size, jnp.float32)
        high, low = np.asarray(split(x).values, np.int64)
        assert ((high + low / 256) * np.sign(np.asarray(x)) >= 0).all()
        assert np.abs([high, low]).max() <= 127


class TestMultiply:
    @pytest.mark.parametrize("leading", [(), (1,), (2,), (5,), (1, 1), (3, 1), (1, 4), (2, 3), (2, 1, 3)])
    def test_equals_integer_arithmetic(self, leading):
        x, weight = jnp.asarray(draw(*leading, 48)), quantize(jnp.asarray(draw(20, 48, seed=1)))
        got = jax.jit(lambda w, x: w.multiply(x))(weight, x)
        digits = split(x)
        high, low = np.asarray(digits.values, np.int64) @ np.asarray(weight.values, np.int64).T
        scales = np.asarray(digits.scales, np.float64)[..., None] * np.asarray(weight.scales, np.float64)
        assert got.shape == (*leading, 20)
        np.testing.assert_allclose(got, (high + low / 256) * scales, rtol=5e-7, atol=1e-7 * np.abs(high * scales).max())

    def test_equals_the_product_with_the_dequantized_weight(self):
        """In float64: the rounding error of the activations is a thousandth of that of plain int8."""
        x = draw(64, 256) * np.float32(10.0) ** np.arange(-2, 2)[np.arange(64) % 4, None]
        weight = quantize(jnp.asarray(draw(32, 256, seed=1)))
        exact = x.astype(np.float64) @ np.asarray(weight.dequantize(), np.float64).T
        error = np.asarray(weight.multiply(jnp.asarray(x))) - exact
        assert (np.sqrt((error**2).mean(axis=-1)) < 5e-5 * np.sqrt((exact**2).mean(axis=-1))).all()

    @pytest.mark.parametrize("rows", [1, 2, 64])
    def test_sums_are_exact_where_float32_sums_are_not(self, rows):
        """4,097 products of 127 * 127 exceed 2^24; a float32 sum loses the odd one at the end."""
        features = 4097
        row = np.full(features, 127, np.int8)
        row[-1] = 1
        ones = jnp.ones((), jnp.float32)
        weight = QTensor(jnp.asarray(np.stack([row, -row])), jnp.broadcast_to(ones, 2))
        x = jnp.asarray(np.broadcast_to(row, (rows, features)), jnp.float32)
        exact = 127 * 127 * (features - 1) + 1
        assert exact > 2**24
        got = jax.jit(lambda w, x: w.multiply(x).astype(jnp.float32))(weight, x)
        np.testing.assert_array_equal(got, np.broadcast_to(np.float32([exact, -exact]), (rows, 2)))

    def test_activations_keep_their_dtype(self):
        weight = quantize(jnp.asarray(draw(6, 8)))
        for dtype in (jnp.float32, jnp.bfloat16):
            assert weight.multiply(jnp.asarray(draw(2, 8), dtype)).dtype == dtype

    def test_a_token_does_not_depend_on_its_neighbors(self):
        x, weight = draw(4, 3, 32), quantize(jnp.asarray(draw(16, 32, seed=1)))
        x[1] *= 1e4
        whole = np.asarray(weight.multiply(jnp.asarray(x)))
        for index in np.ndindex(4, 3):
            np.testing.assert_allclose(weight.multiply(jnp.asarray(x[index])), whole[index], rtol=5e-7)

    def test_a_zero_token_gives_zeros(self):
        weight = quantize(jnp.asarray(draw(6, 8)))
        x = jnp.asarray(draw(2, 8)).at[0].set(0)
        np.testing.assert_array_equal(weight.multiply(x)[0], np.zeros(6))

    def test_stacked_layers_under_scan_and_vmap(self):
        weights = quantize(jnp.asarray(draw(3, 16, 16)))
        x = jnp.asarray(draw(2, 5, 16, seed=1))
        expected = [QTensor(weights.values[i], weights.scales[i]).multiply(x) for i in range(3)]

        _, scanned = jax.lax.scan(lambda carry, w: (carry, w.multiply(x)), None, weights)
        np.testing.assert_array_equal(scanned, expected)
        np.testing.assert_array_equal(jax.vmap(lambda w: w.multiply(x))(weights), expected)
        over_rows = jax.vmap(jax.vmap(lambda row: QTensor(weights.values[0], weights.scales[0]).multiply(row)))(x)
        np.testing.assert_array_equal(over_rows, expected[0])

    def test_is_close_to_the_float_product(self):
        x, weight = draw(64, 256), draw(32, 256, seed=1)
        got = np.asarray(quantize(jnp.asarray(weight)).multiply(jnp.asarray(x)))
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        assert np.sqrt(np.mean((got - exact) ** 2)) < 0.01 * exact.std()


def test_rows_match_the_dequantized_table():
    table = quantize(jnp.asarray(draw(11, 8)))
    index = jnp.asarray([[0, 10, 3], [3, 3, 1]])
    np.testing.assert_array_equal(table.rows(index), np.asarray(table.dequantize())[np.asarray(index)])
