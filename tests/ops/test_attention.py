"""Attention: values and gradients of every implementation that runs on a CPU, against float64 loops in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.errors import ConfigError
from maxlm.ops import flash_tpu
from maxlm.ops.attention import attention
from maxlm.ops.attention_rule import AttentionRule


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    length: int = 150
    kv_length: int | None = None
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    segments: bool = False
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None

    def inputs(self):
        """query, key, value, the output's gradient, and the segment ids of queries and keys (or None)."""
        generator = np.random.default_rng(len(self.name))
        kv_length = self.kv_length or self.length
        shapes = (
            [(self.length, self.num_heads)] + [(kv_length, self.num_kv_heads)] * 2 + [(self.length, self.num_heads)]
        )
        arrays = [generator.normal(size=(2, length, heads, self.head_dim)) for length, heads in shapes]
        arrays = [array.astype(np.float32) for array in arrays]
        if not self.segments:
            return *arrays, None, None
        return *arrays, packed_segments(self.length), packed_segments(kv_length)

    def arguments(self):
        return {"causal": self.causal, "window": self.window, "soft_cap": self.soft_cap, "scale": self.scale}


def packed_segments(length: int) -> np.ndarray:
    """Two rows of documents: one ends in padding, one has padding inside and a document split in two."""
    position = np.arange(length) / length
    first = np.select([position < 0.3, position < 0.45, position < 0.9], [1, 2, 3], 0)
    second = np.select([position < 0.2, position < 0.3, position < 0.7], [7, 0, 5], 7)
    return np.stack([first, second]).astype(np.int32)


CASES = [
    Case("causal"),
    Case("bidirectional, grouped heads", causal=False, num_heads=4),
    Case("one key-value head, head_dim 64", num_heads=3, num_kv_heads=1, head_dim=64),
    Case("segments, head_dim 128", head_dim=128, segments=True),
    Case("segments, bidirectional", segments=True, causal=False),
    Case("window", length=300, window=40),
    Case("window of one token", length=140, window=1),
    Case("bidirectional window", length=300, window=40, causal=False, num_kv_heads=1),
    Case("everything", length=300, segments=True, window=50, soft_cap=1.5, num_kv_heads=1, scale=0.6),
    Case("more keys than queries", length=40, kv_length=200),
    Case("fewer keys than queries", length=200, kv_length=40, causal=False, segments=True),
    Case("fewer keys than queries, window beyond them", length=300, kv_length=40, window=30),
]


def numpy_attention(query, key, value, gradient, query_segments, key_segments, *, causal, window, soft_cap, scale):
    """Output and gradients of query, key and value, one query and head at a time, in float64."""
    query, key, value, gradient = (x.astype(np.float64) for x in (query, key, value, gradient))
    output, dq, dk, dv = np.zeros_like(query), np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    batch, length, num_heads, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    for b in range(batch):
        for i in range(length):
            seen = []
            for j in range(key.shape[1]):
                if causal and j > i:
                    continue
                if window is not None and abs(i - j) >= window:
                    continue
                if query_segments is not None and not query_segments[b, i] == key_segments[b, j] != 0:
                    continue
                seen.append(j)
            if not seen:
                continue
            for h in range(num_heads):
                g = h // (num_heads // key.shape[2])
                logits = key[b, seen, g] @ query[b, i, h] * scale
                slope = np.ones_like(logits)
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                    slope = 1 - (logits / soft_cap) ** 2
                p = np.exp(logits - logits.max())
                p /= p.sum()
                output[b, i, h] = p @ value[b, seen, g]
                dp = value[b, seen, g] @ gradient[b, i, h]
                ds = p * (dp - p @ dp) * slope * scale
                dq[b, i, h] = ds @ key[b, seen, g]
                dk[b, seen, g] += np.outer(ds, query[b, i, h])
                dv[b, seen, g] += np.outer(p, gradient[b, i, h])
    return output, dq, dk, dv


def run(implementation, case: Case, dtype=jnp.float32, **more):
    """Output and gradients of query, key and value."""
    query, key, value, gradient, query_segments, key_segments = case.inputs()

    def call(query, key, value):
        if implementation != "pallas_tpu":
            return attention(
                query,
                key,
                value,
                segment_ids=query_segments,
                kv_segment_ids=key_segments,
                implementation=implementation,
                **case.arguments(),
                **more,
            )
        rule = AttentionRule(**{**case.arguments(), "scale": case.scale or case.head_dim**-0.5})
        return flash_tpu.flash_attention(
            rule, query, key, value, query_segments, key_segments, largest_block=128, interpret=True
        )

    @jax.jit
    def values_and_gradients(query, key, value, gradient):
        output, transpose = jax.vjp(call, query, key, value)
        return output, *transpose(gradient)

    return values_and_gradients(*(jnp.asarray(x, dtype) for x in (query, key, value, gradient)))


