"""Routing, dispatch and balance of experts, against formulas in numpy and on every kind of mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh, shard
from maxlm.errors import ConfigError
from maxlm.ops.moe import grouped_tpu
from maxlm.ops.moe.balance import bias_pull, choices, document_balance
from maxlm.ops.moe.experts import mixture_of_experts, route, router_scores
from maxlm.ops.moe.grouped_matmul import GroupedProduct, grouped_linear
from maxlm.ops.moe.grouped_mlp import ExpertWeights, grouped_mlp

B, L, D, F, E, K = 8, 8, 16, 12, 8, 2
TOKENS, RESIDUAL = ("batch", "length", None), ("batch", "residual_length", None)
RANDOM = np.random.default_rng(0)
X, LOGITS, COTANGENT = (RANDOM.normal(size=(B, L, size)).astype("float32") for size in (D, E, D))
REAL = RANDOM.random((B, L)) < 0.8
SHAPES = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
PLAIN = {name: RANDOM.normal(size=shape).astype("float32") * 0.4 for name, shape in SHAPES.items()}
BIASES = {name: RANDOM.normal(size=(E, shape[-1])).astype("float32") for name, shape in SHAPES.items()}
LIMIT = 1.5


# Products of groups


def group_rows(sizes, rows):
    """The group of each row; -1 beyond the groups."""
    return np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(rows - sum(sizes), -1)])


@pytest.mark.parametrize("implementation", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(9, 0, 33, 1), (0, 0, 0, 0), (60, 0, 0, 0), (15, 15, 15, 15)], ids=str)
def test_each_group_of_rows_is_multiplied_by_its_matrix(implementation, sizes):
    random = np.random.default_rng(1)
    x, weight, cotangent = (random.normal(size=s).astype("float32") for s in ((60, 5), (4, 5, 7), (60, 7)))
    how = GroupedProduct("float32", implementation)
    within = (group_rows(sizes, 60) >= 0)[:, None]
    # What is beyond the groups does not matter.
    x, cotangent = (np.where(within, rows, np.nan) for rows in (x, cotangent))
    y, pull = jax.vjp(lambda x, w: grouped_linear(x, w, jnp.array(sizes), how, 1), x, weight)
    grad_x, grad_weight = pull(cotangent)
    groups = group_rows(sizes, 60)
    np.testing.assert_allclose(y, np.where(within, np.einsum("mi,mio->mo", x, weight[groups]), 0), atol=1e-5)
    expected = np.where(within, np.einsum("mo,mio->mi", cotangent, weight[groups]), 0)
    np.testing.assert_allclose(grad_x, expected, atol=1e-5)
    of_group = [x[groups == g].T @ cotangent[groups == g] for g in range(4)]
    np.testing.assert_allclose(grad_weight, of_group, atol=1e-5)


def test_bfloat16_operands_have_float32_sums_in_both_directions():
    """A sum of 512 small products, which in bfloat16 would stop at 256."""
    how = GroupedProduct("bfloat16", "blocks")
    x, weight = np.ones((8, 512), "float32"), np.ones((1, 512, 2), "float32")
    np.testing.assert_array_equal(grouped_linear(x, weight, jnp.array([8]), how, 1), 512)
    rows, weight = np.ones((512, 1), "float32"), np.ones((1, 1, 2))
    _, pull = jax.vjp(lambda x, w: grouped_linear(x, w, jnp.array([512]), how, 1), rows, weight)
    np.testing.assert_array_equal(pull(np.ones((512, 2), "float32"))[1], 512)


@pytest.mark.parametrize(
    "sizes",
    [(512, 0, 512, 476), (700, 3, 0, 1), (1500, 0, 0, 0), (0, 0, 0, 1500), (0, 0, 0, 0), (1, 511, 513, 0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_kernel_sums_over_the_tiles_of_each_group(sizes, dtype):
    """Groups begin and end within tiles of 512 rows, and at their edges."""
    random = np.random.default_rng(1)
    x, grad = (jnp.asarray(random.normal(size=(1500, size)), dtype) for size in (8, 6))
    x, grad = (rows.at[sum(sizes) :].set(jnp.nan) for rows in (x, grad))
    total = jnp.asarray(random.normal(size=(4, 8, 6)), "float32")
    got = grouped_tpu.outer_product(x, grad, jnp.array(sizes), interpret=True)
    added = grouped_tpu.outer_product(x, grad, jnp.array(sizes), total, interpret=True)
    assert got.dtype == added.dtype == jnp.float32
    groups, (x, grad) = group_rows(sizes, 1500), (np.asarray(each, np.float64) for each in (x, grad))
    expected = np.array([x[groups == group].T @ grad[groups == group] for group in range(4)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(added, total + expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("implementation", ["ragged", "blocks"])
@pytest.mark.parametrize(
    "sizes", [(9, 0, 33, 1), (0, 0, 0, 0), (60, 0, 0, 0), (15, 15, 15, 15), (0, 0, 20, 0)], ids=str
)
def test_mlps_in_chunks_are_those_of_all_rows(implementation, sizes, has_bias):
    random = np.random.default_rng(1)
    shapes = (60, 5), (60, 5), (4, 5, 7), (4, 5, 7), (4, 7, 5), *[(4, 7)] * (2 * has_bias)
    x, cotangent, *arrays = (random.normal(size=shape).astype("float32") for shape in shapes)
    weights = ExpertWeights(*arrays, swiglu_limit=LIMIT if has_bias else None)
    within = (group_rows(sizes, 60) >= 0)[:, None]
    zero_beyond, undefined_beyond = ([np.where(within, rows, fill) for rows in (x, cotangent)] for fill in (0, np.nan))

    def by_definition(x, weights):
        own = jax.tree.map(lambda weight: weight[group_rows(sizes, 60)], weights)
        product = lambda x, weight: jnp.einsum("mi,mio->mo", x, weight, precision="highest")  # noqa: E731
        gate, up = product(x, own.gate_GDF), product(x, own.up_GDF)
        if not has_bias:
            return product(jax.nn.silu(gate) * up, own.down_GFD)
        gate, up = jnp.minimum(gate + own.gate_bias_GF, LIMIT), jnp.clip(up + own.up_bias_GF, -LIMIT, LIMIT)
        return product(gate * jax.nn.sigmoid(1.702 * gate) * (up + 1), own.down_GFD)

    def in_chunks(x, weights):
        return grouped_mlp(x, weights, jnp.array(sizes), GroupedProduct("float32", implementation), 3)

    with jax.enable_x64(True):
        *wide, cotangent = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, "float64"), (zero_beyond[0], weights, zero_beyond[1])
        )
        expected, pull = jax.vjp(by_definition, *wide)
        expected_grads = pull(cotangent)
    x, cotangent = undefined_beyond
    got, pull = jax.vjp(in_chunks, x, weights)
    grad_x, grad_weights = pull(cotangent)
    got, grad_x = np.where(within, got, 0), np.where(within, grad_x, 0)
    result = got, grad_x, grad_weights
    expected = np.where(within, expected, 0), np.where(within, expected_grads[0], 0), expected_grads[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), result, expected)


# Routing


def test_best_experts_are_chosen_and_ties_go_to_the_lower_index():
    scores = np.array([[[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]]], "float32")
    routing = route(scores, None, experts_per_token=2, normalize_weights=True, scaling=3.0)
    np.testing.assert_array_equal(routing.experts_BLK, [[[1, 2], [0, 1]]])
    np.testing.assert_allclose(routing.weights_BLK, 1.5)
    plain = route(scores, None, experts_per_token=2, normalize_weights=False, scaling=1.0)
    np.testing.assert_allclose(plain.weights_BLK, [[[0.4, 0.4], [0.25, 0.25]]])


def test_bias_changes_the_choice_but_not_the_weights():
    scores = np.array([[[0.1, 0.5, 0.4]]], "float32")
    routing = route(scores, np.array([1.0, 0, 0]), experts_per_token=2, normalize_weights=False, scaling=1.0)
    np.testing.assert_array_equal(routing.experts_BLK, [[[0, 1]]])
    np.testing.assert_allclose(routing.weights_BLK, [[[0.1, 0.5]]])


# Dispatch


def mixture(mesh=None, *, implementation="padded", dtype="float32", output_axes=TOKENS, biases=BIASES, limit=LIMIT):
    """The output, and the gradients for tokens, logits, matrices and biases."""

    def weighted(x, logits, plain, biases):
        real, cotangent = jnp.asarray(REAL), jnp.asarray(COTANGENT)
        x, logits = shard(x, *TOKENS), shard(logits, *TOKENS)
        weights = ExpertWeights(
            *(shard(plain[name], "experts", "expert_embed", "mlp") for name in ("gate", "up")),
            shard(plain["down"], "experts", "mlp", "expert_embed"),
            *(shard(biases[name], "experts", "mlp") for name in ("gate", "up") if biases),
            *(shard(biases[name], "experts", None) for name in ("down",) if biases),
            swiglu_limit=limit,
        )
        routing = route(
            router_scores(logits, "softmax"), None, experts_per_token=K, normalize_weights=True, scaling=1.0
        )
        y = mixture_of_experts(
            x,
            routing,
            shard(real, "batch", "length"),
            weights,
            dtype=dtype,
            output_axes=output_axes,
            implementation=implementation,
        )
        return jnp.sum(y * shard(cotangent, *output_axes)), y

    gradient = jax.jit(jax.grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))
    with jax.set_mesh(mesh or make_mesh(MeshConfig(fsdp=1))):
        gradients, outputs = gradient(X, LOGITS, PLAIN, biases)
    return jax.device_get(outputs), jax.device_get(jax.tree.leaves(gradients))


def assert_same(left, right, *, relative=1e-5):
    for value, expected in zip((left[0], *left[1]), (right[0], *right[1]), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(value, expected, atol=relative * scale)


@pytest.fixture(scope="module")
def reference():
    return mixture(implementation="reference")


def numpy_mixture(plain, biases):
    """Token by token and expert by expert, in float64."""
    y, chosen = np.zeros((B, L, D)), np.zeros((B, L, K), int)
    for b, t in np.ndindex(B, L):
        scores = np.exp(LOGITS[b, t].astype("float64"))
        chosen[b, t] = np.argsort(-scores, kind="stable")[:K]
        for e in chosen[b, t] if REAL[b, t] else ():
            gate, up = (X[b, t] @ plain[name][e].astype("float64") for name in ("gate", "up"))
            if biases:
                gate, up = np.minimum(gate + biases["gate"][e], LIMIT), np.clip(up + biases["up"][e], -LIMIT, LIMIT)
                hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            else:
                hidden = gate / (1 + np.exp(-gate)) * up
            output = hidden @ plain["down"][e] + (biases["down"][e] if biases else 0)
            y[b, t] += scores[e] / scores[chosen[b, t]].sum() * output
    return y


@pytest.mark.parametrize(("biases", "limit"), [(BIASES, LIMIT), ({}, None)])
def test_reference_matches_formula(biases, limit):
    y, _ = mixture(implementation="reference", biases=biases, limit=limit)
    np.testing.assert_allclose(y, numpy_mixture(PLAIN, biases), atol=1e-5)


def test_reference_gradients_match_finite_differences(reference):
    random = np.random.default_rng(3)
    weights = PLAIN, BIASES
    step = jax.tree.map(lambda w: random.normal(size=w.shape), weights)
    ahead, behind = (jax.tree.map(lambda w, d, by=by: w + by * d, weights, step) for by in (1e-5, -1e-5))
    slope = ((numpy_mixture(*ahead) - numpy_mixture(*behind)) * COTANGENT).sum() / 2e-5
    along = sum((grad * direction).sum() for grad, direction in zip(reference[1][2:], jax.tree.leaves(step)))
    np.testing.assert_allclose(along, slope, rtol=1e-3)


MESHES = [
    {},
    {"expert": 4},
    {"expert": 2, "tensor": 2, "fsdp": 2},
    {"expert": 2, "context": 2, "data": 2},
    {"expert": 8},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_dispatch_matches_reference_on_every_mesh(sizes, reference):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    output_axes = RESIDUAL if sizes.get("tensor") else TOKENS
    y, gradients = mixture(mesh, output_axes=output_axes)
    assert_same((y, gradients), reference)
    assert not y[~REAL].any(), "padding is not routed"


def test_dispatch_without_biases_matches_reference():
    without = {"biases": {}, "limit": None}
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert_same(mixture(mesh, output_axes=RESIDUAL, **without), mixture(implementation="reference", **without))


def test_bfloat16_is_close(reference):
    assert_same(mixture(dtype="bfloat16"), reference, relative=0.03)


def spread_by_definition(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as documented, since XLA's CPU backend does not implement it."""
    # One row of runs for each peer.
    num_peers = jax.lax.axis_size(axis_name)
    runs = [part.reshape(num_peers, -1) for part in (input_offsets, send_sizes, output_offsets, recv_sizes)]
    everything = jax.lax.all_gather((operand, *runs[:3]), axis_name)
    me, place = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for peer, run in itertools.product(range(num_peers), range(runs[0].shape[1])):
        rows, *parts = (part[peer] for part in everything)
        start, size, target = (part[me, run] for part in parts)
        offset = place - target
        taken = rows[jnp.clip(start + offset, 0, len(rows) - 1)]
        # Both sides know the size.
        filled = (offset >= 0) & (offset < jnp.where(size == runs[3][peer, run], size, 0))
        output = jnp.where(filled[:, None], taken, output)
    return output


