"""Log-probabilities of target tokens without materializing logits [batch, length, vocab].

Dimensions: B batch, L length, D embed, V vocab, N chunks, C tokens of a row in a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import current_mesh, is_explicit, names_of, sharded_count, spec_of, without
from maxlm.ops.linear import operand_dtype, unembed
from maxlm.ops.qtensor import QTensor


@dataclass(frozen=True)
class Head:
    """How hidden states [..., D] become logits [..., V]: transform(table . hidden / width), in float32.

    dtype: of the operands of the product, as in `ops.linear`.
    transform: of the logits, elementwise.
    gradient_sum: dtype in which the table's gradient is summed over devices.
    smoothing: share of a target's probability that is spread over the vocabulary (arXiv:1512.00567): log p(target)
      becomes (1 - s) log p(target) + s mean_v log p(v).
    """

    dtype: str
    width: float = 1.0
    transform: Callable[[jax.Array], jax.Array] = lambda logits: logits
    gradient_sum: str = "float32"
    smoothing: float = 0.0

    def logits(self, table: jax.Array | QTensor, hidden: jax.Array) -> jax.Array:
        scaled = hidden.astype(jnp.float32) / self.width
        return self.transform(unembed(scaled, table, self.dtype, gradient_sum=self.gradient_sum))


def log_probabilities_in_chunks(
    head: Head, table_VD: jax.Array | QTensor, hidden_BLD: jax.Array, targets_BL: jax.Array, *, chunk_length: int
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the log of the softmax normalizer, each float32 [batch, length].

    The sequence is split into chunks; only one chunk's logits exist at a time, in the forward and, recomputed, in the
    backward pass. A single chunk is not recomputed.

    Args:
      table_VD: the weights of the head. They are gathered once, and so is their gradient summed over devices.
      hidden_BLD: final hidden states.
      targets_BL: token ids.
      chunk_length: tokens of a row, or of a device's part of it, per chunk; at most their number. They are split
        evenly, with padding if that is impossible.
    """

    def chunk(table, hidden, targets):
        return _gather_log_probability(head.smoothing, head.logits(table, hidden), targets)

    length = hidden_BLD.shape[1] // sharded_count(spec_of(hidden_BLD)[1:2])
    if isinstance(table_VD, QTensor) or length <= chunk_length:
        log_p_BL, normalizer_BL = in_chunks(chunk, table_VD, hidden_BLD, targets_BL, chunk_length=chunk_length)
        return log_p_BL, normalizer_BL
    num_chunks = -(-length // chunk_length)
    if not is_explicit():
        return _each_chunk(head, num_chunks, (), table_VD, hidden_BLD, targets_BL)
    tokens = spec_of(targets_BL)
    arrays = tuple(_only_sharded(x) for x in (table_VD, hidden_BLD, targets_BL))
    # The vocabulary stays sharded along `tensor`, in the type of the table.
    table, hidden, targets = (P(*(without(entry, ("tensor",)) for entry in spec_of(x))) for x in arrays)
    compute = partial(_each_chunk, head, num_chunks, names_of(table[1]))
    if manual := _sharded_axes() - {"tensor"}:
        compute = jax.shard_map(
            compute,
            in_specs=(table, hidden, targets),
            out_specs=(targets, targets),
            axis_names=manual,
            check_vma=False,
        )
    log_p_BL, normalizer_BL = (jax.reshard(x, tokens) for x in compute(*arrays))
    return log_p_BL, normalizer_BL


def _sharded_axes() -> set[str]:
    """Axes of the current mesh with several devices, without the manual ones of an enclosing shard_map."""
    mesh = current_mesh()
    return {axis for axis, size in mesh.shape.items() if size > 1} - set(mesh.manual_axes)


def _only_sharded(x: jax.Array) -> jax.Array:
    """The same array without axes of one device in its type: XLA's partitioner fails on collectives within a manual
    region over such axes only."""
    narrow = set(current_mesh().axis_names) - _sharded_axes()
    return jax.reshard(x, P(*(without(entry, narrow) for entry in spec_of(x))))


def _each_chunk(head, num_chunks: int, gather_names, table_VD, hidden_BLD, targets_BL):
    """One device's tokens."""
    length = targets_BL.shape[1]
    padding = -length % num_chunks
    hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, padding), (0, 0)))
    targets_BL = jnp.pad(targets_BL, ((0, 0), (0, padding)))
    results = _over_chunks(head, num_chunks, gather_names, table_VD, hidden_BLD, targets_BL)
    log_p_BL, normalizer_BL = (x[:, :length] for x in results)
    return log_p_BL, normalizer_BL


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _over_chunks(head, num_chunks, gather_names, table_VD, hidden_BLD, targets_BL):
    results, _ = _over_chunks_forward(head, num_chunks, gather_names, table_VD, hidden_BLD, targets_BL)
    return results


