"""Rollouts: groups of answers sampled with the current weights, rewarded, and arranged as training rows.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers per prompt.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.data.chat import EpochOrder, padded_batches, share_of, training_order
from maxlm.data.preference import Prompt, read_prompts, round_up
from maxlm.data.sample import even_sample
from maxlm.objectives.sampler import Answers, Sampler
from maxlm.objectives.sequences import local_rows, target_log_probabilities, whole_rows
from maxlm.ops.advantages import has_signal
from maxlm.scoring.reward_call import CheckedReward
from maxlm.scoring.rewards import check_answer, find_reward
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import RunContext

# Random stream of validation: no step has this number.
_VALIDATION_STREAM = 2**32 - 1


class PolicyData:
    """Samples and rewards groups of answers to the prompts of a file.

    Args:
      advantages: rewards [N, G] -> how much better each answer is than expected: [N, G].
      needs_reference: whether batches hold the log-probabilities of the answers under the starting model.
    """

    def __init__(self, context: RunContext, *, advantages: Callable[[np.ndarray], np.ndarray], needs_reference: bool):
        config, objective = context.config, context.config.objective
        self._context = context
        self._advantages = advantages
        self._needs_reference = needs_reference
        self._reward = CheckedReward(objective.reward, find_reward(objective.reward))
        self._prompts = self._read(objective.train_file)
        self._valid_prompts = [] if objective.valid_file is None else self._read(objective.valid_file)
        longest = max(len(prompt.ids) for prompt in [*self._prompts, *self._valid_prompts])
        # A row, prompt and answer together, is divided over devices.
        length = min(round_up(longest + objective.max_new_tokens, context.row_parts), config.row_length)
        self._sampler = Sampler(
            context.tokenizer,
            context.mesh,
            prompt_length=length - objective.max_new_tokens,
            max_new_tokens=objective.max_new_tokens,
            seed=config.seed,
        )
        self._sum = jax.jit(jnp.sum)

        @jax.jit
        def reference_log_probabilities(model: Any, answers: Stream) -> jax.Array:
            return whole_rows(target_log_probabilities(model, answers, temperature=objective.temperature))

        self._reference_log_probabilities = reference_log_probabilities

    def prepare(self, frozen: dict[str, Any]) -> None:
        self._reward.try_out([*self._prompts, *self._valid_prompts])

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        step = start_step
        while True:
            yield from self._roll_out(current_model(), step)
            step += self._context.config.objective.updates_per_rollout

    def documents(self, batch: int) -> list[dict[str, Any]]:
        prompts = self._order.indices(batch, batch_size=self._context.config.batch_size)
        return [{"id": self._prompts[prompt].place} for prompt in prompts]

    def validate(self, model: Any) -> dict[str, float]:
        if not self._valid_prompts:
            return {}
        temperature = self._context.config.objective.temperature
        return {
            "reward": self._mean_valid_reward(model, temperature),
            "greedy_reward": self._mean_valid_reward(model, 0.0),
        }

    def _roll_out(self, model: Any, step: int) -> list[Batch]:
        """Answers to this process's prompts of the next `updates_per_rollout` steps, split by step."""
        config, objective = self._context.config, self._context.config.objective
        group_size, num_steps = objective.group_size, objective.updates_per_rollout
        mine = self._context.rows
        examples = [
            self._order.indices(step + offset, batch_size=config.batch_size, shard=mine.index, num_shards=mine.count)
            for offset in range(num_steps)
        ]
        numbers = [
            share_of(np.arange(config.batch_size) + n * config.batch_size, mine.index, mine.count)
            for n in range(num_steps)
        ]
        prompts = [self._prompts[index] for index in np.concatenate(examples) for _ in range(group_size)]
        rows = (np.concatenate(numbers)[:, None] * group_size + np.arange(group_size)).reshape(-1)

        answers = self._sampler(model, prompts, rows, stream=step, temperature=objective.temperature)
        rewards_NG = self._reward(prompts, answers.texts).reshape(-1, group_size)
        advantages_NG = self._advantages(rewards_NG)
        stream, sampled_BL = policy_rows(answers)
        values = {
            "sampled_BL": sampled_BL,
            "advantages_B": advantages_NG.reshape(-1),
            "rewards_B": rewards_NG.reshape(-1),
            "has_signal_B": np.repeat(has_signal(rewards_NG), group_size).astype(np.float32),
        }
        whole = Batch({"answers": stream}, values)
        return [
            self._with_reference(jax.tree.map(lambda x, n=n: share_of(x, n, num_steps), whole))
            for n in range(num_steps)
        ]

    def _with_reference(self, batch: Batch) -> Batch:
        if not self._needs_reference:
            return batch
        answers = put_batch(batch["answers"], self._context.mesh)
        reference_BL = local_rows(self._reference_log_probabilities(self._context.reference, answers))
        return replace(batch, values={**batch.values, "reference_BL": reference_BL})

    def _mean_valid_reward(self, model: Any, temperature: float) -> float:
        """Mean reward of one answer per prompt, in batches of the training shape, for which sampling is compiled."""
        config, objective = self._context.config, self._context.config.objective
        sample = even_sample([np.arange(len(self._valid_prompts))], config.eval_batches * config.batch_size)
        size = config.batch_size * objective.group_size * objective.updates_per_rollout
        total = 0.0
        for batch in padded_batches(len(sample), size, len(sample)):
            mine = share_of(batch, self._context.rows.index, self._context.rows.count)
            # The random draws of a prompt depend on its place in the file, not on the rest of the sample.
            places = sample[np.maximum(mine, 0)]
            drawn = [self._valid_prompts[place] for place in places]
            answers = self._sampler(model, drawn, places, stream=_VALIDATION_STREAM, temperature=temperature)
            rewards = np.where(mine >= 0, self._reward(drawn, answers.texts), 0.0).astype(np.float32)
            total += float(self._sum(put_batch(rewards, self._context.mesh)))
        return total / len(sample)

    @cached_property
    def _order(self) -> EpochOrder:
        config = self._context.config
        return training_order(
            config.objective.train_file, len(self._prompts), batch_size=config.batch_size, seed=config.seed
        )

    def _read(self, path: str) -> list[Prompt]:
        config = self._context.config
        return read_policy_prompts(path, config.objective, self._context.tokenizer, row_length=config.row_length)


