"""Context parallelism: values and gradients against float64 loops, and the division of work."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import MAX_DISTANCE, equations, position_bias
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy_attention import numpy_attention, numpy_bucket, numpy_kept

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.errors import ConfigError
from maxlm.ops.attention.context import context_attention, row_order, to_row_order, to_token_order
from maxlm.ops.attention.definition import reference_attention
from maxlm.ops.attention.flash import heads_first
from maxlm.ops.attention.flash_tpu import Kernels
from maxlm.ops.attention.flash_xla import Blockwise
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.ring import Ring, held_chunks, plan_ring, ring_attention
from maxlm.ops.attention.rule import AttentionRule, mean_gradient
from maxlm.ops.dropout import WeightDropout

KERNELS = Kernels(jnp.dtype("float32"), jnp.dtype("float32"), largest_block=128, interpret=True)
HEADS = P(("data", "fsdp", "expert"), "context", "tensor", None)


@dataclasses.dataclass(frozen=True)
class Case:
    """bias: "alibi" or "t5"."""

    name: str
    context: int
    tensor: int = 1
    fsdp: int = 1
    length: int = 32
    num_heads: int = 2
    num_kv_heads: int = 1
    value_dim: int = 4
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    segments: bool = True
    prefix: bool = False
    bias: str | None = None
    sinks: bool = False
    dropout: float = 0.0
    method: str = "ring"
    virtual: int = 0

    def inputs(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays that have a gradient, by name, and the gradient of the output."""
        generator = np.random.default_rng(len(self.name))
        shapes = {
            "query": (2, self.length, self.num_heads, 4),
            "key": (2, self.length, self.num_kv_heads, 4),
            "value": (2, self.length, self.num_kv_heads, self.value_dim),
            "gradient": (2, self.length, self.num_heads, self.value_dim),
        }
        if self.bias:
            shapes["bias"] = (8, self.num_heads) if self.bias == "t5" else (self.num_heads,)
        if self.sinks:
            shapes["sinks"] = (self.num_heads,)
        if self.virtual:
            shapes["virtual_key"] = (self.virtual, self.num_kv_heads, 4)
            shapes["virtual_value"] = (self.virtual, self.num_kv_heads, self.value_dim)
        arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        gradient = arrays.pop("gradient")
        return arrays, gradient

    def seeds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of dropout: of queries [rows, length, num_heads], and of keys [rows, length]."""
        shapes = (2, self.length, self.num_heads), (2, self.length)
        return tuple(np.random.default_rng(1).integers(2**32, size=shape, dtype=np.uint32) for shape in shapes)

    @property
    def rule(self) -> AttentionRule:
        return AttentionRule(0.5, self.causal, self.window, self.soft_cap)

    def mesh(self):
        return make_mesh(MeshConfig(context=self.context, tensor=self.tensor, fsdp=self.fsdp))


def packed(length: int) -> np.ndarray:
    """Documents that end inside a chunk, at its end and one token past it; padding inside and at the end.

    The second row has only padding in its first quarter.
    """
    quarter = length // 4
    first = np.repeat(
        [1, 2, 3, 0, 4, 0], [quarter, quarter + 1, quarter // 2, 1, quarter - 1, quarter - quarter // 2 - 1]
    )
    second = np.repeat([0, 5, 6], [quarter, 2 * quarter + 1, quarter - 1])
    return np.stack([first, second]).astype(np.int32)


CASES = [
    Case("two devices", 2),
    Case("four devices, heads sharded too", 4, tensor=2, num_heads=4, num_kv_heads=2),
    Case("eight devices, one token longer than a chunk", 8, window=3),
    Case("window over several chunks, soft cap", 8, window=11, soft_cap=1.5),
    Case("window of one token", 4, window=1),
    Case("chunks of odd number, in order", 4, length=36, num_heads=1, window=20),
    Case("nothing masked, no segments", 4, causal=False, fsdp=2, segments=False),
    Case("window to both sides", 4, causal=False, window=7),
    Case("prefix", 4, prefix=True, num_heads=1),
    Case("prefix, window over several chunks", 4, prefix=True, window=9),
    Case("ALiBi, heads sharded", 4, tensor=2, num_heads=4, num_kv_heads=2, bias="alibi"),
    Case("ALiBi, nothing masked", 4, causal=False, bias="alibi"),
    Case("relative buckets, window, rows sharded", 4, fsdp=2, bias="t5", window=11),
    Case("relative buckets to both sides, in order", 4, length=36, causal=False, bias="t5"),
    Case("sinks, values of another size", 4, sinks=True, value_dim=6),
    Case("virtual tokens, window, heads and rows sharded", 2, 2, 2, num_kv_heads=2, virtual=3, window=5),
    Case("virtual tokens, in order, soft cap", 4, length=36, virtual=5, soft_cap=1.5, sinks=True),
    Case("dropout, heads sharded", 4, tensor=2, num_heads=4, num_kv_heads=2, dropout=0.3),
    Case("dropout, prefix, window, in order", 4, length=36, prefix=True, window=11, dropout=0.5),
    Case("dropout, nothing masked", 4, fsdp=2, causal=False, segments=False, bias="t5", sinks=True, dropout=0.3),
    Case(
        "heads exchanged, all operands",
        2,
        num_heads=4,
        prefix=True,
        bias="t5",
        sinks=True,
        dropout=0.3,
        tensor=2,
        num_kv_heads=2,
        method="all_to_all",
    ),
    Case(
        "heads exchanged, key heads sent twice", 4, fsdp=2, num_heads=4, num_kv_heads=2, method="all_to_all", virtual=3
    ),
    Case(
        "heads exchanged, sharded", 2, tensor=2, num_heads=4, num_kv_heads=4, window=9, soft_cap=2, method="all_to_all"
    ),
]


def prefix_of(length: int) -> np.ndarray:
    """A prefix over half of the first row, and one in the middle of the second row."""
    position = np.arange(length)
    second = (position > length // 3) & (position <= 2 * length // 3)
    return np.stack([position < length // 2, second]).astype(np.int32)


def run(case: Case, attend=None, inputs=None, **more) -> dict[str, jax.Array]:
    """The output and the gradients of `Case.inputs`, by name.

    attend(order, query, key, value, operands): called on each device's shards; by default `context_attention`.
    """
    mesh, (arrays, gradient) = case.mesh(), inputs or case.inputs()
    per_head = {"bias": P(None, "tensor") if case.bias == "t5" else P("tensor"), "sinks": P("tensor")}
    per_head |= dict.fromkeys(("virtual_key", "virtual_value"), P(None, "tensor"))
    specs = {name: per_head.get(name, HEADS) for name in arrays}
    rows, by_head = P(*HEADS[:2]), P(*HEADS[:3])
    of_tokens = (rows, rows, (by_head, rows))

    def attend_context(order, query, key, value, operands):
        return context_attention(query, key, value, case.rule, operands, method=case.method, order=order, **more)

    def local(order, arrays, segments, prefix, seeds):
        operands = AttentionOperands(
            segments=(segments, segments) if case.segments else None,
            prefix=(prefix, prefix) if case.prefix else None,
            position_bias=position_bias(case.bias, arrays.get("bias"), case.causal),
            sinks_N=arrays.get("sinks"),
            virtual=(arrays["virtual_key"], arrays["virtual_value"]) if case.virtual else None,
            dropout=WeightDropout(*seeds, case.dropout) if case.dropout else None,
        )
        return (attend or attend_context)(order, arrays["query"], arrays["key"], arrays["value"], operands)

    def whole(arrays, *tokens):
        order = row_order(case.length, case.method) if case.causal else "plain"
        arrays = {name: x if name in per_head else to_row_order(x, order) for name, x in arrays.items()}
        tokens = jax.tree.map(lambda x: to_row_order(x, order), tokens)
        by_device = jax.shard_map(
            functools.partial(local, order), in_specs=(specs, *of_tokens), out_specs=HEADS, check_vma=False
        )
        return to_token_order(by_device(arrays, *tokens), order)

    @jax.jit
    def values_and_gradients(arrays, gradient, *tokens):
        output, transpose = jax.vjp(lambda arrays: whole(arrays, *tokens), arrays)
        return {"output": output, **transpose(gradient)[0]}

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        arrays = {name: put(x, specs[name]) for name, x in arrays.items()}
        tokens = jax.tree.map(put, (packed(case.length), prefix_of(case.length), case.seeds()), of_tokens)
        return values_and_gradients(arrays, put(gradient, HEADS), *tokens)


def definition(case: Case) -> dict[str, np.ndarray]:
    arrays, gradient = case.inputs()
    segments, prefix = packed(case.length), prefix_of(case.length)
    distance = np.arange(case.length)[:, None] - np.arange(case.length)[None, :]
    bias = buckets = None
    if case.bias == "alibi":
        bias = -arrays["bias"].astype(np.float64)[:, None, None] * np.abs(distance)
    elif case.bias == "t5":
        bucket = np.vectorize(lambda d: numpy_bucket(d, 8, MAX_DISTANCE, not case.causal))
        buckets = bucket(distance)
        bias = np.moveaxis(arrays["bias"].astype(np.float64)[buckets], -1, 0)
    results = numpy_attention(
        *(arrays[name] for name in ("query", "key", "value")),
        gradient,
        causal=case.causal,
        window=case.window,
        soft_cap=case.soft_cap,
        segments=(segments, segments) if case.segments else None,
        prefix=(prefix, prefix) if case.prefix else None,
        bias=None if bias is None else np.broadcast_to(bias, (2, *bias.shape)),
        sinks=arrays.get("sinks"),
        virtual=(arrays["virtual_key"], arrays["virtual_value"]) if case.virtual else None,
        kept=numpy_kept(*case.seeds(), case.dropout) if case.dropout else None,
    )
    of_matrix = results.pop("bias").sum(0)
    if case.bias == "alibi":
        results["bias"] = -(of_matrix * np.abs(distance)).sum((1, 2))
    elif case.bias == "t5":
        results["bias"] = np.zeros_like(arrays["bias"], np.float64)
        np.add.at(results["bias"], buckets, np.moveaxis(of_matrix, 0, -1))
    return {name: results[name] for name in ("output", *arrays)}


def check(case: Case, results) -> None:
    want, padding = definition(case), packed(case.length) == 0
    assert results.keys() == want.keys()
    for name, got in results.items():
        np.testing.assert_allclose(got, want[name], atol=1e-5, rtol=1e-4, err_msg=name)
        if case.segments and name not in ("bias", "sinks", "virtual_key", "virtual_value"):
            assert not np.asarray(got)[padding].any(), "padding is exact zeros, and so are its gradients"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_match_whole_rows(case):
    check(case, run(case))


def test_ring_attention_with_tpu_kernels():
    case = Case("kernels", 2, num_heads=1, bias="alibi", sinks=True, dropout=0.3)

    def attend(order, query, key, value, operands):
        operands = operands.by_distance(0, case.length, case.length)
        return ring_attention(Ring(case.rule, KERNELS, order, case.context), query, key, value, operands)

    check(case, run(case, attend))


@pytest.mark.parametrize("pieces", [Blockwise(jnp.dtype("float32")), KERNELS], ids=lambda pieces: type(pieces).__name__)
@pytest.mark.parametrize(
    "rule",
    [
        AttentionRule(0.5, True, 130, None, offset=200),
        AttentionRule(0.5, False, 150, 2.0, offset=-220),
        AttentionRule(0.5, True, None, None, offset=-100),
    ],
    ids=str,
)
def test_attention_over_part_of_keys_with_offset(rule, pieces):
    """Several blocks per side, some queries fully masked; merged with an empty part it matches the definition."""
    arrays, gradient = Case("distance", 1, length=200).inputs()
    query, key, value, gradient = (x[:1] for x in (*arrays.values(), gradient))
    queries, keys = np.ones((1, 200), np.int32), np.ones((1, 160), np.int32)
    keys[:, :10] = 0
    key, value = key[:, :160], value[:, :160]
    operands = AttentionOperands(segments=(queries, keys))
    want, transpose = jax.vjp(lambda *arrays: reference_attention(rule, *arrays, operands), query, key, value)

    @jax.jit
    def by_pieces(query, key, value, gradient):
        *arrays, gradient = heads_first(query, key, value, gradient)
        output, log_sum = pieces.forward(rule, *arrays, operands)
        *gradients, _ = pieces.backward(rule, *arrays, operands, log_sum, mean_gradient(output, gradient), gradient)
        return *heads_first(output, *gradients), log_sum.swapaxes(1, 2)

    output, *gradients, log_sum = by_pieces(query, key, value, gradient)
    for got, wanted in zip((output, *gradients), (want, *transpose(gradient))):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-4)
    sees_nothing = ~np.asarray(want).any(-1)
    assert sees_nothing.any()
    np.testing.assert_array_equal(np.asarray(log_sum) > 1e29, sees_nothing)


def test_other_documents_have_no_effect():
    """Changing everything outside a document does not change a bit of the document's rows."""
    case = Case("influence", 4)
    arrays, gradient = case.inputs()
    inside = packed(case.length) == 2
    changed = {name: np.where(inside[:, :, None, None], x, np.float32(1e4)) for name, x in arrays.items()}
    before, after = (np.asarray(run(case, inputs=(x, gradient))["output"])[inside] for x in (arrays, changed))
    np.testing.assert_array_equal(before, after)