def _over_chunks_forward(head, num_chunks, gather_names, table_VD, hidden_BLD, targets_BL):
    table_VD = table_VD.astype(operand_dtype(head.dtype))
    if gather_names:
        table_VD = jax.lax.all_gather(table_VD, gather_names, axis=1, tiled=True)
    hidden_NBCD, targets_NBC = (_split(x, num_chunks) for x in (hidden_BLD, targets_BL))

    def chunk(_, tokens):
        hidden, targets = tokens
        return None, _gather_log_probability(head.smoothing, head.logits(table_VD, hidden), targets)

    _, results_NBC = jax.lax.scan(chunk, None, (hidden_NBCD, targets_NBC))
    log_p_BL, normalizer_BL = (_join(x) for x in results_NBC)
    return (log_p_BL, normalizer_BL), (table_VD, hidden_BLD, targets_BL, normalizer_BL)


def _over_chunks_backward(head, num_chunks, gather_names, residuals, grads):
    # One float32 sum for the table, in the carry: autodiff would hold a gradient for each chunk, summed over devices.
    table_VD, *tokens = residuals
    dtype = table_VD.dtype

    def chunk(grad_VD, tokens):
        hidden, targets, normalizer, *grads = tokens
        scaled = (hidden.astype(jnp.float32) / head.width).astype(dtype)
        logits, pull = jax.vjp(head.transform, _product(scaled, table_VD, 1))
        (grad_logits,) = pull(_backward(head.smoothing, (logits, targets, normalizer), grads)[0])
        grad_logits = grad_logits.astype(dtype)
        grad_VD += jax.lax.dot_general(
            grad_logits,
            scaled,
            (((0, 1), (0, 1)), ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=spec_of(grad_VD) if is_explicit() else None,
        )
        grad_hidden = _product(grad_logits, table_VD, 0) / head.width
        return grad_VD, grad_hidden.astype(hidden.dtype)

    split = tuple(_split(x, num_chunks) for x in (*tokens, *grads))
    grad_VD, grad_hidden_NBCD = jax.lax.scan(chunk, jnp.zeros_like(table_VD, jnp.float32), split)
    if gather_names:
        scatter = partial(jax.lax.psum_scatter, axis_name=gather_names, scatter_dimension=1, tiled=True)
        # A reduce-scatter of an array whose type has a sharding is not implemented.
        spec = spec_of(grad_VD)
        scatter = jax.shard_map(scatter, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)
        grad_VD = scatter(grad_VD.astype(head.gradient_sum)).astype(jnp.float32)
    return grad_VD, _join(grad_hidden_NBCD), None


_over_chunks.defvjp(_over_chunks_forward, _over_chunks_backward)


def _product(x, table, axis: int):
    """float32 product of the last axis of x with `axis` of a table that is whole but for its vocabulary."""
    return jax.lax.dot_general(
        x,
        table,
        (((x.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=P(None, None, spec_of(table)[1 - axis]) if is_explicit() else None,
    )


def _split(x_BL: jax.Array, num_chunks: int) -> jax.Array:
    """[B, L, ...] as [N, B, C, ...]."""
    return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], num_chunks, -1, *x_BL.shape[2:]), 1, 0)


def _join(x_NBC: jax.Array) -> jax.Array:
    """[N, B, C, ...] as [B, L, ...]."""
    return jnp.moveaxis(x_NBC, 0, 1).reshape(x_NBC.shape[1], -1, *x_NBC.shape[3:])


def in_chunks(function, head, *tokens: jax.Array, chunk_length: int) -> tuple[jax.Array, ...]:
    """Apply `function` to all tokens, chunk by chunk; if there are several, with recomputation in the backward pass.

    Args:
      function: (head, *pieces of the arrays) -> arrays with the shape of a piece's tokens.
      head: the pytree of weights that it uses; gradients flow to it.
      tokens: arrays [batch, length, ...].
      chunk_length: tokens of a row, or of a device's part of it, per chunk; at most their number. A last, shorter
        chunk is computed separately.

    Returns:
      Arrays [batch, length].
    """
    # An array whose rows are sharded over devices has one more axis before its tokens.
    by_device = [_by_device(x) for x in tokens]
    axis = 1 + by_device[0].ndim - tokens[0].ndim
    length = by_device[0].shape[axis]
    if length > chunk_length:
        function = jax.checkpoint(function)
    parts = [
        function(
            head, *(jax.lax.slice_in_dim(x, start, min(start + chunk_length, length), axis=axis) for x in by_device)
        )
        for start in range(0, length, chunk_length)
    ]
    whole = (jnp.concatenate(chunks, axis=-1) for chunks in zip(*parts))
    shape, spec = tokens[0].shape[:2], spec_of(tokens[0])[:2] if axis > 1 else None
    return tuple(jax.lax.reshape(x, shape, out_sharding=P(*spec)) if axis > 1 else x for x in whole)


def _by_device(x_BL: jax.Array) -> jax.Array:
    """[B, parts, L / parts, ...] if L is sharded into parts: a chunk is then a piece of each device's part."""
    if (parts := sharded_count(spec_of(x_BL)[1:2])) == 1:
        return x_BL
    batch, length, *rest = x_BL.shape
    rows, tokens, *others = spec_of(x_BL)
    shape = (batch, parts, length // parts, *rest)
    return jax.lax.reshape(x_BL, shape, out_sharding=P(rows, tokens, None, *others))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_log_probability(smoothing, logits, targets):
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = _select(logits, targets)
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * jnp.mean(logits, axis=-1)
    return chosen - log_normalizer, log_normalizer


def _forward(smoothing, logits, targets):
    log_probability, log_normalizer = _gather_log_probability(smoothing, logits, targets)
    return (log_probability, log_normalizer), (logits, targets, log_normalizer)


def _backward(smoothing, residuals, grads):
    # d log p = onehot - p, d log Z = p: one pass; autodiff of logsumexp and a gather would need several.
    logits, targets, log_normalizer = residuals
    grad_log_probability, grad_log_normalizer = grads
    probabilities = jnp.exp(logits - log_normalizer[..., None])
    grad_logits = (grad_log_normalizer - grad_log_probability)[..., None] * probabilities
    if smoothing:
        grad_logits += (smoothing / logits.shape[-1]) * grad_log_probability[..., None]
        grad_log_probability = (1 - smoothing) * grad_log_probability
    return jnp.where(_one_hot(logits, targets), grad_logits + grad_log_probability[..., None], grad_logits), None


_gather_log_probability.defvjp(_forward, _backward)


def _one_hot(logits, targets):
    # A comparison instead of a gather: it is local if the vocabulary is sharded.
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    if is_explicit():
        vocabulary = jax.reshard(vocabulary, P(spec_of(logits)[-1]))
    return vocabulary == targets[..., None]


def _select(logits, targets):
    return jnp.sum(jnp.where(_one_hot(logits, targets), logits, 0.0), axis=-1)
