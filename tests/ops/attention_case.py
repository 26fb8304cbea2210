"""Cases of attention: their arrays, the float64 results, and the results of an implementation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy_attention import numpy_attention, numpy_bucket, numpy_kept

from maxlm.ops.attention.dispatch import attention
from maxlm.ops.attention.flash import flash_attention
from maxlm.ops.attention.flash_tpu import Kernels
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import Alibi, RelativeBuckets
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout

BATCH, MAX_DISTANCE = 2, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """bias: "alibi", "t5" or "array"; mask: the number of its heads; virtual: the number of such tokens."""

    name: str
    length: int = 150
    kv_length: int | None = None
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    segments: bool = False
    prefix: bool = False
    bias: str | None = None
    sinks: bool = False
    mask: int = 0
    dropout: float = 0.0
    virtual: int = 0

    def inputs(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays that have a gradient, by name, and the gradient of the output."""
        generator = np.random.default_rng(len(self.name))
        kv_length, value_dim = self.kv_length or self.length, self.value_dim or self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "query": (BATCH, self.length, self.num_heads, self.head_dim),
            "key": (BATCH, kv_length, self.num_kv_heads, self.head_dim),
            "value": (BATCH, kv_length, self.num_kv_heads, value_dim),
            "gradient": (BATCH, self.length, self.num_heads, value_dim),
        }
        of_bias: dict[str | None, tuple[int, ...]] = {
            "alibi": (self.num_heads,),
            "t5": (16, self.num_heads),
            "array": (1, self.num_heads, self.length, kv_length),
        }
        if self.bias:
            shapes["bias"] = of_bias[self.bias]
        if self.sinks:
            shapes["sinks"] = (self.num_heads,)
        if self.virtual:
            shapes["virtual_key"] = (self.virtual, self.num_kv_heads, self.head_dim)
            shapes["virtual_value"] = (self.virtual, self.num_kv_heads, value_dim)
        arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        if self.bias == "alibi":
            arrays["bias"] = np.abs(arrays["bias"]) / 20
        gradient = arrays.pop("gradient")
        return arrays, gradient

    def ids(self) -> dict[str, Any]:
        """Segments, prefixes and the mask [1, heads, length, kv_length], by name; only those of this case."""
        kv_length = self.kv_length or self.length
        ids: dict[str, Any] = {}
        if self.segments:
            ids["segments"] = packed_segments(self.length), packed_segments(kv_length)
        if self.prefix:
            ids["prefix"] = prefixes(self.length), prefixes(kv_length)
        if self.mask:
            ids["mask"] = np.random.default_rng(0).random((1, self.mask, self.length, kv_length)) < 0.5
            # A query without keys, if the mask is the same for all heads.
            ids["mask"][:, 0, 5] = False
        return ids

    def seeds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of dropout: of queries [batch, length, num_heads], and of keys [batch, kv_length]."""
        generator = np.random.default_rng(1)
        shapes = (BATCH, self.length, self.num_heads), (BATCH, self.kv_length or self.length)
        return tuple(generator.integers(2**32, size=shape, dtype=np.uint32) for shape in shapes)

    @property
    def rule(self) -> AttentionRule:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return AttentionRule(scale, self.causal, self.window, self.soft_cap)

    def operands(self, arrays) -> AttentionOperands:
        ids = self.ids()
        bias = arrays.get("bias")
        return AttentionOperands(
            segments=ids.get("segments"),
            prefix=ids.get("prefix"),
            position_bias=position_bias(self.bias, bias, self.causal),
            sinks_N=arrays.get("sinks"),
            mask_BNTS=ids.get("mask"),
            bias_BNTS=bias if self.bias == "array" else None,
            dropout=WeightDropout(*self.seeds(), self.dropout) if self.dropout else None,
            virtual=(arrays["virtual_key"], arrays["virtual_value"]) if self.virtual else None,
        )


def position_bias(kind: str | None, array, causal: bool):
    if kind == "alibi":
        return Alibi(array)
    return RelativeBuckets(array, MAX_DISTANCE, bidirectional=not causal) if kind == "t5" else None


def packed_segments(length: int) -> np.ndarray:
    """Two rows of documents: one ends in padding, one has padding inside and a document split in two."""
    position = np.arange(length) / length
    first = np.select([position < 0.3, position < 0.45, position < 0.9], [1, 2, 3], 0)
    second = np.select([position < 0.2, position < 0.3, position < 0.7], [7, 0, 5], 7)
    return np.stack([first, second]).astype(np.int32)


def prefixes(length: int) -> np.ndarray:
    """A row with one prefix at its start, and a row with two in its middle that touch."""
    position = np.arange(length) / length
    first = np.where(position < 0.4, 1, 0)
    second = np.select([position < 0.25, position < 0.5, position < 0.95], [0, 2, 3], 0)
    return np.stack([first, second]).astype(np.int32)


def bias_buckets(case: Case) -> np.ndarray:
    """The bucket of every query and key [length, kv_length]."""
    kv_length = case.kv_length or case.length
    by_distance = {
        distance: numpy_bucket(distance, 16, MAX_DISTANCE, not case.causal)
        for distance in range(-kv_length, case.length)
    }
    return np.array([[by_distance[i - j] for j in range(kv_length)] for i in range(case.length)])


def definition(case: Case, inputs=None) -> dict[str, np.ndarray]:
    """The output and the gradients of `Case.inputs`, by name, in float64."""
    arrays, gradient = inputs or case.inputs()
    kv_length = case.kv_length or case.length
    matrix = (BATCH, case.num_heads, case.length, kv_length)
    distance = np.abs(np.arange(case.length)[:, None] - np.arange(kv_length)[None, :])
    ids = case.ids()
    options = {
        "scale": case.scale,
        "causal": case.causal,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "segments": ids.get("segments"),
        "prefix": ids.get("prefix"),
        "sinks": arrays.get("sinks"),
        "virtual": (arrays["virtual_key"], arrays["virtual_value"]) if case.virtual else None,
        "mask": np.broadcast_to(ids["mask"], matrix) if case.mask else None,
        "kept": numpy_kept(*case.seeds(), case.dropout) if case.dropout else None,
    }
    if case.bias:
        bias = arrays["bias"].astype(np.float64)
        whole = {
            "alibi": lambda: -bias[:, None, None] * distance,
            "t5": lambda: np.moveaxis(bias[bias_buckets(case)], -1, 0),
            "array": lambda: bias,
        }
        options["bias"] = np.broadcast_to(whole[case.bias](), matrix)
    results = numpy_attention(*(arrays[name] for name in ("query", "key", "value")), gradient, **options)
    of_matrix = results.pop("bias").sum(0)
    if case.bias == "alibi":
        results["bias"] = -(of_matrix * distance).sum((1, 2))
    elif case.bias == "t5":
        results["bias"] = np.zeros_like(arrays["bias"], np.float64)
        np.add.at(results["bias"], bias_buckets(case), np.moveaxis(of_matrix, 0, -1))
    elif case.bias == "array":
        results["bias"] = of_matrix[None]
    return {name: results[name] for name in ("output", *arrays)}


def run(implementation, case: Case, dtype=jnp.float32, inputs=None, **more) -> dict[str, jax.Array]:
    """The output and the gradients of `Case.inputs`, by name."""
    arrays, gradient = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs or case.inputs())

    def call(arrays):
        operands = case.operands(arrays)
        query, key, value = arrays["query"], arrays["key"], arrays["value"]
        if implementation != "pallas_tpu":
            return attention(query, key, value, case.rule, operands, implementation=implementation, **more)
        kernels = Kernels(query.dtype, query.dtype, largest_block=128, interpret=True)
        by_distance = operands.by_distance(0, query.shape[1], key.shape[1])
        return flash_attention(kernels, case.rule, query, key, value, by_distance)

    @jax.jit
    def values_and_gradients(arrays, gradient):
        output, transpose = jax.vjp(call, arrays)
        return {"output": output, **transpose(gradient)[0]}

    return values_and_gradients(arrays, gradient)


def equations(jaxpr):
    """All equations of a program, with those inside loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
