"""A reward model trained on preferences.

Dimensions: B pairs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.data.chat import EpochOrder, padded_batches, step_batches, training_order
from maxlm.data.preference import PreferenceBatch, PreferencePairs, pad, round_up
from maxlm.errors import RequestError
from maxlm.models.reward import RewardModel
from maxlm.post.sequences import is_real, share_of_rows
from maxlm.runtime.progress import track
from maxlm.tokenizer.codec import ChatTokens, Tokenizer
from maxlm.train.objective import RunContext
from maxlm.train.validate import Evaluator

_SCORED_ROWS = 8


def bradley_terry_loss(chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
    """-log P(chosen is preferred) = -log sigmoid(r_chosen - r_rejected) of each pair (Bradley and Terry, 1952)."""
    return -jax.nn.log_sigmoid(chosen_B - rejected_B)


class Reward:
    """Rank the chosen answer over the rejected one."""

    needs_reference = False
    resume_multiple = 1

    def __init__(self, context: RunContext):
        self._context = context
        self._pairs = self._read(context.config.objective.train_file)
        self._evaluator = Evaluator(self.loss, context.mesh)

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._context.config.objective.valid_file is not None:
            _ = self._valid_batches

    def loss(self, model: RewardModel, batch: PreferenceBatch) -> LossOutput:
        real_B = is_real(batch.chosen)
        weight = jnp.sum(real_B)
        chosen_B, chosen_auxiliary = model.rewards(batch.chosen)
        rejected_B, rejected_auxiliary = model.rewards(batch.rejected)
        terms = {"bradley_terry": Term(jnp.sum(real_B * bradley_terry_loss(chosen_B, rejected_B)), weight)}
        if center := self._context.config.objective.center:
            # Only differences are learned otherwise; this keeps the rewards of a pair around zero (arXiv:2312.09244).
            terms["center"] = Term(center * jnp.sum(real_B * jnp.square(chosen_B + rejected_B)), weight)
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (chosen_B > rejected_B)), weight),
            "reward_margin": Term(jnp.sum(real_B * (chosen_B - rejected_B)), weight),
        }
        return LossOutput(terms, metrics).joined(add(chosen_auxiliary, rejected_auxiliary))

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[PreferenceBatch]:
        size = self._context.config.batch_size
        return step_batches(self._order, self._pairs.batch, start_step, batch_size=size, rows=self._context.rows)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        pairs = self._order.indices(batch, batch_size=self._context.config.batch_size)
        return [{"id": self._pairs.places[pair]} for pair in pairs]

    def validate(self, model: RewardModel) -> dict[str, float]:
        if self._context.config.objective.valid_file is None:
            return {}
        sums = self._evaluator.sums(model, (share_of_rows(batch, self._context.rows) for batch in self._valid_batches))
        means = {name: float(np.asarray(term.mean())) for name, term in sums.items()}
        return {"loss": means["bradley_terry"], "accuracy": means["accuracy"], "reward_margin": means["reward_margin"]}

    @functools.cached_property
    def _order(self) -> EpochOrder:
        config = self._context.config
        return training_order(
            config.objective.train_file, len(self._pairs), batch_size=config.batch_size, seed=config.seed
        )

    @functools.cached_property
    def _valid_batches(self) -> list[PreferenceBatch]:
        config = self._context.config
        pairs = self._read(config.objective.valid_file)
        return [pairs.batch(i) for i in padded_batches(len(pairs), config.batch_size, config.eval_batches)]

    def _read(self, path: str) -> PreferencePairs:
        context, config = self._context, self._context.config
        return PreferencePairs.read(
            path,
            context.tokenizer,
            row_length=config.row_length,
            parts=context.row_parts,
            form=config.objective,
        )


def score(model: RewardModel, tokenizer: Tokenizer, texts: Sequence[str | Sequence[dict]]) -> np.ndarray:
    """The reward of each chat (a list of messages) or plain text: float32 [number of texts].

    Raises:
      RequestError: one is longer than the model's context.
      TokenizerError: a role is unknown.
    """
    sequences = [
        tokenizer.encode(text, bos=True, eos=True) if isinstance(text, str) else tokenizer.encode_chat(text).ids
        for text in texts
    ]
    for index, ids in enumerate(sequences):
        if len(ids) > model.config.max_length:
            raise RequestError(
                f"text {index}: its {len(ids)} tokens are more than the model's context of {model.config.max_length}"
            )
    return score_sequences(model, sequences)


def score_sequences(model: RewardModel, sequences: Sequence[list[int]]) -> np.ndarray:
    """The reward of each sequence of token ids: float32 [number of sequences]. The shortest go first, with a bar."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = np.zeros(len(sequences), np.float32)
    for start in track(range(0, len(order), _SCORED_ROWS), "score"):
        group = order[start : start + _SCORED_ROWS]
        rows = [ChatTokens(sequences[index], [0.0] * len(sequences[index])) for index in group]
        rows += [ChatTokens([], [])] * (_SCORED_ROWS - len(group))
        # No longer than the model's context, where rounding up would be.
        length = min(round_up(len(sequences[group[-1]])), model.config.max_length)
        scores[group] = np.asarray(_rewards(model, pad(rows, length)))[: len(group)]
    return scores


@jax.jit
def _rewards(model: RewardModel, batch: Batch) -> jax.Array:
    return model.rewards(batch)[0]