def read_policy_prompts(path: str, objective: Any, tokenizer: Tokenizer, *, row_length: int) -> list[Prompt]:
    """The prompts of a file that leave room for an answer, each with an answer that the reward can match.

    Raises:
      DataError: a record is not a prompt, or none fits.
    """
    room = row_length - objective.max_new_tokens
    prompts = read_prompts(path, tokenizer, max_prompt_length=room, row_length=row_length, form=objective)
    for prompt in prompts:
        check_answer(objective.reward, prompt.record, prompt.place)
    return prompts


def policy_rows(answers: Answers) -> tuple[Stream, np.ndarray]:
    """Each prompt directly followed by its answer, and the sampled log-probability of each target: [B, L]."""
    num_rows, prompt_length = answers.prompts_RP.shape
    max_new_tokens = answers.tokens_RN.shape[1]
    rows, columns = np.nonzero(np.arange(max_new_tokens) < answers.lengths_R[:, None])
    places = answers.prompt_lengths_R[rows] + columns

    tokens = np.zeros((num_rows, prompt_length + max_new_tokens), np.int32)
    tokens[:, :prompt_length] = answers.prompts_RP
    tokens[rows, places] = answers.tokens_RN[rows, columns]
    ends = answers.prompt_lengths_R + answers.lengths_R
    segment_ids = (np.arange(tokens.shape[1]) < ends[:, None]).astype(np.int32)
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    loss_weights = np.zeros(tokens.shape, np.float32)
    loss_weights[rows, places - 1] = 1.0
    sampled_BL = np.zeros(tokens.shape, np.float32)
    sampled_BL[rows, places - 1] = answers.log_probabilities_RN[rows, columns]
    positions = np.arange(tokens.shape[1], dtype=np.int32) * segment_ids
    return Stream(tokens, targets, loss_weights, segment_ids, positions), sampled_BL
