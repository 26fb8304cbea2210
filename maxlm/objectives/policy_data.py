"""Rollouts: groups of answers sampled with the current weights, rewarded, and arranged as training rows.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers per prompt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.data.chat import EpochOrder, padded_batches, share_of, training_order
from maxlm.data.preference import Prompt, read_prompts, round_up
from maxlm.data.sample import even_sample
from maxlm.models.critic import apply_critic, without_critic
from maxlm.objectives.policy_advantages import RewardedAnswers
from maxlm.objectives.sampler import Answers, Sampler
from maxlm.objectives.sequences import local_rows, target_log_probabilities, whole_rows
from maxlm.ops.advantages import has_signal, overlong_penalty
from maxlm.ops.policy_losses import kl_estimate
from maxlm.runtime.agree import any_process
from maxlm.scoring.reward_call import CheckedReward
from maxlm.scoring.rewards import check_record, find_rewards
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import RunContext

# Prefix of the parts of a reward among a batch's values: the name of its metric.
REWARD_PART = "reward_"
# Random streams of validation and of greedy answers: no step has these numbers.
_VALIDATION_STREAM = 2**32 - 1
_GREEDY_STREAM = 2**32 - 2


@dataclass(frozen=True)
class Groups:
    """Answers of this process to some prompts, a group for each, and their rewards and parts of them [N, G]."""

    prompts: list[Prompt]
    answers: Answers
    rewards_NG: np.ndarray
    parts_NG: dict[str, np.ndarray]

    def taken(self, indices: np.ndarray) -> "Groups":
        """The groups of these prompts, in this order."""
        size = self.rewards_NG.shape[1]
        rows = (indices[:, None] * size + np.arange(size)).reshape(-1)
        prompts = [self.prompts[index] for index in indices]
        parts_NG = {name: part_NG[indices] for name, part_NG in self.parts_NG.items()}
        return Groups(prompts, self.answers.taken(rows), self.rewards_NG[indices], parts_NG)

    def joined(self, other: "Groups") -> "Groups":
        """Both, one after the other."""
        rewards_NG = np.concatenate([self.rewards_NG, other.rewards_NG])
        parts_NG = {name: np.concatenate([part_NG, other.parts_NG[name]]) for name, part_NG in self.parts_NG.items()}
        return Groups(self.prompts + other.prompts, self.answers.joined(other.answers), rewards_NG, parts_NG)


class PolicyData:
    """Samples and rewards groups of answers to the prompts of a file. Settings are those of the policy objective."""

    def __init__(self, context: RunContext):
        config, objective = context.config, context.config.objective
        self._context = context
        self._reference = context.reference() if objective.needs_reference else None
        self._reward = CheckedReward(find_rewards(objective.reward), time_limit=objective.reward_time_limit)
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
        self._measure = jax.jit(partial(_measure, objective=objective))

    def prepare(self, frozen: dict[str, Any]) -> None:
        self._reward.try_out([*self._prompts, *self._valid_prompts])

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        objective = self._context.config.objective
        rollout = start_step // objective.resume_multiple
        while True:
            batches = self._roll_out(current_model(), rollout)
            for _ in range(objective.epochs_per_rollout):
                yield from batches
            rollout += 1

    def documents(self, batch: int) -> list[dict[str, Any]]:
        objective = self._context.config.objective
        rollout, step = divmod(batch, objective.resume_multiple)
        number = rollout * objective.updates_per_rollout + step % objective.updates_per_rollout
        prompts = np.concatenate(
            [self._indices(number, each, shard=0, num_shards=1) for each in range(self._num_rounds)]
        )
        return [{"id": self._prompts[prompt].place} for prompt in prompts]

    def validate(self, model: Any) -> dict[str, float]:
        if not self._valid_prompts:
            return {}
        model, temperature = without_critic(model), self._context.config.objective.temperature
        return {
            "reward": self._mean_valid_reward(model, temperature),
            "greedy_reward": self._mean_valid_reward(model, 0.0),
        }

    def _roll_out(self, model: Any, rollout: int) -> list[Batch]:
        """Answers to this process's prompts of the next `updates_per_rollout` steps, split by step."""
        objective = self._context.config.objective
        num_steps, group_size = objective.updates_per_rollout, objective.group_size
        policy = without_critic(model)
        groups, found = self._sample(policy, rollout)
        stream, sampled_BL = policy_rows(groups.answers)
        parts = [Batch({"answers": share_of_tree(stream, n, num_steps)}) for n in range(num_steps)]
        measured = [self._measured(model, part) for part in parts]
        given = {name: np.concatenate([part[name] for part in measured]) for name in measured[0]}

        lengths_B, is_answer_BL = groups.answers.lengths_R, stream.loss_weights > 0
        is_truncated_B = self._is_truncated(groups.answers)
        penalty_B = objective.overlong.penalty * overlong_penalty(
            lengths_B, longest=objective.max_new_tokens, buffer=objective.overlong.buffer
        )
        penalties_BL = np.zeros(sampled_BL.shape, np.float32)
        if self._reference is not None and objective.kl.within == "reward":
            log_p = (jnp.asarray(x_BL) for x_BL in (sampled_BL, given["reference_BL"]))
            penalties_BL = objective.kl.beta * np.asarray(kl_estimate(*log_p, estimator=objective.kl.estimator))
        answers = RewardedAnswers(
            rewards_NG=groups.rewards_NG - penalty_B.reshape(groups.rewards_NG.shape),
            is_answer_BL=is_answer_BL,
            penalties_BL=penalties_BL,
            add_up=self._over_processes,
            greedy_N=self._greedy_rewards(policy, groups.prompts) if objective.advantage.needs_greedy else None,
            values_BL=given.get("values_BL"),
        )
        advantages_BL, returns_BL = objective.advantage(answers)
        if not objective.overlong.learn:
            stream = replace(stream, loss_weights=stream.loss_weights * ~is_truncated_B[:, None])
        given |= {
            "sampled_BL": sampled_BL,
            "advantages_BL": advantages_BL,
            "rewards_B": groups.rewards_NG.reshape(-1),
            "has_signal_B": np.repeat(found, group_size),
            "lengths_B": lengths_B.astype(np.float32),
            "is_truncated_B": is_truncated_B.astype(np.float32),
        }
        if len(groups.parts_NG) > 1:
            given |= {f"{REWARD_PART}{name}": part_NG.reshape(-1) for name, part_NG in groups.parts_NG.items()}
        if returns_BL is not None:
            given["returns_BL"] = returns_BL
        whole = Batch({"answers": stream}, given)
        return [share_of_tree(whole, n, num_steps) for n in range(num_steps)]

    def _sample(self, policy: Any, rollout: int) -> tuple[Groups, np.ndarray]:
        """The groups to train on, and for each prompt the share of all sampled groups whose rewards differ."""
        objective = self._context.config.objective
        wanted = objective.updates_per_rollout * self._context.config.batch_size // self._context.rows.count
        groups = self._sample_round(policy, rollout, 0)
        signal = has_signal(groups.rewards_NG)
        for number in range(1, self._num_rounds):
            if not any_process(signal.sum() < wanted):
                break
            groups = groups.joined(self._sample_round(policy, rollout, number))
            signal = has_signal(groups.rewards_NG)
        # Groups with a signal first, otherwise in the order of sampling.
        chosen = np.sort(np.argsort(~signal, kind="stable")[:wanted])
        return groups.taken(chosen), np.full(wanted, signal.mean(), np.float32)

    def _sample_round(self, policy: Any, rollout: int, number: int) -> Groups:
        config, objective = self._context.config, self._context.config.objective
        group_size, num_steps, rows = objective.group_size, objective.updates_per_rollout, self._context.rows
        steps = rollout * num_steps + np.arange(num_steps)
        examples = [self._indices(int(step), number, shard=rows.index, num_shards=rows.count) for step in steps]
        places = [
            share_of(np.arange(config.batch_size) + n * config.batch_size, rows.index, rows.count)
            for n in range(num_steps)
        ]
        prompts = [self._prompts[index] for index in np.concatenate(examples)]
        first = (np.concatenate(places) + number * num_steps * config.batch_size) * group_size
        answers = self._sampler(
            policy,
            [prompt for prompt in prompts for _ in range(group_size)],
            (first[:, None] + np.arange(group_size)).reshape(-1),
            stream=rollout * objective.resume_multiple,
            temperature=objective.temperature,
        )
        rewards = self._reward(
            [prompt for prompt in prompts for _ in range(group_size)], answers.texts, answers.lengths_R
        )
        parts_NG = {name: part.reshape(-1, group_size) for name, part in rewards.parts.items()}
        return Groups(prompts, answers, rewards.total.reshape(-1, group_size), parts_NG)

    def _indices(self, step: int, number: int, *, shard: int, num_shards: int) -> np.ndarray:
        """The prompts of a step in one round of sampling."""
        return self._order.indices(
            step * self._num_rounds + number,
            batch_size=self._context.config.batch_size,
            shard=shard,
            num_shards=num_shards,
        )

    @property
    def _num_rounds(self) -> int:
        dynamic = self._context.config.objective.dynamic_sampling
        return 1 if dynamic is None else dynamic.max_rounds

    def _measured(self, model: Any, batch: Batch) -> dict[str, np.ndarray]:
        """What training needs to know of answers besides their rewards, from passes over whole rows."""
        measured = self._measure(model, self._reference, put_batch(batch["answers"], self._context.mesh))
        return {name: local_rows(x_BL) for name, x_BL in measured.items()}

    def _greedy_rewards(self, policy: Any, prompts: list[Prompt]) -> np.ndarray:
        """The reward of the greedy answer to each prompt: [N]."""
        rows = np.arange(len(prompts))
        answers = self._sampler(policy, prompts, rows, stream=_GREEDY_STREAM, temperature=0.0)
        return self._reward(prompts, answers.texts, answers.lengths_R).total

    def _is_truncated(self, answers: Answers) -> np.ndarray:
        """Whether an answer was cut off at max_new_tokens: bool [B]."""
        last_R = answers.tokens_RN[np.arange(len(answers.lengths_R)), answers.lengths_R - 1]
        return ~np.isin(last_R, self._context.tokenizer.stop_ids)

    def _over_processes(self, x: np.ndarray) -> np.ndarray:
        """The sum over processes with different rows."""
        if jax.process_count() == 1:
            return x
        copies = jax.process_count() / self._context.rows.count
        return np.sum(multihost_utils.process_allgather(x), axis=0) / copies

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
            rewards = self._reward(drawn, answers.texts, answers.lengths_R).total
            rewards = np.where(mine >= 0, rewards, 0.0).astype(np.float32)
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


