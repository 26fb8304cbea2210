"""Attention: values and gradients of every implementation that runs on a CPU, against float64 loops in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import BATCH, Case, definition, equations, packed_segments, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.errors import ConfigError
from maxlm.ops.attention import dispatch
from maxlm.ops.attention.dispatch import attention
from maxlm.ops.attention.flash import flash_attention
from maxlm.ops.attention.flash_tpu import Kernels
from maxlm.ops.attention.flash_xla import Blockwise
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import Alibi
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout

CASES = [
    Case("causal"),
    Case("bidirectional, grouped heads", causal=False, num_heads=4),
    Case("one key-value head, head_dim 64", num_heads=3, num_kv_heads=1, head_dim=64),
    Case("segments, head_dim 128", head_dim=128, segments=True),
    Case("segments, bidirectional", segments=True, causal=False),
    Case("window", length=300, window=40),
    Case("window of one token", length=140, window=1),
    Case("bidirectional window", length=300, window=40, causal=False, num_kv_heads=1),
    Case("segments, window, soft cap", length=300, segments=True, window=50, soft_cap=1.5, num_kv_heads=1, scale=0.6),
    Case("more keys than queries", length=40, kv_length=200),
    Case("fewer keys than queries", length=200, kv_length=40, causal=False, segments=True),
    Case("fewer keys than queries, window beyond them", length=300, kv_length=40, window=30),
    Case("prefix", length=300, prefix=True),
    Case("prefix, segments, window", length=300, prefix=True, segments=True, window=60),
    Case("prefix, bidirectional", prefix=True, causal=False),
    Case("ALiBi", length=300, bias="alibi", num_heads=4),
    Case("ALiBi, bidirectional, soft cap, more keys", 140, 270, bias="alibi", causal=False, soft_cap=1.5),
    Case("relative buckets", length=300, bias="t5", num_heads=4, segments=True),
    Case("relative buckets, bidirectional, more queries", 270, 140, bias="t5", causal=False),
    Case("sinks", sinks=True, num_heads=4, segments=True),
    Case("virtual tokens", virtual=3, num_heads=4, segments=True),
    Case(
        "virtual tokens, window, soft cap, mask",
        300,
        virtual=5,
        window=20,
        soft_cap=1.5,
        mask=1,
        num_heads=4,
        value_dim=24,
    ),
    Case("virtual tokens, fewer keys", 200, 40, virtual=2, causal=False),
    Case("value_dim below head_dim", head_dim=24, value_dim=16, num_heads=4),
    Case("value_dim above head_dim", head_dim=16, value_dim=40, segments=True, causal=False),
    Case("mask", length=200, mask=1, segments=True, num_heads=4),
    Case("mask by head", length=130, kv_length=200, mask=2, causal=False),
    Case("array of biases", bias="array", num_heads=4, segments=True),
    Case("array of biases, mask, sinks", bias="array", mask=1, sinks=True, soft_cap=2.0),
    Case("dropout", dropout=0.3, segments=True),
    Case("dropout, bidirectional, more keys", 140, 270, dropout=0.6, causal=False, num_heads=3, num_kv_heads=1),
    Case("dropout, fewer keys, value_dim above head_dim", 200, 40, dropout=0.1, num_heads=4, value_dim=24),
    Case("dropout, array of biases, mask by head", dropout=0.2, bias="array", mask=2, segments=True),
    Case(
        "everything",
        300,
        None,
        4,
        2,
        16,
        24,
        True,
        70,
        1.5,
        0.4,
        segments=True,
        prefix=True,
        bias="t5",
        sinks=True,
        mask=4,
        dropout=0.25,
        virtual=4,
    ),
]
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu"]
IN_CASES = [(name, case) for case in CASES for name in IMPLEMENTATIONS if (name, case.bias) != ("pallas_tpu", "array")]


@pytest.fixture(scope="module")
def expected():
    """The numpy result of a case, computed once for all implementations."""
    results = {}

    def of(case: Case):
        if case not in results:
            results[case] = definition(case)
        return results[case]

    return of


@pytest.mark.parametrize(
    ("implementation", "case"), IN_CASES, ids=lambda part: part.name if isinstance(part, Case) else part
)
def test_values_and_gradients_match_definition(implementation, case, expected):
    results, want = run(implementation, case), expected(case)
    assert results.keys() == want.keys()
    for name, got in results.items():
        # A gradient of biases or sinks sums over thousands of pairs, of which most cancel.
        atol = 1e-5 if name in ("output", "query", "key", "value") else 1e-4
        np.testing.assert_allclose(got, want[name], atol=atol, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("bias", ["alibi", "t5", "array"])
def test_numpy_gradients_match_finite_differences(bias):
    operands = {"segments": True, "prefix": True, "sinks": True, "mask": 2, "dropout": 0.3, "bias": bias, "virtual": 3}
    case = Case("all", 12, None, 2, 1, 4, 6, True, 5, 1.5, **operands)
    arrays, gradient = jax.tree.map(lambda x: x.astype(np.float64), case.inputs())
    analytic = definition(case, (arrays, gradient))
    generator = np.random.default_rng(0)
    for name, array in arrays.items():
        direction = generator.normal(size=array.shape)

        def loss(step, name=name, direction=direction):
            moved = arrays | {name: arrays[name] + step * direction}
            return np.sum(definition(case, (moved, gradient))["output"] * gradient)

        assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(np.sum(analytic[name] * direction), rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_returns_exact_zeros_with_zero_gradients(implementation):
    case = Case("padding", segments=True, num_heads=4)
    padding = packed_segments(case.length) == 0
    assert padding.any(axis=1).all()
    for result in run(implementation, case).values():
        assert np.isfinite(result).all()
        assert not np.asarray(result)[padding].any()
        assert np.asarray(result)[~padding].any()


@pytest.mark.parametrize("sinks", [None, jnp.zeros(1)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_row_of_padding_is_zeros(implementation, sinks):
    padding = jnp.zeros((1, 70), int)

    def loss(query):
        operands = AttentionOperands(segments=(padding, padding), sinks_N=sinks)
        return attention(query, query, query, AttentionRule(1.0), operands, implementation=implementation).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.ones((1, 70, 1, 8)))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_segments_have_no_effect(implementation):
    """Changing everything outside a document does not change a bit of the document's rows."""
    case = Case("influence", segments=True, prefix=True)
    arrays, gradient = case.inputs()
    inside = (packed_segments(case.length) == 3)[0]
    changed = {name: array.copy() for name, array in arrays.items()}
    for array in changed.values():
        array[0, ~inside] = 1e4
    before, after = (run(implementation, case, inputs=(x, gradient))["output"][0, inside] for x in (arrays, changed))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_stay_finite(implementation):
    for result in run(implementation, Case("large", segments=True, scale=1e4, sinks=True)).values():
        assert np.isfinite(result).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_in_bfloat16_out(implementation, expected):
    case = Case("bfloat16", segments=True, num_heads=4)
    for name, got in run(implementation, case, jnp.bfloat16).items():
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), expected(case)[name], atol=0.06, rtol=0.03)


