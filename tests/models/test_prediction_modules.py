"""Prediction modules against an independent implementation in numpy, and what their loss depends on."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import ahead_of_row, log_softmax, logits_of_row
from tiny_decoder import EXECUTION, VOCAB_SIZE

from maxlm.config import ModelConfig
from maxlm.core.batch import Batch, Stream, look_ahead
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten, unflatten
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.multi_token import with_modules, without_modules
from maxlm.models.regroup import unrolled
from maxlm.objectives.multi_token import MultiTokenPrediction

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
EXPERTS = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "dim": 12}
BUCKETS = {"buckets": 6, "max_distance": 10}
LATENT = {"kind": "mla", "num_heads": 2, "latent_dim": 8, "content_dim": 6, "rope_dim": 4, "value_dim": 5}
CONFIGS = {
    "two modules": {"layers": {"repeat": 2, "mixer": HEADS, "mlp": {"dim": 24}}, "multi_token": {"modules": 2}},
    "a layer of its own": {
        "tie_embeddings": False,
        "embedding_scale": 3.0,
        "logit_soft_cap": 5.0,
        "norm": {"placement": "around", "unit_offset": True},
        "layers": {"repeat": 2, "mixer": HEADS, "mlp": {"dim": 24}},
        "multi_token": {"layer": {"mixer": {**HEADS, "window": 2, "rope": {"theta": 300.0}}, "mlp": EXPERTS}},
    },
    "latent attention and experts": {
        "tie_embeddings": False,
        "layers": [
            {"repeat": 1, "mixer": LATENT, "mlp": {"dim": 24}},
            {"repeat": 1, "mixer": LATENT, "mlp": EXPERTS | {"scoring": "sigmoid", "router_bias": True}},
        ],
        "multi_token": {"modules": 1},
    },
    "a bias that layers share": {
        "layers": {"repeat": 2, "mixer": {**HEADS, "rope": None, "relative_bias": BUCKETS}, "mlp": {"dim": 24}},
        "multi_token": {"modules": 1},
    },
    "learned positions": {
        "norm": {"kind": "layer"},
        "learned_positions": 20,
        "layers": {"repeat": 1, "mixer": {**HEADS, "rope": None}, "mlp": {"kind": "plain", "dim": 20}},
        "multi_token": {"modules": 3},
    },
}
WEIGHT = 0.7
OBJECTIVE = MultiTokenPrediction(sources=[{"path": "nowhere"}], weight=WEIGHT, z_loss=0.1)
# Documents in one row, by length; then padding.
LENGTHS, LENGTH = (6, 1, 4, 2), 16


@cache
def make(name: str) -> Decoder:
    """Weights that are large enough to expose any difference."""
    config = ModelConfig.model_validate({"vocab_size": VOCAB_SIZE, "embed_dim": 16, **CONFIGS[name]})
    flat, random = flatten(initialize(Decoder(config, EXECUTION), jax.random.key(0))), np.random.default_rng(0)
    for path, leaf in flat.items():
        if "norm" in path:
            flat[path] = jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), "float32")
        elif path.endswith("bias"):
            flat[path] = jnp.asarray(random.normal(0, 0.2, leaf.shape), "float32")
        else:
            flat[path] = leaf * (30 if path in ("embedding", "head", "positions") else 1.5)
    return unflatten(flat, Decoder(config, EXECUTION))


@cache
def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens, one more than places in the row, and the loss weight of each target."""
    random = np.random.default_rng(1)
    return [
        (random.integers(0, VOCAB_SIZE, n + 1).astype(np.int32), random.uniform(0.2, 2, n).astype(np.float32))
        for n in LENGTHS
    ]


def packed(chosen, *, length=LENGTH, junk=5) -> Stream:
    """A row with these documents; `junk` is in its padding."""
    row = Stream(*(np.zeros((1, length), dtype) for dtype in ("int32", "int32", "float32", "int32", "int32")))
    row.tokens[:], row.targets[:], begin = junk, junk + 2, 0
    for segment, (tokens, weights) in enumerate(chosen, 1):
        place = slice(begin, begin + len(weights))
        row.tokens[0, place], row.targets[0, place], row.loss_weights[0, place] = tokens[:-1], tokens[1:], weights
        row.segment_ids[0, place], row.positions[0, place] = segment, np.arange(len(weights))
        begin = place.stop
    return row


@jax.jit
def outputs(model, stream):
    """log p of the targets of each module [modules, B, L], their loss weights, and all terms."""
    batch = Batch({"text": stream})
    applied = AppliedModel.of(model, batch)
    predicted = model.predict_ahead(applied.outputs["text"], stream)
    scores = [model.log_probabilities(output.hidden_BLD, ahead.targets)[0] for ahead, output in predicted]
    return jnp.stack(scores), jnp.stack([ahead.loss_weights for ahead, _ in predicted]), loss(model, stream)


def loss(model, stream):
    batch = Batch({"text": stream})
    return OBJECTIVE.compute_loss(AppliedModel.of(model, batch), batch)


