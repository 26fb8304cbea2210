"""The reward model: a decoder with a scalar head, trained on preferences.

Dimensions: B rows, L length, D embed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlm.config.model import ModelConfig
from maxlm.core.batch import Batch
from maxlm.core.parameters import Parameter, abstract, initialize, zeros
from maxlm.core.term import LossOutput, Term, add
from maxlm.core.tree import flatten, unflatten
from maxlm.data.chat import EpochOrder, padded_batches, step_batches, training_order
from maxlm.data.preference import PreferenceBatch, PreferencePairs, pad, round_up
from maxlm.errors import CheckpointError, RequestError
from maxlm.models.adapters import declare_adapters, merge_adapters
from maxlm.models.decoder import Decoder
from maxlm.post.sequences import is_real, share_of_rows
from maxlm.runtime.progress import track
from maxlm.tokenizer.codec import ChatTokens, Tokenizer
from maxlm.train.checkpoint import find_checkpoint, read_metadata, restore_weights, trained_as
from maxlm.train.lineage import run_folder_of
from maxlm.train.objective import RunContext
from maxlm.train.run import load_start
from maxlm.train.validate import Evaluator

_SCORED_ROWS = 8


class RewardModel(Decoder):
    """A decoder whose last hidden state of a sequence is read out as one number.

    The head starts at zero, so that training starts from equal rewards.
    """

    trained_whole = ("value",)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.value = nnx.data(Parameter((config.embed_dim,), (None,), zeros))

    @classmethod
    def from_decoder(cls, decoder: Decoder, key: jax.Array) -> "RewardModel":
        """A decoder's weights with a new head."""
        plan = cls(decoder.config)
        head = initialize({"value": plan.value}, key)
        return unflatten({**flatten(decoder), **head}, plan)

    def rewards(self, batch: Batch) -> tuple[jax.Array, LossOutput]:
        """One number for each row, read at its last token: float32 [B]; 0 for a row of padding.

        Beside it, what the layers add to the loss.
        """
        output = self(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
        values_BL = jnp.sum(output.hidden_BLD.astype(jnp.float32) * self.value, axis=-1)
        is_token_BL = batch.segment_ids > 0
        is_last_BL = is_token_BL & (batch.positions == jnp.max(batch.positions, axis=1, keepdims=True))
        return jnp.sum(jnp.where(is_last_BL, values_BL, 0.0), axis=1), output.auxiliary


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


def load_reward_model(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> tuple[RewardModel, Tokenizer]:
    """A trained reward model, its adapters merged, and its tokenizer.

    Args:
      path: a run folder or a checkpoint.
      mesh: where to lay it; None is the first device.

    Raises:
      CheckpointError: there is no whole checkpoint, or it holds no reward model.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    if (kind := metadata["config"]["objective"]["kind"]) != "reward":
        raise CheckpointError(
            f"{path}: was trained with objective.kind={kind}, and not as a reward model; give the run folder of a"
            " training with objective.kind=reward, as configs/post/reward.yaml is"
        )
    tokenizer = Tokenizer.load(run_folder_of(checkpoint) / "tokenizer")
    model, lora = trained_as(metadata, where=checkpoint)
    plan = RewardModel(model)
    if lora is None:
        return restore_weights(checkpoint, abstract(plan, mesh)), tokenizer
    base = load_start(checkpoint, model, mesh)
    base = RewardModel.from_decoder(base, jax.random.key(metadata["config"]["seed"]))
    adapters = restore_weights(checkpoint, abstract(declare_adapters(plan, lora), mesh))
    return jax.jit(partial(merge_adapters, config=lora))(base, adapters), tokenizer


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