def test_keys_are_sent_in_matmul_dtype_and_gradients_in_float32():
    case = Case("dtypes", 4)
    (arrays, _), mesh, spec = case.inputs(), case.mesh(), P(None, "context")
    segments = jax.device_put(packed(case.length), NamedSharding(mesh, spec))

    def attend(query, key, value, segments):
        operands = AttentionOperands(segments=(segments, segments))
        return context_attention(
            query, key, value, case.rule, operands, method="ring", order="zigzag", matmul_dtype=jnp.bfloat16
        )

    def loss(query, key, value):
        by_device = jax.shard_map(attend, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
        return jnp.sum(by_device(query, key, value, segments) ** 2)

    with jax.set_mesh(mesh):
        put = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays.values()]
        forward, both = (jax.make_jaxpr(f)(*put) for f in (loss, jax.grad(loss, argnums=(0, 1, 2))))

    def sent(jaxpr):
        return {e.invars[0].aval.dtype.name for e in equations(jaxpr.jaxpr) if e.primitive.name == "ppermute"}

    assert sent(forward) == {"bfloat16", "uint32"}
    assert sent(both) == {"bfloat16", "uint32", "float32"}


# Division of work


def seen_by_chunk(rule: AttentionRule, chunks: int, chunk_length: int) -> np.ndarray:
    """Number of unmasked token pairs for each chunk of queries and chunk of keys, by the rule alone."""
    position = np.arange(chunks * chunk_length)
    visible = np.broadcast_to(rule.sees(position[:, None], position[None, :]), (position.size,) * 2)
    return visible.reshape(chunks, chunk_length, chunks, chunk_length).sum((1, 3))


