"""What objectives on pairs of answers share: the settings and the loss, given both answers of each pair.

Dimensions: B pairs, L length.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import Field, NonNegativeFloat

from maxlm.config.base import Fraction
from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.sharding import shard
from maxlm.core.term import LossOutput, Term, add
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder, DecoderOutput
from maxlm.objectives.pair_losses import Answers, AnyPairLoss, DpoLoss
from maxlm.objectives.pairs import example_pairs
from maxlm.objectives.sequences import is_real, local_rows, target_log_probabilities
from maxlm.train.objective import ExampleMaker, Objective


class PairObjective(Objective):
    """Make the chosen answer of a pair more likely than the rejected one: the streams `chosen` and `rejected`."""

    loss: AnyPairLoss = Field(DpoLoss(), description="Loss of a pair, given the log-probabilities of both answers.")
    sft_weight: NonNegativeFloat | None = Field(
        None, description="Weight of the next-token loss on chosen answers; null: 1 for cpo and orpo, otherwise 0."
    )
    sft_on_prompts: bool = Field(False, description="The next-token loss is also on prompts, as in ORPO's own code.")
    tail_weight: Fraction = Field(
        1.0, description="Weight of the tokens of an answer beyond the length of the other one (LD-DPO)."
    )
    weight_by_policy: bool = Field(
        False, description="Weight pairs by how likely the model itself would write them (WPO)."
    )

    @property
    def next_token_weight(self) -> float:
        return self.loss.sft_weight if self.sft_weight is None else self.sft_weight

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        outputs = model.outputs
        real_B = is_real(batch["chosen"])
        weight = jnp.sum(real_B)
        log_p = {name: target_log_probabilities(model.decoder, batch[name], outputs[name]) for name in batch.streams}
        chosen, rejected = self._answers(batch, log_p)
        loss_B = self.loss(chosen, rejected, batch.values)
        if self.weight_by_policy:
            loss_B *= jnp.prod(
                jnp.stack([policy_weights(model.decoder, batch[name], outputs[name]) for name in batch.streams]), axis=0
            )
        terms: dict[str, Term] = {self.loss.kind: Term(jnp.sum(jnp.where(real_B > 0, loss_B, 0.0)), weight)}
        if self.next_token_weight:
            terms["sft"] = self._next_token_term(model, batch["chosen"], outputs["chosen"])
        beta, gain_chosen_B, gain_rejected_B = self.loss.beta, chosen.gains, rejected.gains
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (gain_chosen_B > gain_rejected_B)), weight),
            "reward_margin": Term(beta * jnp.sum(real_B * (gain_chosen_B - gain_rejected_B)), weight),
            "reward_chosen": Term(beta * jnp.sum(real_B * gain_chosen_B), weight),
            "reward_rejected": Term(beta * jnp.sum(real_B * gain_rejected_B), weight),
        }
        return LossOutput(terms, metrics).joined(add(outputs["chosen"].auxiliary, outputs["rejected"].auxiliary))

    def matcher(self, mesh: Mesh) -> Callable[[Decoder, Batch], Batch]:
        """Adds to a batch what the loss needs of the whole of it, with the weights before a step."""

        @jax.jit
        def matches(model: Decoder, batch: Batch) -> dict[str, jax.Array]:
            log_p = {name: target_log_probabilities(model, batch[name]) for name in batch.streams}
            return self.loss.match(*self._answers(batch, log_p), is_real(batch["chosen"]))

        def with_matches(model: Decoder, batch: Batch) -> Batch:
            found = matches(model, put_batch(batch, mesh))
            return replace(batch, values={**batch.values, **{name: local_rows(x) for name, x in found.items()}})

        return with_matches

    def example(self, make: ExampleMaker) -> Batch:
        pairs = example_pairs(make)
        values = {}
        if self.loss.needs_reference:
            for name, stream in pairs.streams.items():
                noise_B = make.normal((len(stream.tokens),), scale=3) * (stream.segment_ids > 0).any(axis=1)
                values[f"reference_{name}_B"] = (make.log_probabilities(stream).sum(axis=1) + noise_B).astype("float32")
        for name in self.loss.names_of_matches:
            values[name] = make.normal((len(pairs["chosen"].tokens),), scale=3)
        return replace(pairs, values=values)

    def for_verification(self) -> Self:
        return self.model_copy(update={"sft_weight": max(self.next_token_weight, 0.1)})

    def _answers(self, batch: Batch, log_p: dict[str, jax.Array]) -> tuple[Answers, Answers]:
        """The chosen and the rejected answers, from log-probabilities [B, L] of their tokens."""
        chosen, rejected = (
            Answers(
                jnp.sum(self._token_weights(batch, name) * log_p[name], axis=1),
                batch.values.get(f"reference_{name}_B", 0.0),
                jnp.sum(batch[name].loss_weights, axis=1),
            )
            for name in ("chosen", "rejected")
        )
        return chosen, rejected

    def reference_sums(self, model: Decoder, batch: Batch) -> dict[str, jax.Array]:
        """The log-probabilities [B] of both answers under the starting model, as values of a batch."""
        return {
            f"reference_{name}_B": jnp.sum(
                self._token_weights(batch, name) * target_log_probabilities(model, batch[name]), axis=1
            )
            for name in batch.streams
        }

    def _token_weights(self, batch: Batch, name: str) -> jax.Array | float:
        """Weights [B, L] of the tokens of one answer: of length-desensitized DPO (arXiv:2409.06411)."""
        if self.tail_weight == 1:
            return 1.0
        shared_B = jnp.minimum(*(jnp.sum(stream.loss_weights, axis=1) for stream in batch.streams.values()))
        # A running sum needs whole rows.
        place_BL = shard(jnp.cumsum(shard(batch[name].loss_weights, "batch", None), axis=1), "batch", "length")
        return jnp.where(place_BL <= shared_B[:, None], 1.0, self.tail_weight)

    def _next_token_term(self, model: AppliedModel, stream: Stream, output: DecoderOutput) -> Term:
        """The next-token loss on a mean token of the chosen answers."""
        if self.sft_on_prompts:
            # The last token of a sequence has no target.
            has_target_BL = (stream.segment_ids > 0) & (
                stream.positions < jnp.max(stream.positions, axis=1, keepdims=True)
            )
            stream = replace(stream, loss_weights=has_target_BL.astype(jnp.float32))
        log_p_BL = target_log_probabilities(model.decoder, stream, output, smoothing=model.label_smoothing)
        return Term(-self.next_token_weight * jnp.sum(log_p_BL), jnp.sum(stream.loss_weights))


def policy_weights(model: Decoder, stream: Stream, output: DecoderOutput) -> jax.Array:
    """How likely the model itself would write an answer, without a gradient: [B] (WPO, arXiv:2406.11827, equation 2).

        exp of the mean over tokens of [log p(token) - log sum_v p(v)^2]

    so that it does not depend on how uncertain the model is.
    """
    hidden_BLD = jax.lax.stop_gradient(output.hidden_BLD)
    model = jax.lax.stop_gradient(model)
    log_p_BL, normalizer_BL = model.log_probabilities(hidden_BLD, stream.targets)
    # The logarithm of a sum of squares of exp(logit) is the normalizer at temperature 1/2.
    _, of_squares_BL = model.log_probabilities(hidden_BLD, stream.targets, temperature=0.5)
    aligned_BL = log_p_BL - (of_squares_BL - 2 * normalizer_BL)
    is_answer_BL = stream.loss_weights > 0
    length_B = jnp.maximum(jnp.sum(is_answer_BL, axis=1), 1)
    return jnp.exp(jnp.sum(jnp.where(is_answer_BL, aligned_BL, 0.0), axis=1) / length_B)
