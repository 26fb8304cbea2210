"""GPU attention, as far as testable without a GPU: the programs lower, and contain their masks."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from maxlm.errors import ConfigError
from maxlm.ops.attention import dispatch, flash_cudnn
from maxlm.ops.attention.dispatch import attention
from maxlm.ops.attention.flash_cudnn import cudnn_attention
from maxlm.ops.attention.operands import NO_OPERANDS, AttentionOperands
from maxlm.ops.attention.position_bias import Alibi
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout

QUERY = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
KEY = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
SEGMENTS = jax.ShapeDtypeStruct((2, 256), jnp.int32)


def lowered_gradient(call) -> str:
    def loss(query, key, value, segments):
        return jnp.sum(call(query, key, value, segments).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(QUERY, KEY, KEY, SEGMENTS)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text: str) -> dict[str, str]:
    """The operand types of each call into cuDNN, by its name."""
    return dict(re.findall(r"@__cudnn\$(\w+)\(.*: \((.*)\) ->", text))


@pytest.fixture
def with_cudnn(monkeypatch):
    """Lowering requests the cuDNN version, which a machine without a GPU does not have."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("operand", ["segments", "prefix"])
@pytest.mark.usefixtures("with_cudnn")
def test_cudnn_gets_ids_as_a_mask_in_forward_and_backward(operand):
    def call(query, key, value, ids):
        operands = AttentionOperands(**{operand: (ids, ids)})
        return cudnn_attention(AttentionRule(0.125), query, key, value, operands)

    calls = cudnn_calls(lowered_gradient(call))
    assert set(calls) == {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}
    for operands in calls.values():
        assert "tensor<2x1x256x256xbf16>" in operands


@pytest.mark.usefixtures("with_cudnn")
def test_cudnn_without_segments_needs_no_mask():
    def call(query, key, value, _):
        return cudnn_attention(AttentionRule(0.125), query, key, value)

    calls = cudnn_calls(lowered_gradient(call))
    assert set(calls) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
    assert not any("256x256" in operands for operands in calls.values())


def test_cudnn_mask_matches_definition(monkeypatch):
    """Run on the other backend of the same JAX function: tests our masks, flags and zeroed rows."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **more: plain(*args, implementation="xla", **more),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, 40, heads, 16)) for k, heads in zip(keys, (4, 2, 2)))
    segments = jnp.asarray([[1] * 10 + [2] * 20 + [0] * 10])

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(call):
        output, transpose = jax.vjp(call, query, key, value)
        return output, *transpose(query)

    in_segments = AttentionOperands(segments=(segments, segments))
    prefix = jnp.asarray([[0] * 5 + [1] * 20 + [0] * 15])
    in_prefix = dataclasses.replace(in_segments, prefix=(prefix, prefix))
    by_head = AttentionOperands(mask_BNTS=jax.random.bernoulli(keys[0], 0.5, (1, 4, 40, 40)))
    causal, window = AttentionRule(0.25), AttentionRule(0.25, window=7)
    both_ways, later = AttentionRule(0.25, causal=False), AttentionRule(0.25, offset=5)
    for rule, operands in [
        (causal, in_segments),
        (window, in_segments),
        (window, NO_OPERANDS),
        (causal, NO_OPERANDS),
        (causal, in_prefix),
        (window, in_prefix),
        (both_ways, by_head),
        (later, by_head),
    ]:

        def got(query, key, value, rule=rule, operands=operands):
            return cudnn_attention(rule, query, key, value, operands)

        def want(query, key, value, rule=rule, operands=operands):
            return attention(query, key, value, rule, operands, implementation="reference")

        for got_one, want_one in zip(values_and_gradients(got), values_and_gradients(want)):
            assert jnp.allclose(got_one, want_one, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_blockwise_attention_lowers_for_gpus(soft_cap):
    def call(query, key, value, segments):
        rule, operands = AttentionRule(0.125, window=100, soft_cap=soft_cap), AttentionOperands((segments, segments))
        return attention(query, key, value, rule, operands, implementation="xla")

    assert "dot_general" in lowered_gradient(call)


@pytest.fixture
def platform(monkeypatch):
    """Sets the platform that is traced for."""

    def choose(name: str) -> None:
        for module in (dispatch, flash_cudnn):
            monkeypatch.setattr(module, "traced_platform", lambda: name)

    return choose


def default_implementation(query=QUERY, value=None, rule=AttentionRule(1.0), **operands) -> str:  # noqa: B008
    """The implementation that `None` selects."""
    return dispatch._best_implementation(query, value or query, rule, AttentionOperands(**operands), query.dtype)


def query(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


BIAS = jnp.zeros((1, 8, 256, 256))


def test_default_implementation_on_tpus_and_cpus(platform):
    platform("tpu")
    assert default_implementation() == "pallas_tpu"
    assert default_implementation(query(2, 8, 8, 64)) == "xla"
    assert default_implementation(sinks_N=jnp.zeros(8), position_bias=Alibi(jnp.zeros(8))) == "pallas_tpu"
    assert default_implementation(bias_BNTS=BIAS) == "xla"
    for other in ("rocm", "cpu"):
        platform(other)
        assert default_implementation() == "xla"


# Query, rule and operands that cuDNN cannot take, and why.
REFUSED = [
    ({"rule": AttentionRule(1.0, soft_cap=30.0)}, "does not support a soft cap"),
    ({"sinks_N": jnp.zeros(8)}, "does not support sinks"),
    ({"virtual": (jnp.zeros((3, 8, 64)),) * 2}, "does not support virtual tokens"),
    ({"position_bias": Alibi(jnp.zeros(8))}, "does not support a position_bias"),
    ({"bias_BNTS": BIAS}, "does not support an array of biases"),
    (
        {"dropout": WeightDropout(jnp.zeros((2, 256, 8), jnp.uint32), jnp.zeros((2, 256)), 0.1)},
        "does not support dropout",
    ),
    ({"value": query(2, 256, 8, 32)}, "does not support a value_dim of 32 with a head_dim of 64"),
    ({"query": query(2, 256, 8, 64, dtype=jnp.float32)}, "multiplies 16-bit floats, not float32"),
    ({"query": query(2, 255, 8, 64)}, "needs even lengths, not 255 and 255"),
    ({"query": query(2, 256, 8, 256)}, "needs a head_dim that is a multiple of 8 up to 128, not 256"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_cudnn_refuses_by_name_what_it_cannot_compute(platform, given, reason):
    platform("cuda")
    assert default_implementation() == "cudnn"
    assert default_implementation(**given) == "xla"
    given = {"query": QUERY, "rule": AttentionRule(1.0)} | given
    of_query, rule = given.pop("query"), given.pop("rule")
    value = given.pop("value", of_query)
    operands = AttentionOperands(**given)
    with pytest.raises(ConfigError, match=f"'cudnn' {reason}.*choose 'xla' or None"):
        jax.eval_shape(
            lambda query, value: attention(query, query, value, rule, operands, implementation="cudnn"), of_query, value
        )