def test_ragged_exchange_matches_padded_exchange(reference, monkeypatch):
    """The TPU implementation: its all-to-all emulated, and its products, which run on any device."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", spread_by_definition)
    monkeypatch.setattr("maxlm.ops.moe.experts.traced_platform", lambda: "tpu")
    # What is not written is not read.
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    assert_same(mixture(make_mesh(MeshConfig(expert=4, fsdp=2)), implementation=None), reference)


@pytest.mark.parametrize(("name", "message"), [("ragged", "choose 'padded'"), ("sorted", "allowed: ragged, padded")])
def test_unavailable_implementation_is_rejected(name, message):
    with pytest.raises(ConfigError, match=message):
        mixture(implementation=name)


# Balance

# The first document of the second row spans two devices of a context axis; the last row is padding.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 2, 2], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8] * 2)


def balance(mesh=None):
    def loss(logits):
        scores = router_scores(shard(logits, *TOKENS), "sigmoid")
        routing = route(scores, None, experts_per_token=K, normalize_weights=True, scaling=1.0)
        return document_balance(scores, routing.experts_BLK, shard(jnp.asarray(SEGMENTS), "batch", "length"))

    with jax.set_mesh(mesh or make_mesh(MeshConfig(fsdp=1))):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(LOGITS))


def test_balance_loss_matches_formula_per_document():
    """Equations 17 to 20 of arXiv:2412.19437, document by document, in float64."""

    def formula(logits):
        total = 0.0
        for b, segment in {(row, s) for row in range(B) for s in SEGMENTS[row] if s}:
            scores = 1 / (1 + np.exp(-logits[b, SEGMENTS[b] == segment]))
            tokens = len(scores)
            chosen = np.argsort(-LOGITS[b, SEGMENTS[b] == segment], axis=-1, kind="stable")[:, :K]
            f = E / (K * tokens) * np.bincount(chosen.ravel(), minlength=E)
            p = np.mean(scores / scores.sum(axis=-1, keepdims=True), axis=0)
            total += tokens * (f * p).sum()
        return total

    value, gradient = balance()
    logits = LOGITS.astype("float64")
    np.testing.assert_allclose(value, formula(logits), rtol=1e-5)
    direction = np.random.default_rng(4).normal(size=logits.shape)
    slope = (formula(logits + 1e-5 * direction) - formula(logits - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4)
    assert not gradient[SEGMENTS == 0].any()


def test_balance_loss_is_the_same_for_sharded_rows():
    value, gradient = balance(make_mesh(MeshConfig(fsdp=1, context=4, expert=2)))
    expected_value, expected_gradient = balance()
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


def test_uniform_load_has_the_lowest_balance_loss():
    """1 per token if all experts have equal load, and E / K if all tokens go to the same ones."""
    segments = np.ones((1, E // K), int)
    even = np.arange(E).reshape(1, -1, K)
    flat = np.full((1, E // K, E), 0.5, "float32")
    np.testing.assert_allclose(document_balance(flat, even, segments), E // K, rtol=1e-6)
    first = np.where(np.arange(E) < K, 1.0, 0.0) * np.ones_like(flat)
    same = np.broadcast_to(np.arange(K), even.shape)
    np.testing.assert_allclose(document_balance(first, same, segments), (E / K) * (E // K), rtol=1e-6)


def test_bias_gradient_is_load_error_and_loss_is_zero():
    experts = np.array([[[0, 1], [0, 2], [0, 1]]])
    load = choices(experts, np.array([[True, True, False]]), 4).sum((0, 1))
    value, gradient = jax.value_and_grad(bias_pull)(jnp.array([0.3, -0.2, 0.1, 7.0]), load)
    assert value == 0
    np.testing.assert_array_equal(gradient, [1, 0, 0, -1])
