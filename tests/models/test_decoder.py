"""The decoder against an independent one in numpy, and invariances of its results."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import layers_in_order, log_softmax, logits_of_row
from tiny_decoder import EXECUTION, VOCAB_SIZE, drawn_model, text_loss, tiny_config

from maxlm.config import ModelConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.batch import Stream
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.layers.cache import Cache, KeyValueCache, RingCache
from maxlm.layers.stack import write_row
from maxlm.models.decoder import Decoder

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
LOCAL = {"mixer": {**SIZES, "window": 3, "rope": {"theta": 500.0}}, "mlp": {"dim": 24}}
GLOBAL = {"mixer": {**SIZES, "head_dim": 8, "num_kv_heads": 1, "rope": {"theta": 1e6}, "qk_norm": True}}
EXPERTS = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "dim": 12}
# Groups, patterns, rows of equal layers, two bases of RoPE and none, dense layers and experts.
MIXED = {
    "vocab_size": VOCAB_SIZE,
    "embed_dim": 16,
    "tie_embeddings": False,
    "logit_soft_cap": 8.0,
    "layers": [
        {"repeat": 1, "mixer": {**SIZES, "rope": None}, "mlp": {"dim": 20}},
        {"repeat": 2, "pattern": [{"times": 2, **LOCAL}, {**GLOBAL, "mlp": EXPERTS}]},
        {
            "repeat": 2,
            "mixer": {**SIZES, "window": 5, "soft_cap": 3.0},
            "mlp": EXPERTS
            | {"scoring": "sigmoid", "routed_scaling": 1.5, "num_shared_experts": 1, "router_bias": True},
        },
    ],
}

# LayerNorm, a recurrent mixer, an MLP with biases, ALiBi.
HYBRID = {
    "vocab_size": VOCAB_SIZE,
    "embed_dim": 16,
    "norm": {"kind": "layer"},
    "layers": {
        "repeat": 2,
        "pattern": [
            {"times": 2, "mixer": {"kind": "gru", "dim": 12}, "mlp": {"kind": "plain", "dim": 24}},
            {"mixer": {**SIZES, "window": 4, "rope": None, "alibi": True}, "mlp": {"kind": "plain", "dim": 20}},
            {"mixer": {**SIZES, "num_heads": 6, "rope": None, "alibi": True, "alibi_scale": 0.3, "soft_cap": 3.0}},
        ],
    },
}

# What the layers of other families than Llama are made of.
BIASED = {**SIZES, "bias": True, "out_bias": True, "rope": {"theta": 300.0, "share": 0.5}}
GPT_OSS_EXPERTS = EXPERTS | {"bias": True, "swiglu_limit": 0.9, "router_logit_bias": True}
PLAIN = {"kind": "plain", "dim": 24}
# LaMDA's: a bias by distance that all layers share, and gated GELU.
RELATIVE = {**SIZES, "rope": None, "relative_bias": {"buckets": 6, "max_distance": 10}}
GELU = {"dim": 24, "activation": "gelu"}
FAMILIES = {
    "norms around, unit offset": {
        "norm": {"placement": "around", "unit_offset": True},
        "embedding_scale": 3.0,
        "layers": {"repeat": 2, "mixer": {**LOCAL["mixer"], "scale": 0.4}, "mlp": {"dim": 24}},
    },
    "norms after": {"norm": {"placement": "after"}, "layers": {"repeat": 2, "mixer": BIASED, "mlp": {"dim": 24}}},
    "norms of all heads together": {
        "layers": {"repeat": 2, "mixer": BIASED | {"qk_norm": True, "qk_norm_over": "all_heads"}, "mlp": {"dim": 24}},
    },
    "normalized head": {
        "tie_embeddings": False,
        "normalized_head": True,
        "layers": {"repeat": 2, "mixer": SIZES, "mlp": {"dim": 24}},
    },
    "shared experts with a gate": {
        "layers": {
            "repeat": 2,
            "mixer": SIZES,
            "mlp": EXPERTS | {"num_shared_experts": 2, "shared_dim": 10, "shared_gate": True},
        },
    },
    "sinks, and experts with biases": {
        "layers": {
            "repeat": 2,
            "pattern": [
                {"mixer": BIASED | {"sinks": True, "window": 3}, "mlp": GPT_OSS_EXPERTS},
                {"mixer": BIASED | {"sinks": True}, "mlp": GPT_OSS_EXPERTS | {"swiglu_limit": None}},
            ],
        },
    },
    "virtual tokens": {
        "layers": {
            "repeat": 2,
            "pattern": [
                {"mixer": BIASED | {"virtual_tokens": 3, "window": 3, "sinks": True, "soft_cap": 3.0}, "mlp": PLAIN},
                {"mixer": {**SIZES, "virtual_tokens": 2, "rope": None, "alibi": True, "qk_norm": True}, "mlp": PLAIN},
            ],
        },
    },
    "normalized residual with a factor": {
        "norm": {"kind": "layer"},
        "residual": "normalized",
        "residual_factor": 1.7,
        "layers": {"repeat": 2, "mixer": BIASED, "mlp": PLAIN},
    },
    "relative bias": {
        "layers": {
            "repeat": 2,
            "pattern": [{"mixer": RELATIVE, "mlp": GELU}, {"mixer": RELATIVE | {"window": 5, "num_kv_heads": 4}}],
        },
    },
    "parallel": {
        "norm": {"kind": "layer"},
        "residual": "parallel",
        "learned_positions": 20,
        "layers": {"repeat": 2, "mixer": BIASED | {"rope": None}, "mlp": PLAIN},
    },
    "parallel with one norm": {
        "norm": {"kind": "layer", "bias": False},
        "residual": "parallel_one_norm",
        "embedding_norm": True,
        "layers": {
            "repeat": 2,
            "mixer": BIASED | {"rope": {"share": 0.5, "scaling": {"kind": "linear", "factor": 3.0}}},
            "mlp": PLAIN,
        },
    },
}

# Wavelengths by the length of a document; documents of the tests are shorter and longer than the original length.
SCALINGS = {
    "dynamic": {"kind": "dynamic", "factor": 2.0, "original_length": 6},
    "longrope": {
        "kind": "longrope",
        "original_length": 5,
        "short_factors": [1.0, 1.3],
        "long_factors": [1.5, 4.0],
        "attention_factor": 1.2,
    },
}
FAMILIES |= {
    name: {"layers": {"repeat": 2, "mixer": {**SIZES, "rope": {"theta": 100.0, "scaling": scaling}}}}
    for name, scaling in SCALINGS.items()
}

VARIANTS = {
    "plain": {},
    "multi-head": {"num_kv_heads": 4},
    "one key-value head, head_dim * heads not embed_dim": {"num_kv_heads": 1, "head_dim": 8},
    "untied": {"tie_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "soft caps": {"attention_soft_cap": 1.5, "logit_soft_cap": 2.0},
    "windows": {"num_layers": 4, "window_pattern": (3, None)},
    "one window": {"window_pattern": (2,), "rope_theta": 500.0, "norm_epsilon": 1e-2},
    "all": {
        "num_layers": 3,
        "window_pattern": (4, None, 2),
        "qk_norm": True,
        "attention_soft_cap": 3.0,
        "logit_soft_cap": 5.0,
        "tie_embeddings": False,
    },
}


# Latent attention, with compressed queries and without; groups of experts.
GROUPED = {"kind": "moe", "num_experts": 8, "experts_per_token": 3, "dim": 12, "num_groups": 4, "groups_per_token": 2}
LATENT = {"kind": "mla", "num_heads": 4, "latent_dim": 8, "content_dim": 6, "rope_dim": 4, "value_dim": 5}
LATENT_MODEL = {
    "vocab_size": VOCAB_SIZE,
    "embed_dim": 16,
    "layers": [
        {"repeat": 1, "mixer": LATENT | {"query_rank": 10, "bias": True, "scale": 0.4}, "mlp": {"dim": 24}},
        {"repeat": 2, "mixer": LATENT, "mlp": GROUPED},
        {
            "repeat": 2,
            "mixer": LATENT | {"query_rank": 6},
            "mlp": GROUPED | {"group_score": "best_two", "scoring": "sigmoid", "router_bias": True},
        },
    ],
}

CONFIGS = {name: tiny_config(**changes) for name, changes in VARIANTS.items()}
CONFIGS |= {"mixed": ModelConfig(**MIXED), "hybrid": ModelConfig(**HYBRID), "latent": ModelConfig(**LATENT_MODEL)}
CONFIGS |= {
    name: ModelConfig.model_validate({"vocab_size": VOCAB_SIZE, "embed_dim": 16} | family)
    for name, family in FAMILIES.items()
}


@cache
def make(config="plain", execution=EXECUTION) -> Decoder:
    """`drawn_model` of a configuration, or of the variant of this name."""
    return drawn_model(CONFIGS.get(config, config), execution)


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


@jax.jit
def logits(model, tokens, **arguments):
    return model.logits(model(tokens, **arguments).hidden_BLD)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_formula(name):
    model, tokens = make(name), tokens_of((2, 9))
    expected = np.stack([logits_of_row(model.config, flatten(model), row) for row in tokens])
    assert np.ptp(expected) > 1, "trivial weights would pass any test"
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["windows", "all", "mixed", "latent", *FAMILIES])
def test_packed_rows_match_formula(name):
    model, tokens = make(name), tokens_of((1, 12))
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32)
    expected = logits_of_row(model.config, flatten(model), tokens[0], positions[0], segments[0])
    got = logits(model, tokens, positions_BL=positions, segment_ids_BL=segments)
    np.testing.assert_allclose(got[0, :9], expected[:9], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "all", "mixed", "latent", *FAMILIES])
def test_gradient_matches_finite_differences(name):
    """Finite differences of the float64 formula, along random directions through all weights at once."""
    model, tokens = make(name), tokens_of((1, 7))
    targets, weights = tokens_of((1, 7), seed=1), np.array([[1, 1, 0, 1, 0.5, 1, 1]], np.float32)
    ones = np.ones_like(tokens)
    batch = Stream(tokens, targets, weights, ones, np.arange(7, dtype=np.int32)[None])

    def loss(model):
        term = text_loss(model, batch).terms["cross_entropy"]
        return term.sum / term.weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    gradient = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(gradient).items()}
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model).items()}

    def reference(moved):
        scores = log_softmax(logits_of_row(model.config, moved, tokens[0]))
        return -(weights[0] * scores[np.arange(7), targets[0]]).sum() / weights.sum()

    np.testing.assert_allclose(value, reference(flat), rtol=1e-5)
    for seed, paths in enumerate([list(flat), *[[path] for path in flat]]):
        random = np.random.default_rng(seed)
        direction = {path: random.standard_normal(flat[path].shape) * (path in paths) for path in flat}
        step = 1e-5
        ahead, behind = ({p: flat[p] + sign * step * direction[p] for p in flat} for sign in (1, -1))
        slope = (reference(ahead) - reference(behind)) / (2 * step)
        along = sum((gradient[path] * direction[path]).sum() for path in paths)
        np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-4, err_msg=str(paths))


@jax.jit
def log_probabilities(model, batch: Stream):
    hidden = model(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids).hidden_BLD
    return model.log_probabilities(hidden, batch.targets)[0]


@pytest.mark.parametrize("name", ["plain", "windows", "all", "mixed", "latent"])
def test_packing_changes_nothing(name):
    """A document has the same log-probabilities alone, after another document, and before padding."""
    model = make(name)
    lengths = (5, 8, 3)
    documents = [tokens_of(length + 1, seed) for seed, length in enumerate(lengths)]
    packed = Stream(
        tokens=np.concatenate([d[:-1] for d in documents])[None],
        targets=np.concatenate([d[1:] for d in documents])[None],
        loss_weights=np.ones((1, 16), np.float32),
        segment_ids=np.repeat([1, 2, 3], lengths)[None].astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
    )
    together = np.split(np.asarray(log_probabilities(model, packed)[0]), np.cumsum(lengths)[:-1])
    for document, scores in zip(documents, together):
        length = len(document) - 1
        for junk in (0, 7):
            row = np.full((1, 16), junk, np.int32)
            targets, segments, positions = row.copy(), np.zeros_like(row), np.zeros_like(row)
            row[0, :length], targets[0, :length] = document[:-1], document[1:]
            segments[0, :length], positions[0, :length] = 1, np.arange(length)
            alone = log_probabilities(model, Stream(row, targets, np.ones((1, 16), np.float32), segments, positions))
            np.testing.assert_allclose(alone[0, :length], scores, rtol=1e-5, atol=2e-5)


# Grouping


def group(repeat, *pattern):
    return {"repeat": repeat, "pattern": [{"mixer": SIZES, "mlp": {"dim": 24}, **layer} for layer in pattern]}


FOUR_EQUAL = [
    group(4, {}),
    [group(2, {}), group(2, {})],
    [group(1, {}), group(3, {})],
    group(2, {"times": 2}),
    group(1, {"times": 4}),
    group(1, {}, {"times": 2}, {}),
]
ALTERNATING = [
    group(2, {"mixer": LOCAL["mixer"]}, {"times": 2}),
    group(1, *[{"mixer": LOCAL["mixer"]}, {}, {}] * 2),
    [group(1, {"mixer": LOCAL["mixer"]}), group(2, {}), group(1, {"mixer": LOCAL["mixer"]}, {"times": 2})],
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("spellings", [FOUR_EQUAL, ALTERNATING], ids=["equal", "alternating"])
def test_grouping_of_layers_changes_nothing(spellings):
    """Initial weights, outputs and gradients of each layer are those of the same layers in another group."""
    tokens = tokens_of((2, 9))

    @jax.jit
    def compute(model):
        scores = model.logits(model(tokens).hidden_BLD)
        return scores, jax.grad(lambda model: jnp.sum(model.logits(model(tokens).hidden_BLD) ** 2))(model)

    def results(layers):
        config = ModelConfig(vocab_size=VOCAB_SIZE, embed_dim=16, layers=layers)
        model = initialize(Decoder(config, EXECUTION), jax.random.key(0))
        scores, gradient = compute(model)
        weights, gradients = (
            [own for _, own in layers_in_order(config, flatten(jax.device_get(tree)))] for tree in (model, gradient)
        )
        return weights, np.asarray(scores), gradients

    weights, scores, gradients = results(spellings[0])
    assert not np.array_equal(weights[0]["mixer/query"], weights[1]["mixer/query"])
    for layers in spellings[1:]:
        other_weights, other_scores, other_gradients = results(layers)
        for one, other in zip(weights, other_weights, strict=True):
            assert one.keys() == other.keys()
            for path, value in one.items():
                np.testing.assert_array_equal(other[path], value, err_msg=path)
        np.testing.assert_allclose(other_scores, scores, rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients, other_gradients, strict=True):
            for path, value in one.items():
                np.testing.assert_allclose(other[path], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=path)


# Decoding with caches


@jax.jit
def extend(model, tokens, positions, caches):
    output = model(tokens, positions_BL=positions, caches=caches)
    return model.logits(output.hidden_BLD), output.caches


def dirty_caches(model, batch_size, max_length):
    """Empty caches, with contents of earlier sequences, which must be ignored."""
    return jax.tree.map(lambda leaf: leaf + 7.0, model.create_caches(batch_size, max_length, jnp.float32))


def kinds(caches) -> set:
    return {type(cache) for cache in jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, Cache))}


CACHED = [
    "plain",
    "qk_norm",
    "norms of all heads together",
    "normalized head",
    "shared experts with a gate",
    "sinks, and experts with biases",
    "virtual tokens",
    "relative bias",
    "windows",
    "all",
    "mixed",
    "hybrid",
    "latent",
]


@pytest.mark.parametrize("name", CACHED)
def test_decoding_with_cache_matches_full_forward(name):
    """Prompts of different lengths, padded on the right, then one token at a time."""
    model = make(name)
    length, prompts = 14, np.array([6, 3, 9])
    tokens = tokens_of((3, length))
    expected = np.asarray(logits(model, tokens))
    caches = dirty_caches(model, 3, 16)
    places = np.arange(9)[None]
    positions = np.where(places < prompts[:, None], places, -1).astype(np.int32)
    got, caches = extend(model, tokens[:, :9], positions, caches)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row, :prompt], expected[row, :prompt], rtol=1e-4, atol=1e-4)
    for step in range(5):
        at = prompts + step
        got, caches = extend(model, tokens[np.arange(3), at][:, None], at[:, None].astype(np.int32), caches)
        np.testing.assert_allclose(got[:, 0], expected[np.arange(3), at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["windows", "all", "mixed", "hybrid", "relative bias", "virtual tokens"])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_decoding_in_chunks_with_a_ring_matches_full_forward(name, chunk):
    """Chunks shorter and longer than the windows; rows begin and stop at different times, with padding on both sides,
    and then hold a new sequence."""
    model, rows, max_length = make(name), 4, 24
    caches = dirty_caches(model, rows, max_length)
    assert kinds(caches) >= {KeyValueCache, RingCache}
    random = np.random.default_rng(chunk)
    for seed in range(2):
        tokens, lengths = tokens_of((rows, max_length), seed), random.integers(10, max_length + 1, rows)
        expected, done = np.asarray(logits(model, tokens)), np.zeros(rows, int)
        while (done < lengths).any():
            counts = np.minimum(random.integers(0, chunk + 1, rows), lengths - done)
            given, positions = np.full((rows, chunk), 5, np.int32), np.full((rows, chunk), -1, np.int32)
            places = [slice(begin := random.integers(0, chunk - n + 1), begin + n) for n in counts]
            for row, (place, n) in enumerate(zip(places, counts)):
                positions[row, place] = np.arange(done[row], done[row] + n)
                given[row, place] = tokens[row, done[row] : done[row] + n]
            got, caches = extend(model, given, positions, caches)
            for row, (place, n) in enumerate(zip(places, counts)):
                now = expected[row, done[row] : done[row] + n]
                np.testing.assert_allclose(got[row, place], now, rtol=1e-4, atol=1e-4, err_msg=f"{row} at {done[row]}")
            done += counts


def test_row_is_reused_while_other_rows_go_on():
    """Without clearing it: a token at position 0 begins a new sequence."""
    model, max_length = make("mixed"), 24
    first, second = tokens_of((2, max_length), 0), tokens_of((1, max_length), 1)
    expected, expected_second = np.asarray(logits(model, first)), np.asarray(logits(model, second))
    _, caches = extend(
        model, first[:, :9], np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)), dirty_caches(model, 2, max_length)
    )
    for step in range(12):
        tokens = np.array([[first[0, 9 + step]], [second[0, step]]])
        got, caches = extend(model, tokens, np.array([[9 + step], [step]], np.int32), caches)
        np.testing.assert_allclose(got[0, 0], expected[0, 9 + step], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1, 0], expected_second[0, step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [4, 16])
def test_row_of_a_shorter_cache_is_written_into_a_longer_one(slots):
    """As when a prompt is computed by itself: its window may be longer than the prompt's cache."""
    model = make(tiny_config(num_layers=4, window_pattern=(None, 8, 3, 4)))
    tokens, length = tokens_of((1, 20)), 4
    expected = np.asarray(logits(model, tokens))
    positions = np.where(np.arange(slots) < length, np.arange(slots), -1).astype(np.int32)[None]
    _, prompt = extend(model, tokens[:, :slots], positions, model.create_caches(1, slots, jnp.float32))
    caches = write_row(dirty_caches(model, 3, 32), prompt, jnp.int32(1))
    for at in range(length, 20):
        rows = np.array([[5], [tokens[0, at]], [5]], np.int32)
        got, caches = extend(model, rows, np.array([[-1], [at], [-1]], np.int32), caches)
        np.testing.assert_allclose(got[1, 0], expected[0, at], rtol=1e-4, atol=1e-4)


