"""Log-probabilities of target tokens without materializing logits [batch, length, vocab].

Dimensions: B batch, L length, D embed, V vocab, C tokens in a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import current_mesh, is_explicit, spec_of


def log_probabilities_in_chunks(
    hidden_BLD: jax.Array, project, head, targets_BL: jax.Array, *, chunk_length: int
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the log of the softmax normalizer, each float32 [batch, length].

    The sequence is split into chunks; only one chunk's logits exist at a time, in the forward and, recomputed, in the
    backward pass.

    Args:
      hidden_BLD: final hidden states.
      project: (head, hidden [B, C, D]) -> float32 logits [B, C, V].
      head: the pytree of weights that `project` uses; gradients flow to it.
      targets_BL: token ids.
      chunk_length: tokens of a row, or of a device's part of it, per chunk; at most their number. A last,
        shorter chunk is computed separately.
    """

    def chunk(head, hidden, targets):
        return _gather_log_probability(project(head, hidden), targets)

    log_p_BL, normalizer_BL = in_chunks(chunk, head, hidden_BLD, targets_BL, chunk_length=chunk_length)
    return log_p_BL, normalizer_BL


def in_chunks(function, head, *tokens: jax.Array, chunk_length: int) -> tuple[jax.Array, ...]:
    """Apply `function` to all tokens, chunk by chunk, with recomputation in the backward pass.

    Args:
      function: (head, *pieces of the arrays) -> arrays with the shape of a piece's tokens.
      head: the pytree of weights that it uses; gradients flow to it.
      tokens: arrays [batch, length, ...].
      chunk_length: as in `log_probabilities_in_chunks`.

    Returns:
      Arrays [batch, length].
    """
    function = jax.checkpoint(function)
    # An array whose rows are sharded over devices has one more axis before its tokens.
    by_device = [_by_device(x) for x in tokens]
    axis = 1 + by_device[0].ndim - tokens[0].ndim
    length = by_device[0].shape[axis]
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
    if not is_explicit() or (parts := _count(spec_of(x_BL)[1])) == 1:
        return x_BL
    batch, length, *rest = x_BL.shape
    rows, tokens, *others = spec_of(x_BL)
    shape = (batch, parts, length // parts, *rest)
    return jax.lax.reshape(x_BL, shape, out_sharding=P(rows, tokens, None, *others))


def _count(entry: str | tuple[str, ...] | None) -> int:
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(current_mesh().shape[name] for name in names if name is not None)


@jax.custom_vjp
def _gather_log_probability(logits, targets):
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return _select(logits, targets) - log_normalizer, log_normalizer


def _forward(logits, targets):
    log_probability, log_normalizer = _gather_log_probability(logits, targets)
    return (log_probability, log_normalizer), (logits, targets, log_normalizer)


def _backward(residuals, grads):
    # d log p = onehot - p, d log Z = p: one pass; autodiff of logsumexp and a gather would need several.
    logits, targets, log_normalizer = residuals
    grad_log_probability, grad_log_normalizer = grads
    probabilities = jnp.exp(logits - log_normalizer[..., None])
    grad_logits = (grad_log_normalizer - grad_log_probability)[..., None] * probabilities
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