@pytest.mark.parametrize("order", ["zigzag", "plain"])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 7), (True, 30), (False, None), (False, 9)]
)
def test_plan_has_each_unmasked_pair_of_chunks_exactly_once(causal, window, order):
    size, chunk_length = 4, 6
    rule = AttentionRule(1.0, causal, window)
    chunks = held_chunks(order, size)
    seen = seen_by_chunk(rule, size * len(chunks[0]), chunk_length)
    planned = np.zeros_like(seen)
    for step in plan_ring(rule, order, size, chunk_length):
        for slot, device in itertools.product(step.slots, range(size)):
            if pair := slot[device]:
                position = np.arange(chunk_length)
                sees = np.broadcast_to(pair.rule.sees(position[:, None], position[None]), (chunk_length,) * 2)
                planned[chunks[device][pair.query], chunks[device - step.shift][pair.key]] += sees.sum()
    np.testing.assert_array_equal(planned, seen)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_causal_work_is_balanced_over_devices_in_every_step(size):
    """After the first step, in which each device attends to its own keys, two whole pairs of chunks out of four."""
    rule = AttentionRule(1.0)
    steps = plan_ring(rule, "zigzag", size, 16)
    assert len(steps) == size
    for step in steps:
        work = [sorted(seen_by_chunk(slot[d].rule, 1, 16).item() for slot in step.slots) for d in range(size)]
        assert all(each == work[0] for each in work)
        assert work[0] == ([136, 136, 256] if step.shift == 0 else [256, 256])


