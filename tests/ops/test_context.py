"""Context parallelism: values and gradients against float64 loops, and the division of work."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import equations, numpy_attention

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.errors import ConfigError
from maxlm.ops.attention import reference_attention
from maxlm.ops.attention_rule import AttentionRule, mean_gradient
from maxlm.ops.context import context_attention, row_order, to_row_order, to_token_order
from maxlm.ops.flash_tpu import Kernels
from maxlm.ops.flash_xla import Blockwise
from maxlm.ops.ring import Ring, held_chunks, plan_ring, ring_attention

KERNELS = Kernels(jnp.dtype("float32"), largest_block=128, interpret=True)
HEADS = P(("data", "fsdp", "expert"), "context", "tensor", None)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    context: int
    tensor: int = 1
    fsdp: int = 1
    length: int = 32
    num_heads: int = 2
    num_kv_heads: int = 1
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    method: str = "ring"

    def inputs(self):
        """query, key, value, the output's gradient, segment ids."""
        generator = np.random.default_rng(len(self.name))
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        arrays = [generator.normal(size=(2, self.length, count, 4)).astype(np.float32) for count in heads]
        return *arrays, packed(self.length)

    def arguments(self):
        return {"causal": self.causal, "window": self.window, "soft_cap": self.soft_cap}

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
    Case("nothing masked", 4, causal=False, fsdp=2),
    Case("window to both sides", 4, causal=False, window=7),
    Case("heads exchanged, key heads sent twice", 4, fsdp=2, num_heads=4, num_kv_heads=2, method="all_to_all"),
    Case(
        "heads exchanged, sharded", 2, tensor=2, num_heads=4, num_kv_heads=4, window=9, soft_cap=2, method="all_to_all"
    ),
]


def run(case: Case, attend, *inputs):
    """Output and gradients of `attend(order, query, key, value, segments)`, called on each device's shards."""
    mesh = case.mesh()

    def whole(query, key, value, segments):
        order = row_order(case.length, case.method) if case.causal else "plain"
        arrays = [to_row_order(x, order) for x in (query, key, value, segments)]
        by_device = jax.shard_map(lambda *mine: attend(order, *mine), out_specs=HEADS, check_vma=False)
        return to_token_order(by_device(*arrays), order)

    @jax.jit
    def values_and_gradients(query, key, value, gradient, segments):
        output, transpose = jax.vjp(lambda *arrays: whole(*arrays, segments), query, key, value)
        return output, *transpose(gradient)

    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, P(*HEADS[: x.ndim]))) for x in inputs]
        return values_and_gradients(*arrays)


def run_case(case: Case, *inputs, **more):
    def attend(order, *mine):
        return context_attention(*mine, method=case.method, order=order, **case.arguments(), **more)

    return run(case, attend, *(inputs or case.inputs()))


def definition(case: Case):
    *arrays, segments = case.inputs()
    return numpy_attention(*arrays, segments, segments, scale=None, **case.arguments())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_match_whole_rows(case):
    padding = case.inputs()[-1] == 0
    for got, want in zip(run_case(case), definition(case)):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
        assert not np.asarray(got)[padding].any(), "padding is exact zeros, and so are its gradients"


def test_ring_attention_with_tpu_kernels():
    case = Case("kernels", 2, num_heads=1)

    def attend(order, *mine):
        rule = AttentionRule(**case.arguments(), scale=0.5)
        return ring_attention(Ring(rule, KERNELS, order, case.context), *mine)

    for got, want in zip(run(case, attend, *case.inputs()), definition(case)):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pieces", [Blockwise(jnp.dtype("float32")), KERNELS], ids=lambda pieces: type(pieces).__name__)
