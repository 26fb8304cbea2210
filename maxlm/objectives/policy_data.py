"""Rollouts: groups of answers sampled with the current weights, rewarded, and arranged as training rows.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers per prompt.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from maxlm.models.critic import without_critic
from maxlm.objectives.conversations import Conversations
from maxlm.objectives.policy_advantages import RewardedAnswers
from maxlm.objectives.rollouts import Rollout, RolloutFiles, in_background, measure, policy_rows
from maxlm.objectives.sampler import Answers, Sampler
from maxlm.objectives.sequences import local_rows
from maxlm.objectives.weight_sync import WeightSync
from maxlm.ops.advantages import has_signal
from maxlm.ops.policy_losses import kl_estimate
from maxlm.runtime.agree import any_process
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.storage import LineLog
from maxlm.scoring.reward_call import CheckedReward, Rewards
from maxlm.scoring.rewards import check_record, find_rewards
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import RunContext

# Prefix of the parts of a reward among a batch's values: the name of its metric.
REWARD_PART = "reward_"
# Answers of a round that are written to `samples.jsonl`.
_LOGGED = 4
# Random streams of validation and of greedy answers: no step has these numbers.
_VALIDATION_STREAM = 2**32 - 1
_GREEDY_STREAM = 2**32 - 2


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
        length = min(round_up(longest + objective.longest_answer, context.row_parts), config.row_length)
        environment = objective.environment
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
        self._measure = jax.jit(partial(measure, objective=objective))
        self._files = None
        if objective.staleness and context.folder is not None:
            # A run goes on from its last checkpoint, or from the one before if that one cannot be read.
            since = 2 * -(-config.checkpoint.every // objective.resume_multiple)
            self._files = RolloutFiles(context.folder, keep=since + objective.staleness + 1)

    def prepare(self, frozen: dict[str, Any]) -> None:
        self._reward.try_out([*self._prompts, *self._valid_prompts])

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        objective = self._context.config.objective
        number, staleness = start_step // objective.resume_multiple, objective.staleness
        log = self._open_log(start_step)
        # Rounds of sampling that are not yet trained on, each with its rewards.
        pending: deque[tuple[Rollout, Callable[[], Rewards]]] = deque()
        for earlier in range(number, number + staleness if number else 0):
            rollout = self._files.read(earlier)
            pending.append((rollout, in_background(partial(self._rewards_of, rollout))))
        while True:
            while len(pending) <= staleness:
                pending.append(self._start(current_model(), number + len(pending)))
            rollout, wait = pending.popleft()
            batches = self._finish(rollout, wait())
            self._log_samples(log, number, rollout, batches)
            for _ in range(objective.epochs_per_rollout):
                yield from batches
            number += 1

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

    def _start(self, model: Any, number: int) -> tuple[Rollout, Callable[[], Rewards]]:
        """Sample a round, and begin to reward it, while steps on earlier ones are computed if there is staleness."""
        rollout, rewards = self._sample(model, number)
        if rewards is not None:
            return rollout, lambda: rewards
        if self._files is not None:
            # Before training goes on: a checkpoint must not be newer than the answers that come after it.
            self._files.write(number, rollout)
        return rollout, in_background(partial(self._rewards_of, rollout))

    def _sample(self, model: Any, number: int) -> tuple[Rollout, Rewards | None]:
        """A round of sampling, with its rewards if they decide what is sampled."""
        objective, policy = self._context.config.objective, without_critic(model)
        prompts_R, answers = self._sample_once(policy, number, 0)
        rewards = None
        if objective.dynamic_sampling is not None:
            prompts_R, answers, rewards = self._sample_until_signal(policy, number, prompts_R, answers)
        difference = self._sync.check(policy, answers, temperature=objective.temperature)
        greedy = None
        if objective.advantage.needs_greedy:
            asked = [self._prompts[index] for index in prompts_R[:: objective.group_size]]
            greedy = self._sampler(policy, asked, np.arange(len(asked)), stream=_GREEDY_STREAM, temperature=0.0)
        stream, _ = policy_rows(answers)
        parts = [share_of_tree(stream, n, objective.updates_per_rollout) for n in range(objective.updates_per_rollout)]
        measured = [self._measured(model, part) for part in parts]
        given = {name: np.concatenate([part[name] for part in measured]) for name in measured[0]}
        given["sync_difference_B"] = np.full(len(prompts_R), difference, np.float32)
        return Rollout(prompts_R, answers, given, greedy), rewards

    def _sample_until_signal(
        self, policy: Any, number: int, prompts_R: np.ndarray, answers: Answers
    ) -> tuple[np.ndarray, Answers, Rewards]:
        """Sample more rounds until enough groups have different rewards; those come first, in order."""
        group_size, wanted = self._context.config.objective.group_size, len(prompts_R)
        rewards = self._reward([self._prompts[index] for index in prompts_R], answers.texts, answers.lengths_R)
        for round_number in range(1, self._num_rounds):
            signal = has_signal(rewards.total.reshape(-1, group_size))
            if not any_process(signal.sum() * group_size < wanted):
                break
            more_R, more = self._sample_once(policy, number, round_number)
            added = self._reward([self._prompts[index] for index in more_R], more.texts, more.lengths_R)
            prompts_R, answers = np.concatenate([prompts_R, more_R]), answers.joined(more)
            rewards = rewards.joined(added)
        signal = has_signal(rewards.total.reshape(-1, group_size))
        groups = np.sort(np.argsort(~signal, kind="stable")[: wanted // group_size])
        rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        return prompts_R[rows], answers.taken(rows), rewards.taken(rows)

    def _sample_once(self, policy: Any, number: int, round_number: int) -> tuple[np.ndarray, Answers]:
        """Answers to this process's prompts of the next `updates_per_rollout` steps, and the index of each's prompt."""
        config, objective = self._context.config, self._context.config.objective
        group_size, num_steps, rows = objective.group_size, objective.updates_per_rollout, self._context.rows
        steps = number * num_steps + np.arange(num_steps)
        prompts = [self._indices(int(step), round_number, shard=rows.index, num_shards=rows.count) for step in steps]
        places = [
            share_of(np.arange(config.batch_size) + n * config.batch_size, rows.index, rows.count)
            for n in range(num_steps)
        ]
        prompts_R = np.repeat(np.concatenate(prompts), group_size)
        first = (np.concatenate(places) + round_number * num_steps * config.batch_size) * group_size
        answers = self._sampler(
            policy,
            [self._prompts[index] for index in prompts_R],
            (first[:, None] + np.arange(group_size)).reshape(-1),
            stream=number * objective.resume_multiple,
            temperature=objective.temperature,
            group_size=group_size,
        )
        return prompts_R, answers

    def _rewards_of(self, rollout: Rollout) -> Rewards:
        prompts = [self._prompts[index] for index in rollout.prompts_R]
        return self._reward(prompts, rollout.answers.texts, rollout.answers.lengths_R)

    def _finish(self, rollout: Rollout, rewards: Rewards) -> list[Batch]:
        """The batches of a round of sampling, one for each of its steps."""
        objective = self._context.config.objective
        num_steps, group_size = objective.updates_per_rollout, objective.group_size
        answers, given = rollout.answers, dict(rollout.measured)
        stream, sampled_BL = policy_rows(answers)
        is_truncated_B = self._is_truncated(answers)
        penalties_BL = np.zeros(sampled_BL.shape, np.float32)
        if self._reference is not None and objective.kl.within == "reward":
            log_p = (jnp.asarray(x_BL) for x_BL in (sampled_BL, given["reference_BL"]))
            penalties_BL = objective.kl.beta * np.asarray(kl_estimate(*log_p, estimator=objective.kl.estimator))
        greedy_N = None
        if rollout.greedy is not None:
            prompts = [self._prompts[index] for index in rollout.prompts_R[::group_size]]
            greedy_N = self._reward(prompts, rollout.greedy.texts, rollout.greedy.lengths_R).total
        rewards_NG = rewards.total.reshape(-1, group_size)
        advantages_BL, returns_BL = objective.advantage(
            RewardedAnswers(
                rewards_NG=rewards_NG,
                is_answer_BL=stream.loss_weights > 0,
                penalties_BL=penalties_BL,
                add_up=self._over_processes,
                greedy_N=greedy_N,
                values_BL=given.get("values_BL"),
            )
        )
        if not objective.learn_truncated:
            stream = replace(stream, loss_weights=stream.loss_weights * ~is_truncated_B[:, None])
        given |= {
            "sampled_BL": sampled_BL,
            "advantages_BL": advantages_BL,
            "rewards_B": rewards.total,
            "has_signal_B": np.repeat(has_signal(rewards_NG), group_size).astype(np.float32),
            "lengths_B": answers.lengths_R.astype(np.float32),
            "is_truncated_B": is_truncated_B.astype(np.float32),
        }
        if len(rewards.parts) > 1:
            given |= {f"{REWARD_PART}{name}": part_B for name, part_B in rewards.parts.items()}
        if returns_BL is not None:
            given["returns_BL"] = returns_BL
        whole = Batch({"answers": stream}, given)
        return [share_of_tree(whole, n, num_steps) for n in range(num_steps)]

    def _open_log(self, start_step: int) -> LineLog | None:
        """`samples.jsonl` of the run folder, without samples of steps that are repeated."""
        if self._context.folder is None or not is_primary():
            return None
        return LineLog(self._context.folder / "samples.jsonl", keep=lambda line: json.loads(line)["step"] < start_step)

    def _log_samples(self, log: LineLog | None, number: int, rollout: Rollout, batches: list[Batch]) -> None:
        """Write the first answers of some rounds: as many rounds as there are records of metrics."""
        config, objective = self._context.config, self._context.config.objective
        step, every = number * objective.resume_multiple, config.log_every
        if log is None or -step % every >= objective.resume_multiple:
            return
        values, tokenizer = batches[0].values, self._context.tokenizer
        parts = [name for name in values if name.startswith(REWARD_PART)]
        for row in range(min(_LOGGED, len(values["rewards_B"]))):
            prompt = self._prompts[rollout.prompts_R[row]]
            record = {
                "step": step,
                "id": prompt.place,
                "prompt": tokenizer.decode(prompt.ids),
                "answer": rollout.answers.texts[row],
                "reward": float(values["rewards_B"][row]),
                **{name: float(values[name][row]) for name in parts},
                "advantage": float(values["advantages_BL"][row].sum() / max(values["lengths_B"][row], 1)),
                "weights": f"{rollout.answers.fingerprints_R[row]:08x}",
                "truncated": bool(values["is_truncated_B"][row]),
            }
            log.append(json.dumps(record, ensure_ascii=False))

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

    def _measured(self, model: Any, answers: Stream) -> dict[str, np.ndarray]:
        """What training needs to know of answers besides their rewards, from passes over whole rows."""
        measured = self._measure(model, self._reference, put_batch(answers, self._context.mesh))
        return {name: local_rows(x_BL) for name, x_BL in measured.items()}

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


def share_of_tree(tree: Any, part: int, num_parts: int) -> Any:
    """One of equal parts of the rows of all arrays."""
    return jax.tree.map(lambda x: share_of(x, part, num_parts), tree)


def read_policy_prompts(path: str, objective: Any, tokenizer: Tokenizer, *, row_length: int) -> list[Prompt]:
    """The prompts of a file that leave room for an answer, each a record that some completion can satisfy.

    Raises:
      DataError: a record is not a prompt, or none fits.
    """
    room = row_length - objective.longest_answer
    tools = None if objective.environment is None else objective.environment.build().tools
    prompts = read_prompts(path, tokenizer, max_prompt_length=room, row_length=row_length, form=objective, tools=tools)
    for prompt in prompts:
        check_record(objective.reward, prompt.record, prompt.place)
    return prompts