def test_plain_order_is_unbalanced():
    steps = plan_ring(AttentionRule(1.0), "plain", 4, 16)
    assert [sum(slot[d] is not None for step in steps for slot in step.slots) for d in range(4)] == [1, 2, 3, 4]


def test_window_limits_how_far_keys_are_sent():
    """A chunk attends to itself and the one before it: a zigzag needs only the neighbors on either side."""
    steps = plan_ring(AttentionRule(1.0, window=16), "zigzag", 8, 16)
    assert [step.shift for step in steps] == [0, 1, 7]
    for step in steps[1:]:
        assert len(step.slots) == 1


# Row order


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_gives_each_device_a_chunk_from_either_half_and_is_invertible(size):
    mesh = make_mesh(MeshConfig(context=size, fsdp=1))
    rows = np.arange(2 * 4 * size).reshape(2, 4 * size)
    with jax.set_mesh(mesh):
        x = jax.device_put(rows, NamedSharding(mesh, P(None, "context")))
        laid_out = jax.jit(lambda x: to_row_order(x, "zigzag"))(x)
        back = jax.jit(lambda x: to_token_order(x, "zigzag"))(laid_out)
    chunks = rows.reshape(2, 2 * size, 2)
    for device, (low, high) in enumerate(held_chunks("zigzag", size)):
        np.testing.assert_array_equal(
            np.asarray(laid_out)[:, 4 * device : 4 * device + 4], np.hstack([chunks[:, low], chunks[:, high]])
        )
    np.testing.assert_array_equal(back, rows)
    assert laid_out.sharding.spec == back.sharding.spec == P(None, "context")


