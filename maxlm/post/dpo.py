"""Direct preference optimization (arXiv:2305.18290).

Dimensions: B pairs, L length.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import put_batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.data.chat import EpochOrder, padded_batches, step_batches, training_order
from maxlm.data.preference import PreferenceBatch, PreferencePairs
from maxlm.post.sequences import (
    is_real,
    local_rows,
    share_of_rows,
    token_log_probabilities,
    token_scores,
)
from maxlm.train.objective import RunContext
from maxlm.train.validate import Evaluator


@partial(
    jax.tree_util.register_dataclass, data_fields=["pairs", "reference_chosen", "reference_rejected"], meta_fields=[]
)
@dataclass(frozen=True)
class DpoBatch:
    """Pairs, and the log-probability [B] of each answer under the reference model."""

    pairs: PreferenceBatch
    reference_chosen: Any
    reference_rejected: Any


def dpo_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float) -> jax.Array:
    """Loss of each pair.

        -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)
        m = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

    s is the share of pairs that are assumed to be labelled the wrong way round ("conservative DPO").
    """
    scaled_B = beta * margin_B
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled_B) - label_smoothing * jax.nn.log_sigmoid(-scaled_B)


class Dpo:
    """Raise the chosen answer over the rejected one, relative to the starting model."""

    needs_reference = True
    resume_multiple = 1

    def __init__(self, context: RunContext):
        self._context = context
        self._pairs = self._read(context.config.objective.train_file)
        self._evaluator = Evaluator(self.loss, context.mesh)
        self._reference_scores = jax.jit(
            lambda model, pairs: (
                jnp.sum(token_scores(model, pairs.chosen), axis=1),
                jnp.sum(token_scores(model, pairs.rejected), axis=1),
            )
        )

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._context.config.objective.valid_file is not None:
            _ = self._valid_batches

    def loss(self, model: Any, batch: DpoBatch) -> LossOutput:
        objective = self._context.config.objective
        chosen, rejected = batch.pairs.chosen, batch.pairs.rejected
        real_B = is_real(chosen)
        weight = jnp.sum(real_B)

        chosen_BL, chosen_auxiliary = token_log_probabilities(model, chosen)
        rejected_BL, rejected_auxiliary = token_log_probabilities(model, rejected)
        gain_chosen_B = jnp.sum(chosen_BL, axis=1) - batch.reference_chosen
        gain_rejected_B = jnp.sum(rejected_BL, axis=1) - batch.reference_rejected
        margin_B = gain_chosen_B - gain_rejected_B

        loss_B = dpo_loss(margin_B, beta=objective.beta, label_smoothing=objective.label_smoothing)
        terms = {"dpo": Term(jnp.sum(real_B * loss_B), weight)}
        if objective.sft_weight:
            terms["sft"] = Term(-objective.sft_weight * jnp.sum(chosen_BL), jnp.sum(chosen.loss_weights))
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (margin_B > 0)), weight),
            "reward_margin": Term(objective.beta * jnp.sum(real_B * margin_B), weight),
            "reward_chosen": Term(objective.beta * jnp.sum(real_B * gain_chosen_B), weight),
            "reward_rejected": Term(objective.beta * jnp.sum(real_B * gain_rejected_B), weight),
        }
        return LossOutput(terms, metrics).joined(add(chosen_auxiliary, rejected_auxiliary))

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[DpoBatch]:
        size = self._context.config.batch_size
        pairs = step_batches(self._order, self._pairs.batch, start_step, batch_size=size, rows=self._context.rows)
        return map(self._with_reference, pairs)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        pairs = self._order.indices(batch, batch_size=self._context.config.batch_size)
        return [{"id": self._pairs.places[pair]} for pair in pairs]

    def validate(self, model: Any) -> dict[str, float]:
        if self._context.config.objective.valid_file is None:
            return {}
        sums = self._evaluator.sums(model, self._valid_batches)
        means = {name: float(np.asarray(term.mean())) for name, term in sums.items()}
        return {"loss": means["dpo"], "accuracy": means["accuracy"], "reward_margin": means["reward_margin"]}

    def _with_reference(self, pairs: PreferenceBatch) -> DpoBatch:
        scores = self._reference_scores(self._context.reference, put_batch(pairs, self._context.mesh))
        return DpoBatch(pairs, *map(local_rows, scores))

    @functools.cached_property
    def _order(self) -> EpochOrder:
        config = self._context.config
        return training_order(
            config.objective.train_file, len(self._pairs), batch_size=config.batch_size, seed=config.seed
        )

    @functools.cached_property
    def _valid_batches(self) -> list[DpoBatch]:
        config = self._context.config
        pairs = self._read(config.objective.valid_file)
        whole = [pairs.batch(i) for i in padded_batches(len(pairs), config.batch_size, config.eval_batches)]
        return [self._with_reference(share_of_rows(batch, self._context.rows)) for batch in whole]

    def _read(self, path: str) -> PreferencePairs:
        context, config = self._context, self._context.config
        return PreferencePairs.read(
            path,
            context.tokenizer,
            row_length=config.row_length,
            parts=context.row_parts,
            form=config.objective,
        )
