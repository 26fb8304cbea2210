"""Receipt: the quality loss of a quantized model against its float model on held-out text.

Dimensions: B batch, L length, D embed, V vocab, C tokens in a chunk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Stream
from maxlm.core.interval import Interval, ratio_interval
from maxlm.core.tree import flatten
from maxlm.errors import DataError
from maxlm.models.decoder import Decoder, with_execution
from maxlm.ops.loss import in_chunks

# Tokens whose logits, of both models, are in memory at a time.
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Receipt:
    """Quality loss. Means are over targets, by loss weight. `*_low` and `*_high` are bounds of 95% intervals over
    documents or chats (`core/interval.py`), None if there is only one.

    kind: the data compared: documents, or assistant tokens of chats.
    perplexity_float, perplexity_int8: exp of the mean cross-entropy.
    perplexity_change: perplexity_int8 / perplexity_float - 1.
    mean_kl, max_kl: KL(float || int8) of the next-token distributions, in nats.
    top1_agreement: fraction of targets for which both models have the same most likely token.
    num_tokens, num_units: number of targets compared, and of their documents or chats.
    bytes_float, bytes_int8: size of the weights in memory.
    dtypes: dtype of each weight of the int8 model, by path.
    """

    kind: Literal["documents", "chats"]
    perplexity_float: float
    perplexity_int8: float
    perplexity_change: float
    perplexity_change_low: float | None
    perplexity_change_high: float | None
    mean_kl: float
    mean_kl_low: float | None
    mean_kl_high: float | None
    max_kl: float
    top1_agreement: float
    num_tokens: int
    num_units: int
    bytes_float: int
    bytes_int8: int
    dtypes: dict[str, str]

    @classmethod
    def measure(
        cls,
        float_model: Decoder,
        int8_model: Decoder,
        batches: Iterable[tuple[Stream, np.ndarray]],
        *,
        kind: Literal["documents", "chats"],
    ) -> Self:
        """Run both models over held-out batches, each with the unit [B, L] of its tokens.

        Everything not in 8 bits is computed in float32 in both models, so that the difference is due to quantization
        and the same on every machine, without the rounding of matrix units, which the float model has in serving too.

        Raises:
          DataError: no target in the batches has a weight.
        """
        float_model, int8_model = _in_float32(float_model), _in_float32(int8_model)
        values, weights, units = [], [], []
        for batch, units_BL in batches:
            # TPUs and some GPUs use fewer bits in float32 products unless full precision is requested.
            with jax.default_matmul_precision("float32"):
                found = np.stack([np.asarray(x, np.float32) for x in _compare(float_model, int8_model, batch)])
            # Elsewhere (padding) the values are meaningless and may not be finite.
            counted_BL = np.asarray(batch.loss_weights) > 0
            values.append(found[:, counted_BL].astype(np.float64))
            weights.append(np.asarray(batch.loss_weights, np.float64)[counted_BL])
            units.append(units_BL[counted_BL])
        weight = np.concatenate(weights)
        if not len(weight):
            raise DataError("the held-out rows have no targets to compare the models on; give other data with --data")
        of_unit = np.unique(np.concatenate(units), return_inverse=True)[1]
        loss_float, loss_int8, kl, agreement = np.concatenate(values, axis=1)

        def mean(x: np.ndarray) -> Interval:
            """Weighted mean; the bootstrap resamples units."""
            return ratio_interval(np.bincount(of_unit, x * weight), np.bincount(of_unit, weight))

        change, mean_kl = mean(loss_int8 - loss_float).map(lambda nats: float(np.expm1(nats))), mean(kl)
        return cls(
            kind=kind,
            perplexity_float=float(np.exp(mean(loss_float).value)),
            perplexity_int8=float(np.exp(mean(loss_int8).value)),
            perplexity_change=change.value,
            perplexity_change_low=change.low,
            perplexity_change_high=change.high,
            mean_kl=mean_kl.value,
            mean_kl_low=mean_kl.low,
            mean_kl_high=mean_kl.high,
            max_kl=float(kl.max()),
            top1_agreement=mean(agreement).value,
            num_tokens=len(weight),
            num_units=int(of_unit.max()) + 1,
            bytes_float=_num_bytes(float_model),
            bytes_int8=_num_bytes(int8_model),
            dtypes=_dtypes(int8_model),
        )

    @property
    def change(self) -> Interval:
        """Relative change of perplexity."""
        return Interval(self.perplexity_change, self.perplexity_change_low, self.perplexity_change_high)

    @property
    def kl(self) -> Interval:
        """Mean KL divergence, in nats."""
        return Interval(self.mean_kl, self.mean_kl_low, self.mean_kl_high)

    def format_change(self) -> str:
        """`+0.061% [+0.013%, +0.112%]`"""
        text = f"{self.perplexity_change:+.3%}"
        low, high = self.change.bounds
        return text if low is None else f"{text} [{low:+.3%}, {high:+.3%}]"


def _in_float32(model: Decoder) -> Decoder:
    """The same weights, with float32 activations and operands except those in 8 bits."""
    exact = {"activation_dtype": "float32", "matmul_dtype": "float32", "eight_bit": None}
    return with_execution(model, model.execution.model_copy(update=exact))


@jax.jit
def _compare(float_model: Decoder, int8_model: Decoder, batch: Stream) -> tuple[jax.Array, ...]:
    """Each [batch, length]: -log p(target) of either model, KL(float || int8), whether the top-1 tokens agree."""

    def chunk(models, float_BCD, int8_BCD, targets_BC):
        float_model, int8_model = models
        log_p_BCV = jax.nn.log_softmax(float_model.logits(float_BCD))
        log_q_BCV = jax.nn.log_softmax(int8_model.logits(int8_BCD))
        kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
        agree_BC = jnp.argmax(log_p_BCV, axis=-1) == jnp.argmax(log_q_BCV, axis=-1)
        return _negative_at(log_p_BCV, targets_BC), _negative_at(log_q_BCV, targets_BC), kl_BC, agree_BC

    hidden = [model.apply(batch).hidden_BLD for model in (float_model, int8_model)]
    chunk_length = max(1, CHUNK_TOKENS // batch.tokens.shape[0])
    return in_chunks(chunk, (float_model, int8_model), *hidden, batch.targets, chunk_length=chunk_length)


def _negative_at(log_p_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p_BCV, targets_BC[..., None], axis=-1)[..., 0]


def _num_bytes(model: Decoder) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def _dtypes(model: Decoder) -> dict[str, str]:
    """Dtype of each weight, by path; int8 with scales counts as int8."""
    return {
        path.removesuffix("/values"): str(leaf.dtype)
        for path, leaf in flatten(model).items()
        if not path.endswith("/scales")
    }