def test_row_order_follows_from_length_and_method():
    assert row_order(30, "ring") == "plain", "no mesh, no order"
    with jax.set_mesh(make_mesh(MeshConfig(context=4, fsdp=1))):
        assert row_order(32, "ring") == "zigzag"
        assert row_order(36, "ring") == "plain"
        assert row_order(32, "all_to_all") == "plain"
        with pytest.raises(ConfigError, match=r"rows of 30 tokens are not divisible by mesh.context = 4; make them 32"):
            row_order(30, "ring")


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"method": "all_to_all", "num_heads": 2},
            {},
            "cannot split a device's 2 heads .* choose ring, or mesh.context=2",
        ),
        ({}, {"implementation": "reference"}, "'reference' does not support ring attention .* choose 'xla' or 'auto'"),
        ({}, {"implementation": "pallas_tpu"}, "'pallas_tpu' needs a TPU, not cpu"),
    ],
)
def test_unsupported_settings_are_rejected_with_a_remedy(changes, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(dataclasses.replace(Case("refused", 4), **changes), **settings)


@pytest.mark.parametrize(("operand", "name"), [("mask_BNTS", "a mask"), ("bias_BNTS", "an array of biases")])
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_matrices_are_rejected_with_a_remedy(method, operand, name):
    case = Case("refused", 4, method=method, num_heads=4)

    def attend(order, query, key, value, operands):
        operands = dataclasses.replace(operands, **{operand: jnp.ones((1, 1, 8, 32))})
        return context_attention(query, key, value, case.rule, operands, method=method, order=order)

    message = f"execution.context_attention: {method} does not support {name}; choose mesh.context=1"
    with pytest.raises(ConfigError, match=message):
        run(case, attend)
