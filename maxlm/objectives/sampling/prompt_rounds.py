"""Prompts of a file, and groups of answers to those of some steps, sampled with the current weights.

Dimensions: R answers of this process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.train import TrainConfig
from maxlm.core.batch import put_batch
from maxlm.data.examples.chat import EpochOrder, padded_batches, share_of, training_order
from maxlm.data.examples.preference import Prompt, pad, read_prompts, round_up
from maxlm.data.sample import even_sample
from maxlm.objectives.record_data import first_indices
from maxlm.objectives.sampling.conversations import Conversations
from maxlm.objectives.sampling.environments import EnvironmentConfig
from maxlm.objectives.sampling.sampler import Answers, Sampler
from maxlm.objectives.sampling.weight_sync import WeightSync
from maxlm.prompts.chat_template import ChatTokens
from maxlm.scoring.rewards import check_record, parts_of
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow, RunContext

# Random streams of validation and of greedy answers: no step has these numbers.
_VALIDATION_STREAM = 2**32 - 1
_GREEDY_STREAM = 2**32 - 2


class PromptRounds:
    """Rounds of sampling, each for `updates_per_rollout` steps. Settings are those of the objective.

    Args:
      num_rounds: how often the answers of a step may be sampled, to other prompts each time.
      environment: answers are conversations with its tools.
    """

    def __init__(self, context: RunContext, *, num_rounds: int = 1, environment: EnvironmentConfig | None = None):
        config, objective = context.config, context.config.objective
        self._context, self._num_rounds = context, num_rounds
        self._tools = None if environment is None else environment.build().tools
        self.prompts = self._read(objective.train_file)
        self.valid_prompts = [] if objective.valid_file is None else self._read(objective.valid_file)
        longest = max(len(prompt.ids) for prompt in [*self.prompts, *self.valid_prompts])
        # A row, prompt and answer together, is divided over devices.
        length = min(round_up(longest + objective.longest_answer, context.row_parts), config.row_length)
        sampler = Sampler(
            context.tokenizer,
            context.mesh,
            prompt_length=length - objective.max_new_tokens if environment is None else length,
            max_new_tokens=objective.max_new_tokens,
            seed=config.seed,
            layout=objective.sampler,
        )
        self._sampler: Sampler | Conversations = sampler
        if environment is not None:
            self._sampler = Conversations(
                sampler, context.tokenizer, environment.build(), environment.max_turns, environment.max_tokens
            )
        self._sync = WeightSync(context.mesh)
        self._sum = jax.jit(jnp.sum)

    def sample(self, policy: Any, number: int, round_number: int = 0) -> tuple[np.ndarray, Answers, float]:
        """Answers to this process's prompts of the next `updates_per_rollout` steps.

        Returns:
          (the index of each one's prompt, answers, the difference that `WeightSync` found).

        Raises:
          WeightSyncError: they were not sampled from this policy.
        """
        config, objective = self._context.config, self._context.config.objective
        group_size, num_steps, rows = objective.group_size, objective.updates_per_rollout, self._context.rows
        steps = number * num_steps + np.arange(num_steps)
        prompts = [self.indices(int(step), round_number, shard=rows.index, num_shards=rows.count) for step in steps]
        places = [
            share_of(np.arange(config.batch_size) + n * config.batch_size, rows.index, rows.count)
            for n in range(num_steps)
        ]
        prompts_R = np.repeat(np.concatenate(prompts), group_size)
        first = (np.concatenate(places) + round_number * num_steps * config.batch_size) * group_size
        answers = self._sampler(
            policy,
            self.asked(prompts_R),
            (first[:, None] + np.arange(group_size)).reshape(-1),
            stream=number * objective.resume_multiple,
            temperature=objective.temperature,
            group_size=group_size,
        )
        return prompts_R, answers, self._sync.check(policy, answers, temperature=objective.temperature)

    def greedy(self, policy: Any, prompts: Sequence[Prompt]) -> Answers:
        """The greedy answer to each prompt."""
        return self._sampler(policy, prompts, np.arange(len(prompts)), stream=_GREEDY_STREAM, temperature=0.0)

    def asked(self, prompts_R: np.ndarray) -> list[Prompt]:
        """The prompts with these indices."""
        return [self.prompts[index] for index in prompts_R]

    def documents(self, step: int) -> list[dict[str, Any]]:
        """The prompts of a step, over all processes, as `TrainingData` names documents."""
        prompts = [self.indices(step, each, shard=0, num_shards=1) for each in range(self._num_rounds)]
        return [{"id": self.prompts[prompt].place} for prompt in np.concatenate(prompts)]

    def validate(
        self, policy: Any, measure: Callable[[Sequence[Prompt], Answers], Mapping[str, np.ndarray]]
    ) -> dict[str, float]:
        """Means over answers to the validation prompts of values by name, without NaN; of greedy answers named
        `greedy_NAME`. A name whose values are all NaN is left out."""
        if not self.valid_prompts:
            return {}
        sampled = self._valid_means(policy, measure, self._context.config.objective.temperature)
        greedy = self._valid_means(policy, measure, 0.0)
        return sampled | {f"greedy_{name}": value for name, value in greedy.items()}

    def indices(self, step: int, number: int, *, shard: int, num_shards: int) -> np.ndarray:
        """The prompts of a step in one round of sampling."""
        return self._order.indices(
            step * self._num_rounds + number,
            batch_size=self._context.config.batch_size,
            shard=shard,
            num_shards=num_shards,
        )

    def _valid_means(
        self,
        policy: Any,
        measure: Callable[[Sequence[Prompt], Answers], Mapping[str, np.ndarray]],
        temperature: float,
    ) -> dict[str, float]:
        """Means over one answer per prompt, in batches of the training shape, for which sampling is compiled."""
        config, objective = self._context.config, self._context.config.objective
        sample = even_sample([np.arange(len(self.valid_prompts))], config.eval_batches * config.batch_size)
        size = config.batch_size * objective.group_size * objective.updates_per_rollout
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}

        def add_up(sums: dict[str, float], name: str, values: np.ndarray) -> None:
            counted = values.astype(np.float32)
            sums[name] = sums.get(name, 0.0) + float(self._sum(put_batch(counted, self._context.mesh)))

        for batch in padded_batches(len(sample), size, len(sample)):
            mine = share_of(batch, self._context.rows.index, self._context.rows.count)
            # The random draws of a prompt depend on its place in the file, not on the rest of the sample.
            places = sample[np.maximum(mine, 0)]
            drawn = [self.valid_prompts[place] for place in places]
            answers = self._sampler(policy, drawn, places, stream=_VALIDATION_STREAM, temperature=temperature)
            for name, values in measure(drawn, answers).items():
                is_known = (mine >= 0) & np.isfinite(values)
                add_up(totals, name, np.where(is_known, values, 0.0))
                add_up(counts, name, is_known)
        return {name: total / counts[name] for name, total in totals.items() if counts[name]}

    @cached_property
    def _order(self) -> EpochOrder:
        config = self._context.config
        return training_order(
            config.objective.train_file, len(self.prompts), batch_size=config.batch_size, seed=config.seed
        )

    def _read(self, path: str) -> list[Prompt]:
        config = self._context.config
        return read_policy_prompts(
            path, config.objective, self._context.tokenizer, row_length=config.row_length, tools=self._tools
        )


def preview_prompts(
    objective: Any, config: TrainConfig, tokenizer: Tokenizer, num_examples: int
) -> Iterator[PreviewRow]:
    """The first prompts that answers are sampled to, each with what rewards it."""
    environment = getattr(objective, "environment", None)
    tools = None if environment is None else environment.build().tools
    prompts = read_policy_prompts(objective.train_file, objective, tokenizer, row_length=config.row_length, tools=tools)
    reward = ", ".join(part.source for part in parts_of(objective.reward))
    for number, index in enumerate(first_indices(len(prompts), config, num_examples), 1):
        ids = prompts[index].ids
        note = f"answer: {prompts[index].record.get('answer')}   reward: {reward}"
        yield PreviewRow(f"prompt {number}", pad([ChatTokens(ids, [0.0] * len(ids))], len(ids)), note)


def read_policy_prompts(
    path: str, objective: Any, tokenizer: Tokenizer, *, row_length: int, tools: Any = None
) -> list[Prompt]:
    """The prompts of a file that leave room for an answer, each a record that some completion can satisfy.

    Raises:
      DataError: a record is not a prompt, or none fits.
    """
    room = row_length - objective.longest_answer
    prompts = read_prompts(path, tokenizer, max_prompt_length=room, row_length=row_length, form=objective, tools=tools)
    for prompt in prompts:
        check_record(objective.reward, prompt.record, prompt.place)
    return prompts