@pytest.mark.parametrize("transposed", [False, True], ids=["as returned", "as ring attention adds them up"])
def test_gradients_of_a_single_block_in_16_bits(transposed):
    """Processors with matrix units for bfloat16 have failed at them."""
    keys, sizes = jax.random.split(jax.random.key(0), 4), (12, 12, 8, 8)
    query, key, value, gradient = (jax.random.normal(each, (2, 4, 64, size)) for each, size in zip(keys, sizes))

    def gradients(blocks):
        rule, operands = AttentionRule(0.3), AttentionOperands()
        output, log_sum = blocks.forward(rule, query, key, value, operands)
        mean = jnp.sum(output * gradient, axis=-1)
        found = blocks.backward(rule, query, key, value, operands, log_sum, mean, gradient)[:3]
        return [x.swapaxes(2, 3) if transposed else x for x in found]

    got, exact = (jax.jit(gradients, static_argnums=0)(Blockwise(jnp.dtype(x))) for x in ("bfloat16", "float32"))
    for one, other in zip(got, exact):
        np.testing.assert_allclose(one, other, atol=0.1)


def test_matmul_dtype_casts_only_operands(expected):
    case = Case("matmul_dtype", segments=True)
    for name, got in run("xla", case, matmul_dtype=jnp.bfloat16).items():
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected(case)[name], atol=0.06, rtol=0.03)

    def loss(x):
        return attention(x, x, x, AttentionRule(1.0), implementation="xla", matmul_dtype=jnp.bfloat16).sum()

    products = [
        equation
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 200, 2, 8))).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 7
    for product in products:
        assert {operand.aval.dtype.name for operand in product.invars} == {"bfloat16"}
        assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize(
    ("rule", "most"), [(AttentionRule(1.0), 0.7), (AttentionRule(1.0, window=64), 0.35)], ids=["causal", "window"]
)
def test_xla_skips_fully_masked_blocks(rule, most):
    """Causal attention costs about half of all pairs, a window an eighth or two, forwards and backwards."""

    def flops(rule):
        def loss(x):
            return attention(x, x, x, rule, implementation="xla").sum()

        return jax.jit(jax.grad(loss)).lower(jnp.ones((1, 512, 1, 64))).compile().cost_analysis()["flops"]

    assert flops(rule) < most * flops(AttentionRule(1.0, causal=False))


