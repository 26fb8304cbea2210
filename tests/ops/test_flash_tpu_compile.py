"""The flash kernels compile for real TPUs: the TPU compiler runs on a CPU without a TPU."""

import os
import subprocess
import sys

import pytest

TARGETS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]

# name: length, query heads, key-value heads, head_dim, dtype, fields of the rule, operands
CASES = {
    "grouped heads": (1024, 4, 1, 128, "bfloat16", {}, ()),
    "segments, window": (1024, 2, 2, 128, "bfloat16", {"window": 300}, ("segments",)),
    "uneven length, soft cap": (600, 2, 2, 64, "bfloat16", {"soft_cap": 30.0}, ("segments",)),
    "long rows in large blocks": (4096, 1, 1, 256, "bfloat16", {"soft_cap": 30.0}, ("segments", "alibi")),
    "float32, bidirectional": (256, 2, 2, 64, "float32", {"causal": False}, ()),
    "prefix, sinks": (1024, 2, 1, 128, "bfloat16", {}, ("segments", "prefix", "sinks")),
    "virtual tokens": (1024, 2, 1, 128, "bfloat16", {"window": 300}, ("segments", "virtual")),
    "ALiBi": (1024, 2, 1, 128, "bfloat16", {}, ("segments", "alibi")),
    "relative buckets": (600, 2, 2, 64, "bfloat16", {"causal": False}, ("buckets",)),
    "dropout, prefix, sinks": (1024, 4, 1, 128, "bfloat16", {}, ("segments", "prefix", "sinks", "dropout")),
    "dropout, buckets": (600, 2, 2, 64, "float32", {"causal": False}, ("buckets", "dropout")),
    "mask, smaller values": (512, 2, 2, 128, "bfloat16", {"causal": False}, ("mask", "values of 64")),
}


def compile_all(target: str) -> None:
    """Compile every case, forward and backward, on a mesh of the target's chips, and print its kernels and FLOPs."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from maxlm.ops.attention.dispatch import attention
    from maxlm.ops.attention.operands import AttentionOperands
    from maxlm.ops.attention.position_bias import Alibi, RelativeBuckets
    from maxlm.ops.attention.rule import AttentionRule
    from maxlm.ops.dropout import WeightDropout

    chips = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[:4]
    mesh = Mesh(np.array(chips).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    heads, rows = P("data", None, "tensor", None), P("data", None)
    for name, (length, num_heads, num_kv_heads, head_dim, dtype, fields, given) in CASES.items():
        rule = AttentionRule(head_dim**-0.5, **fields)
        value_dim = 64 if "values of 64" in given else head_dim
        # Shape, dtype and sharding of each operand.
        every = {
            "segments": ((2, length), "int32", rows),
            "prefix": ((2, length), "int32", rows),
            "alibi": ((2 * num_heads,), "float32", P("tensor")),
            "buckets": ((32, 2 * num_heads), "float32", P(None, "tensor")),
            "sinks": ((2 * num_heads,), "float32", P("tensor")),
            "virtual": ((16, 2 * num_kv_heads, head_dim), dtype, P(None, "tensor", None)),
            "mask": ((2, 1, length, length), "bool", P("data", None, None, None)),
            "dropout": ((2, length, 2 * num_heads), "uint32", P("data", None, "tensor")),
        }
        arrays = {
            "query": ((2, length, 2 * num_heads, head_dim), dtype, heads),
            "key": ((2, length, 2 * num_kv_heads, head_dim), dtype, heads),
            "value": ((2, length, 2 * num_kv_heads, value_dim), dtype, heads),
        } | {operand: every[operand] for operand in given if operand in every}
        specs = {array: spec for array, (_, _, spec) in arrays.items()}
        shapes = {
            array: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for array, (shape, dtype, spec) in arrays.items()
        }

        def local(arrays, rule=rule):
            segments, prefix = arrays.get("segments"), arrays.get("prefix")
            bias = Alibi(arrays["alibi"]) if "alibi" in arrays else None
            if "buckets" in arrays:
                bias = RelativeBuckets(arrays["buckets"], 128, not rule.causal)
            dropout = None
            if "dropout" in arrays:
                dropout = WeightDropout(arrays["dropout"], arrays["dropout"][:, :, 0], 0.1)
            operands = AttentionOperands(
                segments=None if segments is None else (segments, segments),
                prefix=None if prefix is None else (prefix, prefix),
                position_bias=bias,
                sinks_N=arrays.get("sinks"),
                mask_BNTS=arrays.get("mask"),
                virtual=(arrays["virtual"], arrays["virtual"]) if "virtual" in arrays else None,
                dropout=dropout,
            )
            return attention(arrays["query"], arrays["key"], arrays["value"], rule, operands)

        def loss(floats, rest, specs=specs, local=local):
            by_device = jax.shard_map(local, in_specs=(specs,), out_specs=heads, check_vma=False)
            return jnp.sum(by_device(floats | rest).astype(jnp.float32) ** 2)

        floats = {array: x for array, x in shapes.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        rest = {array: x for array, x in shapes.items() if array not in floats}
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(floats, rest).compile()
        text = compiled.as_text()
        kernels, flops = text.count('custom_call_target="tpu_custom_call"'), int(compiled.cost_analysis()["flops"])
        print(target, name, kernels, flops, sep=" | ", flush=True)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, tuple[int, int]]]:
    """Number of kernels and FLOPs of each case on each target; all from one process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, *TARGETS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {target: {} for target in TARGETS}
    for line in result.stdout.splitlines():
        if " | " in line:
            target, name, kernels, flops = line.split(" | ")
            found[target][name] = int(kernels), int(flops)
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_compile_to_mosaic_kernels(target, compiled):
    # The forward pass, the query gradient, and the key and value gradients.
    assert {name: kernels for name, (kernels, _) in compiled[target].items()} == dict.fromkeys(CASES, 3)
    # Cost estimates for the compiler: 9 products of 2 x length^2 x head_dim per head. With two blocks per side, causal
    # attention skips a quarter.
    _, flops = compiled[target]["grouped heads"]
    assert flops == pytest.approx(9 * 4 * 2 * 1024**2 * 128 * 3 / 4, rel=0.02)


if __name__ == "__main__":
    for target in sys.argv[1:]:
        compile_all(target)