@pytest.fixture(scope="module")
def expected():
    """The numpy result of a case, computed once for all implementations."""
    results = {}

    def of(case: Case):
        if case not in results:
            results[case] = numpy_attention(*case.inputs(), **case.arguments())
        return results[case]

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_values_and_gradients_match_definition(implementation, case, expected):
    for got, want in zip(run(implementation, case), expected(case)):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def test_numpy_gradients_match_finite_differences():
    case = Case("all", length=12, segments=True, window=5, soft_cap=1.5, num_heads=2, num_kv_heads=1, head_dim=4)
    query, key, value, gradient, *segments = (
        x if x is None or x.dtype == np.int32 else x.astype(np.float64) for x in case.inputs()
    )
    _, *analytic = numpy_attention(query, key, value, gradient, *segments, **case.arguments())
    generator = np.random.default_rng(0)
    for index, slope in enumerate(analytic):
        direction = generator.normal(size=slope.shape)

        def loss(step, index=index, direction=direction):
            moved = [query, key, value]
            moved[index] = moved[index] + step * direction
            return np.sum(numpy_attention(*moved, gradient, *segments, **case.arguments())[0] * gradient)

        assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(np.sum(slope * direction), rel=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_padding_returns_exact_zeros_with_zero_gradients(implementation):
    case = Case("padding", segments=True, num_heads=4)
    padding = packed_segments(case.length) == 0
    assert padding.any(axis=1).all()
    for result in run(implementation, case):
        assert np.isfinite(result).all()
        assert not np.asarray(result)[padding].any()
        assert np.asarray(result)[~padding].any()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_row_of_padding_is_zeros(implementation):
    def loss(query):
        return attention(query, query, query, segment_ids=jnp.zeros((1, 70), int), implementation=implementation).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.ones((1, 70, 1, 8)))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_other_segments_have_no_effect(implementation):
    """Changing everything outside a document does not change a bit of the document's rows."""
    case = Case("influence", segments=True)
    inside = (packed_segments(case.length) == 3)[0]
    before = run(implementation, case)[0][0, inside]

    class Changed(Case):
        def inputs(self):
            query, key, value, *rest = super().inputs()
            for x in (query, key, value):
                x[0, ~inside] = 1e4
            return query, key, value, *rest

    after = run(implementation, Changed("influence", segments=True))[0][0, inside]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_large_logits_stay_finite(implementation):
    for result in run(implementation, Case("large", segments=True, scale=1e4)):
        assert np.isfinite(result).all()


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_bfloat16_in_bfloat16_out(implementation, expected):
    case = Case("bfloat16", segments=True, num_heads=4)
    for got, want in zip(run(implementation, case, jnp.bfloat16), expected(case)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, atol=0.06, rtol=0.03)


def test_matmul_dtype_casts_only_operands(expected):
    case = Case("matmul_dtype", segments=True)
    results = run("xla", case, matmul_dtype=jnp.bfloat16)
    for got, want in zip(results, expected(case)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=0.06, rtol=0.03)

    def loss(x):
        return attention(x, x, x, implementation="xla", matmul_dtype=jnp.bfloat16).sum()

    products = [
        equation
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 200, 2, 8))).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 7
    for product in products:
        assert {operand.aval.dtype.name for operand in product.invars} == {"bfloat16"}
        assert product.outvars[0].aval.dtype == jnp.float32


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("arguments", "most"), [({}, 0.7), ({"window": 64}, 0.35)])
def test_xla_skips_fully_masked_blocks(arguments, most):
    """Causal attention costs about half of all pairs, a window an eighth or two, forwards and backwards."""

    def flops(**arguments):
        def loss(x):
            return attention(x, x, x, implementation="xla", **arguments).sum()

        return jax.jit(jax.grad(loss)).lower(jnp.ones((1, 512, 1, 64))).compile().cost_analysis()["flops"]

    assert flops(**arguments) < most * flops(causal=False)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_works_inside_checkpoint_and_scan(implementation):
    query = jnp.asarray(np.random.default_rng(0).normal(size=(2, 130, 2, 8)), jnp.float32)
    segments = packed_segments(130)

    def call(x):
        return attention(x, x, x, segment_ids=segments, implementation=implementation)

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
    query, key, value, _, segments, _ = case.inputs()

    def loss(query, key, value, segments):
        return jnp.sum(attention(query, key, value, segment_ids=segments, implementation=implementation) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    want = jax.jit(gradient)(query, key, value, segments)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (kind, kind), devices=jax.devices()[:4])
    heads, rows = P("data", None, "tensor", None), P("data", None)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, heads)) for x in (query, key, value)]
        arrays.append(jax.device_put(segments, NamedSharding(mesh, rows)))
        by_shard = jax.shard_map(gradient, in_specs=(heads, heads, heads, rows), out_specs=(heads,) * 3)
        for got in (jax.jit(gradient)(*arrays), jax.jit(by_shard)(*arrays)):
            for got_one, want_one in zip(got, want):
                assert got_one.sharding.spec == heads
                np.testing.assert_allclose(got_one, want_one, atol=1e-5, rtol=1e-4)


def test_cpu_defaults_to_blockwise_attention():
    case = Case("default")
    for default, xla in zip(run(None, case), run("xla", case)):
        np.testing.assert_array_equal(default, xla)


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
        attention(*[jnp.ones((1, 8, 1, 8))] * 3, implementation=implementation)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": jnp.ones((1, 8, 8))}, "attention takes query"),
        ({"value": jnp.ones((1, 8, 2, 4))}, "attention takes query"),
        ({"query": jnp.ones((1, 8, 4, 4))}, "must agree in batch and head_dim"),
        ({"query": jnp.ones((1, 8, 3, 8))}, "num_heads 3 must be a multiple of num_kv_heads 2"),
        ({"window": 0}, "window must be at least 1"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
        ({"kv_segment_ids": jnp.ones((1, 8), int)}, "needs segment_ids as well"),
        ({"segment_ids": jnp.ones((1, 9), int)}, "segment_ids must be"),
        ({"query": jnp.ones((1, 6, 4, 8)), "segment_ids": jnp.ones((1, 6), int)}, "kv_segment_ids must be"),
    ],
)
def test_inconsistent_arguments_are_rejected(change, sentence):
    arguments = {"query": jnp.ones((1, 8, 4, 8)), "key": jnp.ones((1, 8, 2, 8)), "value": jnp.ones((1, 8, 2, 8))}
    arguments |= change
    with pytest.raises(ValueError, match=sentence):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
