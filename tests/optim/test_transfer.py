"""Learning-rate transfer over widths: the change of activations per step does not grow with the width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_section import uniform
from tiny_decoder import text_loss

from maxlm.config import ModelConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.batch import Stream
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer

WIDTHS = (32, 256)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 17)).astype("int32")
BATCH = Stream(
    TOKENS[:, :-1],
    TOKENS[:, 1:],
    np.ones((4, 16), "float32"),
    np.ones((4, 16), "int32"),
    np.tile(np.arange(16, dtype="int32"), (4, 1)),
)


@functools.cache
def decoder(width, base, seed=0):
    section = uniform(
        vocab_size=64,
        embed_dim=width,
        base_embed_dim=base,
        mlp_dim=2 * width,
        num_heads=width // 8,
        num_kv_heads=width // 8,
        head_dim=8,
    )
    config = ModelConfig(**section)
    execution = ExecutionConfig(activation_dtype="float32", matmul_dtype="float32")
    return initialize(Decoder(config, execution), jax.random.key(seed))


@jax.jit
def gradient_and_activations(model):
    """Compiled once for all optimizers."""

    def loss(model):
        output = text_loss(model, BATCH)
        hidden = model(BATCH.tokens).hidden_BLD
        return sum(term.mean() for term in output.terms.values()), (hidden, model.logits(hidden))

    return jax.grad(loss, has_aux=True)(model)


def change_of(width, base, config, steps, seed):
    """RMS change of the final hidden states, and of the logits, after steps on one batch."""
    model = decoder(width, base, seed)
    optimizer = make_optimizer(config, Decoder(model.config), width=model.config.width)

    @jax.jit
    def update(model, state, grads):
        updates, state = optimizer.update(grads, state, model)
        return optimizer.apply_updates(model, updates, 1.0, 0), state

    state, seen = jax.jit(optimizer.init)(model), []
    for step in range(steps + 1):
        grads, activations = gradient_and_activations(model)
        seen.append(activations)
        if step < steps:
            model, state = update(model, state, grads)
    return [float(jnp.sqrt(jnp.mean((last - first) ** 2))) for first, last in zip(seen[0], seen[-1])]


def slopes(kind, learning_rate, base, *, steps=3):
    """Exponents of the width in the change of hidden states and logits: the mean over two draws of the weights, since
    those of one draw vary by 0.1."""
    config = OptimConfig(
        kind=kind, learning_rate=learning_rate, muon_learning_rate=learning_rate, weight_decay=0, clip_norm=None
    )
    changes = [[np.log(change_of(width, base, config, steps, seed)) for width in WIDTHS] for seed in range(2)]
    return np.polyfit(np.log(WIDTHS), np.mean(changes, axis=0), 1)[0]


# Small rates, so that the change is far from saturation: two unit vectors are at most 2 apart.
def test_activation_change_does_not_depend_on_width():
    hidden, logits = slopes("adamw", 1e-4, 32)
    assert abs(hidden) < 0.1
    # A random table maps the change to one that decreases with the square root of the width.
    assert -0.5 < logits < 0.1
    hidden, logits = slopes("adamw", 1e-4, None)
    assert hidden > 0.4, "the check detects the missing rule"
    assert logits > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "rate"), [("muon", 2e-4), ("sgd", 0.01), ("adam8bit", 1e-4)])
def test_activation_change_does_not_depend_on_width_for_other_optimizers(kind, rate):
    hidden, logits = slopes(kind, rate, 32)
    assert abs(hidden) < 0.15
    assert -0.5 < logits < 0.1
    _, logits = slopes(kind, rate, None)
    assert logits > 0.5


def test_base_width_only_changes_scale_of_logits():
    model, base, wide = (decoder(64, base) for base in (None, 64, 16))
    hidden = model(BATCH.tokens).hidden_BLD
    np.testing.assert_array_equal(base.logits(base(BATCH.tokens).hidden_BLD), model.logits(hidden))
    np.testing.assert_allclose(wide.logits(hidden), model.logits(hidden) / 4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "hidden", "rest"),
    [("adamw", 0.25, 1), ("lion", 0.25, 1), ("adafactor", 0.25, 1), ("muon", 1, 1), ("sgd", 1, 4)],
)
def test_learning_rates_scale_with_width(kind, hidden, rest):
    """Decay does not: old values shrink at the same rate at all widths."""
    params = decoder(32, None)
    grads = jax.tree.map(jnp.ones_like, params)

    def update(width, decay):
        config = OptimConfig(kind=kind, learning_rate=0.01, muon_learning_rate=0.01, weight_decay=decay, clip_norm=None)
        optimizer = make_optimizer(config, Decoder(params.config), width=width)
        return flatten(jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params)[0])())

    one, four, decayed = update(1.0, 0.0), update(4.0, 0.0), update(4.0, 0.5)
    for path, value in flatten(params).items():
        is_hidden = path.startswith("layers/") and "norm" not in path
        np.testing.assert_allclose(four[path], one[path] * (hidden if is_hidden else rest), rtol=1e-5, err_msg=path)
        moved = decayed[path] - four[path]
        expected = 0 if "norm" in path else -0.01 * 0.5 * value
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-8, err_msg=path)
