"""Supervised fine-tuning: next-token prediction on the assistant's tokens of packed chats."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput
from maxlm.data.chat import EpochOrder, PackedChats, padded_batches, step_batches, training_order
from maxlm.post.sequences import share_of_rows
from maxlm.train.loss import language_model_loss
from maxlm.train.objective import RunContext
from maxlm.train.validate import Evaluator, language_model_values, target_bytes


class Sft:
    """Cross-entropy (and z-loss) where the assistant speaks."""

    needs_reference = False
    resume_multiple = 1

    def __init__(self, context: RunContext):
        self._context = context
        self._chats = self._read(context.config.objective.train_file)
        self._evaluator = Evaluator(language_model_loss, context.mesh)

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._context.config.objective.valid_file is not None:
            _ = self._valid_batches

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        return language_model_loss(model, batch, z_loss=self._context.config.objective.z_loss)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        size = self._context.config.batch_size
        return step_batches(self._order, self._chats.batch, start_step, batch_size=size, rows=self._context.rows)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        rows = self._order.indices(batch, batch_size=self._context.config.batch_size)
        return [{"id": self._chats.places[chat]} for row in rows for chat in self._chats.rows[row]]

    def validate(self, model: Any) -> dict[str, float]:
        if self._context.config.objective.valid_file is None:
            return {}
        byte_lengths = self._context.tokenizer.byte_lengths
        num_bytes = sum(int(target_bytes(batch, byte_lengths).sum()) for batch in self._valid_batches)
        mine = (share_of_rows(batch, self._context.rows) for batch in self._valid_batches)
        return language_model_values(self._evaluator.sums(model, mine)["cross_entropy"], num_bytes)

    @functools.cached_property
    def _order(self) -> EpochOrder:
        config = self._context.config
        return training_order(
            config.objective.train_file, len(self._chats.rows), batch_size=config.batch_size, seed=config.seed
        )

    @functools.cached_property
    def _valid_batches(self) -> list[Batch]:
        config = self._context.config
        chats = self._read(config.objective.valid_file)
        return [chats.batch(i) for i in padded_batches(len(chats.rows), config.batch_size, config.eval_batches)]

    def _read(self, path: str) -> PackedChats:
        context, config = self._context, self._context.config
        return PackedChats.read(path, context.tokenizer, row_length=config.row_length, form=config.objective)