@pytest.mark.parametrize("bias", ["alibi", "t5"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_biases_by_position_and_dropout_are_not_matrices(implementation, bias):
    """No array of every query, key and head: biases and masks are computed for one block at a time."""
    case = Case("memory", length=1024, num_heads=4, bias=bias, dropout=0.1)
    arrays, _ = case.inputs()

    def loss(arrays):
        operands = case.operands(arrays).by_distance(0, case.length, case.length)
        blocks = Blockwise(jnp.dtype("float32"))
        if implementation == "pallas_tpu":
            blocks = Kernels(jnp.dtype("float32"), jnp.dtype("float32"), interpret=True)
        return flash_attention(blocks, case.rule, *(arrays[x] for x in ("query", "key", "value")), operands).sum()

    largest = max(out.aval.size for e in equations(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr) for out in e.outvars)
    assert largest < BATCH * case.num_heads * case.length**2 / 4


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_works_inside_checkpoint_and_scan(implementation):
    query = jnp.asarray(np.random.default_rng(0).normal(size=(2, 130, 2, 8)), jnp.float32)
    operands = AttentionOperands(segments=(packed_segments(130),) * 2)

    def call(x):
        return attention(x, x, x, AttentionRule(8**-0.5), operands, implementation=implementation)

    def scanned(x):
        return jnp.sum(jax.lax.scan(lambda x, _: (jax.checkpoint(call)(x), None), x, length=3)[0] ** 2)

    def unrolled(x):
        return jnp.sum(call(call(call(x))) ** 2)

    np.testing.assert_allclose(
        jax.jit(jax.grad(scanned))(query), jax.jit(jax.grad(unrolled))(query), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sharded_over_batch_and_heads(implementation, kind):
    case = Case("sharded", num_heads=4, num_kv_heads=2, segments=True)
    inputs, segments = case.inputs()[0], packed_segments(case.length)

    def loss(query, key, value, segments):
        operands = AttentionOperands(segments=(segments, segments))
        return jnp.sum(attention(query, key, value, case.rule, operands, implementation=implementation) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    want = jax.jit(gradient)(*inputs.values(), segments)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (kind, kind), devices=jax.devices()[:4])
    heads, rows = P("data", None, "tensor", None), P("data", None)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, heads)) for x in inputs.values()]
        arrays.append(jax.device_put(segments, NamedSharding(mesh, rows)))
        by_shard = jax.shard_map(gradient, in_specs=(heads, heads, heads, rows), out_specs=(heads,) * 3)
        for got in (jax.jit(gradient)(*arrays), jax.jit(by_shard)(*arrays)):
            for got_one, want_one in zip(got, want):
                assert got_one.sharding.spec == heads
                np.testing.assert_allclose(got_one, want_one, atol=1e-5, rtol=1e-4)


def test_cpu_defaults_to_blockwise_attention():
    case = Case("default")
    default, xla = run(None, case), run("xla", case)
    for name in xla:
        np.testing.assert_array_equal(default[name], xla[name])


