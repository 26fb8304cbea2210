"""8-bit moments: quantization error, and the effect of stochastic rounding on small steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from declared import declared

from maxlm.core.parameters import Parameter, initialize, zeros
from maxlm.optim.adam8bit import (
    FIRST_CODES,
    FIRST_POWER,
    SECOND_CODES,
    SECOND_POWER,
    decode,
    encode,
    scale_by_adam8bit,
)

CODES = {
    "first": {"power": FIRST_POWER, "num_codes": FIRST_CODES},
    "second": {"power": SECOND_POWER, "num_codes": SECOND_CODES},
}


def values(name, shape=(2, 32, 48), seed=0):
    """Moments over six decades; the second moments are of the same values as the first."""
    random = np.random.default_rng(seed)
    x = random.choice([-1, 1], shape) * 10 ** random.uniform(-6, 0, shape)
    return x if name == "first" else x**2


@pytest.mark.parametrize("name", CODES)
def test_codes_are_nearest_to_formula(name):
    """With noise of one half, nearest to float64 scale * (code / largest)^power, for each tile of 16 by 16."""
    power, num_codes = CODES[name].values()
    x = values(name)
    x[0, :16, :16] *= 1e3
    codes, scale = encode(jnp.asarray(x, jnp.float32), jnp.full(x.shape, 0.5), **CODES[name])
    assert codes.dtype == (jnp.int8 if name == "first" else jnp.uint8)
    tiles = np.abs(x).reshape(2, 2, 16, 3, 16)
    np.testing.assert_allclose(scale, tiles.max((2, 4)), rtol=1e-6)
    table = (np.arange(num_codes + 1) / num_codes) ** power
    scales = np.repeat(np.repeat(np.float64(scale), 16, 1), 16, 2)
    nearest = np.abs(np.abs(x)[..., None] / scales[..., None] - table).argmin(-1)
    nearest = np.maximum(nearest, 1) if name == "second" else nearest * np.sign(x)
    # Where a value is almost half way, float32 may choose the other side.
    assert (np.abs(np.int64(codes) - nearest) > 0).mean() < 1e-3
    decoded = np.float64(decode(codes, scale, **CODES[name]))
    expected = np.sign(x) * table[np.abs(np.int64(codes))] * scales
    np.testing.assert_allclose(decoded, expected, rtol=1e-5)
    large = np.abs(x) > (1e-3 if name == "first" else 1e-4) * scales
    assert np.abs(decoded / x - 1)[large].max() < 0.13


@pytest.mark.parametrize("name", CODES)
def test_rounding_is_unbiased(name):
    x = jnp.asarray(values(name, (1, 16, 16)), jnp.float32)

    def once(key):
        return decode(*encode(x, jax.random.uniform(key, x.shape), **CODES[name]), **CODES[name])

    samples = np.float64(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 2000)))
    error, deviation = np.abs(samples.mean(0) - np.float64(x)), samples.std(0) / np.sqrt(2000)
    # The smallest second moments never reach zero and are excluded.
    seen = np.abs(x) > (0 if name == "first" else 1 / SECOND_CODES**SECOND_POWER) * np.abs(x).max()
    # Over 256 normal numbers, where both codes were drawn.
    assert (error < np.where(deviation > 0, 4.5 * deviation, 0.02 * np.abs(x)))[seen].all()


def test_representable_values_and_zeros_are_unchanged():
    codes = np.arange(-127, 129).clip(max=127).astype(np.int8).reshape(16, 16)
    scale = jnp.full((1, 1), 0.37)
    again, scale_again = encode(decode(codes, scale, **CODES["first"]), jnp.full((16, 16), 0.5), **CODES["first"])
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(scale_again, scale)
    for name in CODES:
        zeros = encode(jnp.zeros((16, 16)), jnp.zeros((16, 16)), **CODES[name])
        np.testing.assert_array_equal(decode(*zeros, **CODES[name]), 0)


def test_moments_without_gradients_decay_to_zero():
    """The first moment decays by a tenth per step: with rounding to nearest it would stop at 1e-3."""
    weights = {"w": jnp.zeros((32, 32))}
    optimizer = scale_by_adam8bit(declared(weights), 0.9, 0.95, 1e-8)
    update = jax.jit(optimizer.update)
    grad = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    state = optimizer.init(weights)
    for step in range(200):
        # The last row keeps the scale of its tile.
        _, state = update({"w": jnp.asarray(grad if step < 20 else grad * (np.arange(32) % 16 == 15)[:, None])}, state)
    moments = state["moments"]["w"]
    first = np.abs(decode(moments["first"], moments["first_scale"], **CODES["first"]))
    assert first[15::16].max() > 0.1
    assert first[:15].max() < 1e-6


def test_steps_are_close_to_adam():
    """With gradients that span three decades within each tile."""
    weights = {"w": jnp.zeros((32, 48))}
    optimizer = scale_by_adam8bit(declared(weights), 0.9, 0.95, 1e-8)
    update = jax.jit(optimizer.update)
    random = np.random.default_rng(0)
    scales = 10 ** random.uniform(-3, 0, (32, 48))
    state = optimizer.init(weights)
    first = second = 0.0
    for step in range(1, 31):
        grad = (random.standard_normal((32, 48)) + 0.5) * scales
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        expected = first / (1 - 0.9**step) / np.sqrt(second / (1 - 0.95**step))
        got, state = update({"w": jnp.asarray(grad, jnp.float32)}, state)
    error = np.float64(got["w"]) - expected
    assert np.sqrt((error**2).mean()) < 0.2 * np.sqrt((expected**2).mean())
    assert abs((error * np.sign(expected)).mean()) < 0.01


def test_state_takes_two_bytes_per_matrix_entry_and_eight_per_vector_entry():
    plan = {
        "w": Parameter((4, 64, 64), ("layers", "embed", "mlp"), zeros, role="matrix"),
        "norm": Parameter((4, 64), ("layers", "norm"), zeros, role="norm"),
    }
    state = scale_by_adam8bit(plan, 0.9, 0.95, 1e-8).init(initialize(plan, jax.random.key(0)))
    sizes = {path: sum(leaf.nbytes for leaf in leaves.values()) for path, leaves in state["moments"].items()}
    assert sizes == {"w": 4 * 64 * 64 * (2 + 2 * 4 / 256), "norm": 4 * 64 * 8}