@pytest.mark.parametrize(
    "rule",
    [
        AttentionRule(True, 130, None, 0.5, offset=200),
        AttentionRule(False, 150, 2.0, 0.5, offset=-220),
        AttentionRule(True, None, None, 0.5, offset=-100),
    ],
    ids=str,
)
def test_attention_over_part_of_keys_with_offset(rule, pieces):
    """Several blocks per side, some queries fully masked; merged with an empty part it matches the definition."""
    case = Case("distance", 1, length=200)
    query, key, value, gradient, _ = (x[:1] for x in case.inputs())
    queries, keys = np.ones((1, 200), np.int32), np.ones((1, 160), np.int32)
    keys[:, :10] = 0
    key, value = key[:, :160], value[:, :160]
    want, transpose = jax.vjp(lambda *arrays: reference_attention(rule, *arrays, queries, keys), query, key, value)

    @jax.jit
    def by_pieces(query, key, value, gradient):
        operands = (rule, query, key, value, queries, keys)
        output, log_sum = pieces.forward(*operands)
        return output, log_sum, *pieces.backward(*operands, log_sum, mean_gradient(output, gradient), gradient)

    output, log_sum, *gradients = by_pieces(query, key, value, gradient)
    for got, wanted in zip((output, *gradients), (want, *transpose(gradient))):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-4)
    sees_nothing = ~np.asarray(want).any(-1)
    assert sees_nothing.any()
    np.testing.assert_array_equal(np.asarray(log_sum) > 1e29, sees_nothing)


def test_other_documents_have_no_effect():
    """Changing everything outside a document does not change a bit of the document's rows."""
    case = Case("influence", 4)
    *arrays, segments = case.inputs()
    inside = segments == 2
    before = run_case(case)[0]
    changed = [np.where(inside[:, :, None, None], x, 1e4) for x in arrays[:3]]
    after = run_case(case, *changed, *arrays[3:], segments)[0]
    np.testing.assert_array_equal(np.asarray(before)[inside], np.asarray(after)[inside])


def test_keys_are_sent_in_matmul_dtype_and_gradients_in_float32():
    case = Case("dtypes", 4)
    query, key, value, _, segments = case.inputs()
    mesh, spec = case.mesh(), P(None, "context")
    segments = jax.device_put(segments, NamedSharding(mesh, spec))

    def loss(query, key, value):
        attend = jax.shard_map(
            lambda *mine: context_attention(*mine, method="ring", order="zigzag", matmul_dtype=jnp.bfloat16),
            in_specs=(spec,) * 4,
            out_specs=spec,
            check_vma=False,
        )
        return jnp.sum(attend(query, key, value, segments) ** 2)

    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
        forward, both = (jax.make_jaxpr(f)(*arrays) for f in (loss, jax.grad(loss, argnums=(0, 1, 2))))

    def sent(jaxpr):
        return {e.invars[0].aval.dtype.name for e in equations(jaxpr.jaxpr) if e.primitive.name == "ppermute"}

    assert sent(forward) == {"bfloat16", "int32"}
    assert sent(both) == {"bfloat16", "int32", "float32"}


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
    rule = AttentionRule(causal, window, None, 1.0)
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
    rule = AttentionRule(True, None, None, 1.0)
    steps = plan_ring(rule, "zigzag", size, 16)
    assert len(steps) == size
    for step in steps:
        work = [sorted(seen_by_chunk(slot[d].rule, 1, 16).item() for slot in step.slots) for d in range(size)]
        assert all(each == work[0] for each in work)
        assert work[0] == ([136, 136, 256] if step.shift == 0 else [256, 256])


def test_plain_order_is_unbalanced():
    steps = plan_ring(AttentionRule(True, None, None, 1.0), "plain", 4, 16)
    assert [sum(slot[d] is not None for step in steps for slot in step.slots) for d in range(4)] == [1, 2, 3, 4]


def test_window_limits_how_far_keys_are_sent():
    """A chunk attends to itself and the one before it: a zigzag needs only the neighbors on either side."""
    steps = plan_ring(AttentionRule(True, 16, None, 1.0), "zigzag", 8, 16)
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
        run_case(dataclasses.replace(Case("refused", 4), **changes), **settings)