def test_later_queries_match_the_end_of_a_row():
    """Queries at an offset see, and are biased, as the last queries of a whole row."""
    case = Case("offset", 200, num_heads=2, bias="alibi", window=90)
    arrays, _ = case.inputs()
    want = definition(case)["output"][:, 150:]
    rule = dataclasses.replace(case.rule, offset=150)
    for implementation in ("reference", "xla"):
        got = attention(
            arrays["query"][:, 150:],
            arrays["key"],
            arrays["value"],
            rule,
            case.operands(arrays),
            implementation=implementation,
        )
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("implementation", "sentence"),
    [
        ("flash", "'flash' is unknown; allowed are pallas_tpu, cudnn, xla, reference"),
        ("pallas_tpu", "'pallas_tpu' needs a TPU, not cpu; choose 'xla' or None"),
        ("cudnn", "'cudnn' needs an NVIDIA GPU, not cpu; choose 'xla' or None"),
    ],
)
def test_unavailable_implementation_is_rejected_with_reason(implementation, sentence):
    with pytest.raises(ConfigError, match=sentence):
        attention(*[jnp.ones((1, 8, 1, 8))] * 3, AttentionRule(1.0), implementation=implementation)


def test_kernels_reject_an_array_of_biases(monkeypatch):
    monkeypatch.setattr(dispatch, "traced_platform", lambda: "tpu")
    operands = AttentionOperands(bias_BNTS=jnp.zeros((1, 1, 256, 256)))
    sentence = "'pallas_tpu' does not support an array of biases; choose 'xla' or None, or a position_bias"
    with pytest.raises(ConfigError, match=sentence):
        attention(*[jnp.ones((1, 256, 1, 8))] * 3, AttentionRule(1.0), operands, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": jnp.ones((1, 8, 8))}, "attention takes query"),
        ({"value": jnp.ones((1, 8, 3, 4))}, "attention takes query"),
        ({"query": jnp.ones((1, 8, 4, 4))}, "must agree in batch and head_dim"),
        ({"query": jnp.ones((1, 8, 3, 8))}, "num_heads 3 must be a multiple of num_kv_heads 2"),
    ],
)
def test_inconsistent_arrays_are_rejected(change, sentence):
    arrays = {"query": jnp.ones((1, 8, 4, 8)), "key": jnp.ones((1, 8, 2, 8)), "value": jnp.ones((1, 8, 2, 8))}
    with pytest.raises(ValueError, match=sentence):
        attention(**(arrays | change), rule=AttentionRule(1.0))


@pytest.mark.parametrize(
    ("operands", "sentence"),
    [
        ({"segments": (jnp.ones((1, 9), int), jnp.ones((1, 8), int))}, "segments must be of queries"),
        ({"prefix": (jnp.ones((1, 8), int), jnp.ones((1, 6), int))}, "prefix must be of queries"),
        (
            {"virtual": (jnp.ones((3, 2, 16)), jnp.ones((3, 2, 8)))},
            "virtual tokens must have keys .2, 8. and values .2, 8., not .2, 16. and .2, 8.",
        ),
        ({"sinks_N": jnp.ones(3)}, "sinks must be .num_heads. .4,., not .3,."),
        ({"position_bias": Alibi(jnp.ones(2))}, "position_bias is for 2 heads, not num_heads 4"),
        ({"mask_BNTS": jnp.ones((1, 2, 8, 8), bool)}, "mask must be .batch or 1"),
        ({"bias_BNTS": jnp.ones((8, 8))}, "bias must be .batch or 1"),
        (
            {"dropout": WeightDropout(jnp.ones((1, 8, 2), jnp.uint32), jnp.ones((1, 8), int), 0.5)},
            "dropout must have seeds of queries .1, 8, 4. and of keys .1, 8., not .1, 8, 2. and .1, 8.",
        ),
    ],
)
def test_inconsistent_operands_are_rejected(operands, sentence):
    arrays = jnp.ones((1, 8, 4, 8)), jnp.ones((1, 8, 2, 8)), jnp.ones((1, 8, 2, 8))
    with pytest.raises(ValueError, match=sentence):
        attention(*arrays, AttentionRule(1.0), AttentionOperands(**operands))


@pytest.mark.parametrize(("setting", "sentence"), [({"window": 0}, "window must be"), ({"soft_cap": -1.0}, "soft_cap")])
def test_invalid_rules_are_rejected(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionRule(1.0, **setting)