def _measure(model: Any, reference: Any, answers: Stream, *, objective: Any) -> dict[str, jax.Array]:
    """Values [B, L] of the tokens of answers under the current policy, the starting model, and the critic."""

    def log_p(model: Any) -> jax.Array:
        return whole_rows(target_log_probabilities(model, answers, temperature=objective.temperature))

    measured = {}
    if objective.importance is not None:
        measured["old_BL"] = log_p(model)
    if reference is not None:
        measured["reference_BL"] = log_p(reference)
    if objective.critic is not None:
        measured["values_BL"] = whole_rows(apply_critic(model, answers))
    return measured


def share_of_tree(tree: Any, part: int, num_parts: int) -> Any:
    """One of equal parts of the rows of all arrays."""
    return jax.tree.map(lambda x: share_of(x, part, num_parts), tree)


def read_policy_prompts(path: str, objective: Any, tokenizer: Tokenizer, *, row_length: int) -> list[Prompt]:
    """The prompts of a file that leave room for an answer, each a record that some completion can satisfy.

    Raises:
      DataError: a record is not a prompt, or none fits.
    """
    room = row_length - objective.max_new_tokens
    prompts = read_prompts(path, tokenizer, max_prompt_length=room, row_length=row_length, form=objective)
    for prompt in prompts:
        check_record(objective.reward, prompt.record, prompt.place)
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