def reference_sums(config, weights, chosen) -> list[tuple[float, float]]:
    """For the next token and for each module the weighted sum of cross-entropies, and of the weights: in float64, from
    each document alone."""
    count = config.multi_token.modules
    sums = np.zeros((count + 1, 2))
    for tokens, own in chosen:
        logits = [logits_of_row(config, weights, tokens[:-1]), *ahead_of_row(config, weights, tokens[:-1])]
        for distance, of_module in enumerate(logits):
            for i in range(len(own) - distance):
                # At place i a module knows the tokens up to i + distance, and predicts the one after them.
                weight = own[i + distance]
                sums[distance] += weight * np.array([-log_softmax(of_module[i])[tokens[i + distance + 1]], 1])
    return [tuple(pair) for pair in sums]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_term_matches_the_formula(name):
    model, chosen = make(name), documents()
    *_, output = outputs(model, packed(chosen))
    (main, weight), *ahead = reference_sums(model.config, flatten(model), chosen)
    np.testing.assert_allclose(output.terms["cross_entropy"].sum, main, rtol=1e-4)
    np.testing.assert_allclose(output.terms["cross_entropy"].weight, weight, rtol=1e-6)
    for number, (cross_entropy, weight) in enumerate(ahead, 1):
        term, metric = output.terms[f"ahead_{number}"], output.metrics[f"ahead_{number}_cross_entropy"]
        np.testing.assert_allclose(term.sum, WEIGHT / len(ahead) * cross_entropy, rtol=1e-4)
        np.testing.assert_allclose(metric.sum, cross_entropy, rtol=1e-4)
        assert term.weight == metric.weight == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_matches_finite_differences(name):
    model, chosen = make(name), documents()
    stream = packed(chosen)

    def ahead(model):
        terms = loss(model, stream).terms
        return sum(term.mean() for name, term in terms.items() if name.startswith("ahead"))

    gradient = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(jax.jit(jax.grad(ahead))(model)).items()}
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model).items()}

    def reference(moved):
        _, *sums = reference_sums(model.config, moved, chosen)
        return WEIGHT / len(sums) * sum(total / weight for total, weight in sums)

    parts = [list(flat), *({path} for path in flat if path.startswith("multi_token/0/")), {"embedding"}]
    for seed, paths in enumerate(parts):
        random = np.random.default_rng(seed)
        direction = {path: random.standard_normal(flat[path].shape) * (path in paths) for path in flat}
        step = 1e-5
        after, before = ({p: flat[p] + sign * step * direction[p] for p in flat} for sign in (1, -1))
        slope = (reference(after) - reference(before)) / (2 * step)
        along = sum((gradient[path] * direction[path]).sum() for path in paths)
        np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-4, err_msg=str(paths))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_is_predicted_alike_alone_and_packed(name):
    model, chosen = make(name), documents()
    scores, weights, _ = outputs(model, packed(chosen))
    begins = np.cumsum((0, *LENGTHS))
    for begin, document, length in zip(begins, chosen, LENGTHS):
        alone, own_weights, _ = outputs(model, packed([document], junk=9))
        for distance, (of_module, others) in enumerate(zip(scores, alone), 1):
            known = max(length - distance, 0)
            place = slice(begin, begin + known)
            np.testing.assert_allclose(of_module[0, place], others[0, :known], rtol=1e-5, atol=2e-5)
            np.testing.assert_array_equal(weights[distance - 1][0, place], document[1][distance:])
            # Nothing is predicted beyond the end of a document.
            assert not np.any(weights[distance - 1][0, begin + known : begin + length])
            assert not np.any(own_weights[distance - 1][0, known:])


def test_modules_do_not_see_the_tokens_that_they_predict():
    model, [(tokens, weights), *_] = make("two modules"), documents()
    scores, *_ = outputs(model, packed([(tokens, weights)]))
    changed = tokens.copy()
    changed[5] = (changed[5] + 1) % VOCAB_SIZE
    others, *_ = outputs(model, packed([(changed, weights)]))
    for distance in (1, 2):
        # The last place whose target is before token 5, and the place whose target it is.
        last = 5 - distance - 1
        np.testing.assert_array_equal(scores[distance - 1][0, :last], others[distance - 1][0, :last])
        assert scores[distance - 1][0, last] != others[distance - 1][0, last]


def test_looking_ahead_ends_with_the_document():
    row = packed(documents())
    for distance in (1, 2, 20):
        ahead = look_ahead(row, distance)
        for place in range(LENGTH):
            later = place + distance
            is_same = later < LENGTH and row.segment_ids[0, later] == row.segment_ids[0, place] > 0
            for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions"):
                kept = getattr(row, name)[0, later] if is_same else 0
                if is_same or name in ("segment_ids", "loss_weights"):
                    assert getattr(ahead, name)[0, place] == kept


def test_modules_change_nothing_else():
    model = make("two modules")
    main = without_modules(model)
    assert main.config.multi_token is None
    assert not any(path.startswith("multi_token") for path in flatten(main))
    tokens = packed(documents()).tokens
    np.testing.assert_array_equal(model.logits(model(tokens).hidden_BLD), main.logits(main(tokens).hidden_BLD))
    assert without_modules(main) is main
    key, wanted = jax.random.key(0), model.config.multi_token
    assert with_modules(main, None, key) is main
    assert with_modules(model, wanted, key) is model
    # New ones are those of a new model.
    new, drawn = flatten(with_modules(main, wanted, key)), flatten(initialize(Decoder(model.config, EXECUTION), key))
    for path, leaf in new.items():
        expected = drawn if path.startswith("multi_token") else flatten(main)
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_modules_are_kept_when_layers_are_regrouped():
    model = make("two modules")
    other = unrolled(model)
    stream = packed(documents())
    for left, right in zip(outputs(model, stream)[0], outputs(other, stream)[0]):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def test_label_smoothing_applies_to_every_prediction():
    model = make("two modules")
    batch = Batch({"text": packed(documents())})
    plain = AppliedModel.of(model, batch)
    smoothed = OBJECTIVE.compute_loss(replace(plain, label_smoothing=0.2), batch)
    for name, term in OBJECTIVE.compute_loss(plain, batch).terms.items():
        assert (smoothed.terms[name].sum != term.sum) == (name != "z_loss")