def test_five_local_layers_for_each_global_one_save_memory():
    """A local layer keeps the window's tokens, however long the sequences."""

    def bytes_of(windows):
        model = Decoder(tiny_config(num_layers=12, window_pattern=windows))
        caches = jax.eval_shape(lambda: model.create_caches(3, 4096, jnp.bfloat16))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    # Keys and values of 12 layers, 3 rows, 2 heads of 4 channels in two bytes.
    assert bytes_of((None,)) == 2 * 12 * 3 * 2 * 4 * 2 * 4096
    assert bytes_of((*[512] * 5, None)) == 2 * 3 * 2 * 4 * 2 * (10 * 512 + 2 * 4096)
    assert bytes_of((*[512] * 5, None)) < 0.28 * bytes_of((None,))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["all", "mixed"])
def test_rematerialization_does_not_change_gradient(name):
    tokens = tokens_of((2, 9))

    def gradient(remat):
        model = make(name, EXECUTION.model_copy(update={"remat": remat}))
        return flatten(jax.jit(jax.grad(lambda model: jnp.sum(model.logits(model(tokens).hidden_BLD) ** 2)))(model))

    kept = gradient("none")
    for policy in ("dots", "full"):
        again = gradient(policy)
        for path, value in kept.items():
            atol = 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(again[path], value, rtol=1e-5, atol=atol, err_msg=f"{policy}: {path}")


def test_all_attention_implementations_agree():
    tokens = tokens_of((2, 9))
    xla, reference = (
        logits(make("all", EXECUTION.model_copy(update={"attention": name})), tokens) for name in ("xla", "reference")
    )
    np.testing.assert_allclose(xla, reference, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close():
    tokens = tokens_of((2, 9))
    exact = np.asarray(logits(make(), tokens))
    execution = ExecutionConfig(activation_dtype="bfloat16", matmul_dtype="bfloat16")
    rough = np.asarray(logits(make(execution=execution), tokens))
    assert rough.dtype == np.float32
    assert np.sqrt(np.mean((rough - exact) ** 2)) < 0.02 * exact.std()


def test_tied_weights_are_shared():
    assert "head" not in flatten(Decoder(tiny_config()))
    assert "head" in flatten(Decoder(tiny_config(tie_embeddings=False)))
