"""GPU attention, as far as testable without a GPU: the programs lower, and contain their masks."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from maxlm.ops import attention as attention_module
from maxlm.ops.attention import attention
from maxlm.ops.attention_rule import AttentionRule

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


def cudnn(window=None):
    def call(query, key, value, segments):
        rule = AttentionRule(causal=True, window=window, soft_cap=None, scale=0.125)
        return attention_module._cudnn_attention(rule, query, key, value, segments, segments)

    return call


@pytest.mark.usefixtures("with_cudnn")
def test_cudnn_gets_segments_as_a_mask_in_forward_and_backward():
    calls = cudnn_calls(lowered_gradient(cudnn()))
    assert set(calls) == {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}
    for operands in calls.values():
        assert "tensor<2x1x256x256xbf16>" in operands


@pytest.mark.usefixtures("with_cudnn")
def test_cudnn_without_segments_needs_no_mask():
    def call(query, key, value, _):
        rule = AttentionRule(causal=True, window=None, soft_cap=None, scale=0.125)
        return attention_module._cudnn_attention(rule, query, key, value, None, None)

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

    for segment_ids, window in [(segments, None), (segments, 7), (None, 7), (None, None)]:
        rule = AttentionRule(causal=True, window=window, soft_cap=None, scale=0.25)
        arguments = {"segment_ids": segment_ids, "window": window, "implementation": "reference"}

        def got(query, key, value, rule=rule, segment_ids=segment_ids):
            return attention_module._cudnn_attention(rule, query, key, value, segment_ids, segment_ids)

        def want(query, key, value, arguments=arguments):
            return attention(query, key, value, **arguments)

        for got_one, want_one in zip(values_and_gradients(got), values_and_gradients(want)):
            assert jnp.allclose(got_one, want_one, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_blockwise_attention_lowers_for_gpus(soft_cap):
    def call(query, key, value, segments):
        return attention(query, key, value, segment_ids=segments, window=100, soft_cap=soft_cap, implementation="xla")

    assert "dot_general" in lowered_gradient(call)


def default_implementation(monkeypatch, platform: str, query=QUERY, **arguments) -> str:
    """The implementation that `None` selects on a platform."""
    monkeypatch.setattr(attention_module, "traced_platform", lambda: platform)
    rule = AttentionRule(**{"causal": True, "window": None, "soft_cap": None, "scale": 1.0} | arguments)
    return attention_module._best_implementation(query, query.shape[1], rule, query.dtype)


def test_default_implementation_by_platform(monkeypatch):
    assert default_implementation(monkeypatch, "tpu") == "pallas_tpu"
    assert default_implementation(monkeypatch, "tpu", jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.bfloat16)) == "xla"
    assert default_implementation(monkeypatch, "cuda") == "cudnn"
    assert default_implementation(monkeypatch, "cuda", soft_cap=30.0) == "xla"
    assert default_implementation(monkeypatch, "cuda", jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.float32)) == "xla"
    assert default_implementation(monkeypatch, "cuda", jax.ShapeDtypeStruct((2, 255, 8, 64), jnp.bfloat16)) == "xla"
    assert default_implementation(monkeypatch, "cuda", jax.ShapeDtypeStruct((2, 256, 8, 256), jnp.bfloat16)) == "xla"
    assert default_implementation(monkeypatch, "rocm") == "xla"
    assert default_implementation(monkeypatch, "cpu") == "xla"
