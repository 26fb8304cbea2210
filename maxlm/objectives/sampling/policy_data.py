"""Rollouts: groups of answers sampled with the current weights, rewarded, and arranged as training rows.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers per prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.data.examples.chat import share_of
from maxlm.data.examples.preference import Prompt
from maxlm.data.loader import PackedRows, open_mixture
from maxlm.models.critic import without_critic
from maxlm.objectives.packed_rows import as_batch
from maxlm.objectives.sampling.answer_rewards import AnswerRewards
from maxlm.objectives.sampling.controls import Controls, ControlsLog
from maxlm.objectives.sampling.policy_advantages import RewardedAnswers
from maxlm.objectives.sampling.prompt_rounds import PromptRounds
from maxlm.objectives.sampling.rollouts import Rollout, RolloutFiles, measure, policy_rows
from maxlm.objectives.sampling.sample_log import LOGGED_ANSWERS, SampleLog
from maxlm.objectives.sampling.sampler import Answers
from maxlm.objectives.sequences import local_rows
from maxlm.ops.advantages import has_signal
from maxlm.ops.policy_losses import high_entropy_tokens, kl_estimate
from maxlm.runtime.agree import any_process
from maxlm.runtime.time_limit import in_background
from maxlm.scoring.reward_call import Rewards
from maxlm.train.objective import RunContext

# Prefix of the parts of a reward among a batch's values: the name of its metric.
REWARD_PART = "reward_"
# Values of answers whose means are metrics.
REPORTED = ("cost_B", "harmful_B", "multiplier_B", "kl_beta_B")
# 1.0 for answers without a reward, where a judge may have given none.
UNJUDGED = "unjudged_B"


# Rewards of a round, and costs if they are constrained.
RoundRewards = tuple[Rewards, Rewards | None]


class PolicyData:
    """Samples and rewards groups of answers to the prompts of a file. Settings are those of the policy objective."""

    def __init__(self, context: RunContext):
        config, objective = context.config, context.config.objective
        self._context = context
        self._reference = context.reference() if objective.needs_reference else None
        self._rounds = PromptRounds(context, num_rounds=self._num_rounds, environment=objective.environment)
        self._reward = AnswerRewards(context, objective.reward)
        constraint = objective.constraint
        self._cost = constraint and AnswerRewards(context, constraint.cost, key="objective.constraint.cost")
        start = Controls(0.0 if constraint is None else constraint.multiplier, objective.kl.beta)
        # Without a constraint or an adaptive coefficient nothing changes, and nothing is written.
        changes = constraint is not None or objective.kl.adaptive is not None
        self._controls = ControlsLog(context.folder if changes else None, start)
        self._measure = jax.jit(partial(measure, objective=objective))
        self._text = None if objective.pretraining is None else self._open_text()
        self._files = None
        if objective.staleness and context.folder is not None:
            # A run goes on from its last checkpoint, or from the one before if that one cannot be read.
            since = 2 * -(-config.checkpoint.every // objective.resume_multiple)
            self._files = RolloutFiles(context.folder, keep=since + objective.staleness + 1)

    def prepare(self, frozen: dict[str, Any]) -> None:
        prompts = [*self._rounds.prompts, *self._rounds.valid_prompts]
        for rewards in (self._reward, self._cost):
            if rewards is not None:
                rewards.try_out(prompts)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        sampled = self._sampled_batches(start_step, current_model)
        if self._text is None:
            return sampled
        rows = self._context.rows
        texts = map(as_batch, self._text.iterate(start_step, shard=rows.index, num_shards=rows.count))
        return (replace(batch, streams={**batch.streams, **text.streams}) for batch, text in zip(sampled, texts))

    def _sampled_batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        objective = self._context.config.objective
        number, staleness = start_step // objective.resume_multiple, objective.staleness
        log, controls = SampleLog(self._context, start_step), self._controls.open(number)
        # Rounds of sampling that are not yet trained on, each with its rewards.
        pending: deque[tuple[Rollout, Callable[[], RoundRewards]]] = deque()
        for earlier in range(number, number + staleness if number else 0):
            rollout = self._files.read(earlier)
            pending.append((rollout, in_background(partial(self._rewards_of, rollout))))
        while True:
            while len(pending) <= staleness:
                pending.append(self._start(current_model(), number + len(pending)))
            rollout, wait = pending.popleft()
            batches, controls = self._finish(rollout, *wait(), controls)
            self._controls.write(number + 1, controls)
            if log.is_due(step := number * objective.resume_multiple):
                log.write(self._samples(step, rollout, batches[0]))
            for _ in range(objective.epochs_per_rollout):
                yield from batches
            number += 1

    def documents(self, batch: int) -> list[dict[str, Any]]:
        objective = self._context.config.objective
        rollout, step = divmod(batch, objective.resume_multiple)
        number = rollout * objective.updates_per_rollout + step % objective.updates_per_rollout
        texts = [] if self._text is None else [asdict(document) for document in self._text.documents(batch)]
        return [*self._rounds.documents(number), *texts]

    def validate(self, model: Any) -> dict[str, float]:
        def measured(prompts: Sequence[Prompt], answers: Answers) -> dict[str, np.ndarray]:
            found = {"reward": self._reward.at_once(prompts, answers).total}
            if self._cost is not None:
                found["cost"] = self._cost.at_once(prompts, answers).total
                found["harmful"] = _is_harmful(found["cost"])
            return found

        return self._rounds.validate(without_critic(model), measured)

    def _start(self, model: Any, number: int) -> tuple[Rollout, Callable[[], RoundRewards]]:
        """Sample a round, and begin to reward it, while steps on earlier ones are computed if there is staleness."""
        rollout, rewards = self._sample(model, number)
        if rewards is not None:
            return rollout, lambda: (rewards, None)
        if self._files is not None:
            # Before training goes on: a checkpoint must not be newer than the answers that come after it.
            self._files.write(number, rollout)
        return rollout, in_background(partial(self._rewards_of, rollout))

    def _sample(self, model: Any, number: int) -> tuple[Rollout, Rewards | None]:
        """A round of sampling, with its rewards if they decide what is sampled."""
        objective, policy = self._context.config.objective, without_critic(model)
        prompts_R, answers, difference = self._rounds.sample(policy, number)
        rewards, scores = None, {}
        if objective.dynamic_sampling is not None:
            prompts_R, answers, rewards = self._sample_until_signal(policy, number, prompts_R, answers)
        else:
            scores = self._reward.scores(self._rounds.asked(prompts_R), answers)
        greedy, greedy_scores = None, {}
        if objective.advantage.needs_greedy:
            asked = self._rounds.asked(prompts_R[:: objective.group_size])
            greedy = self._rounds.greedy(policy, asked)
            greedy_scores = self._reward.scores(asked, greedy)
        stream, _ = policy_rows(answers)
        parts = [share_of_tree(stream, n, objective.updates_per_rollout) for n in range(objective.updates_per_rollout)]
        measured = [self._measured(model, part) for part in parts]
        given = {name: np.concatenate([part[name] for part in measured]) for name in measured[0]}
        given["sync_difference_B"] = np.full(len(prompts_R), difference, np.float32)
        costs = {} if self._cost is None else self._cost.scores(self._rounds.asked(prompts_R), answers)
        return Rollout(prompts_R, answers, given, greedy, scores, greedy_scores, costs), rewards

    def _sample_until_signal(
        self, policy: Any, number: int, prompts_R: np.ndarray, answers: Answers
    ) -> tuple[np.ndarray, Answers, Rewards]:
        """Sample more rounds until enough groups have different rewards; those come first, in order."""
        group_size, wanted = self._context.config.objective.group_size, len(prompts_R)
        rewards = self._reward.at_once(self._rounds.asked(prompts_R), answers)
        for round_number in range(1, self._num_rounds):
            signal = has_signal(rewards.total.reshape(-1, group_size))
            if not any_process(signal.sum() * group_size < wanted):
                break
            more_R, more, _ = self._rounds.sample(policy, number, round_number)
            added = self._reward.at_once(self._rounds.asked(more_R), more)
            prompts_R, answers = np.concatenate([prompts_R, more_R]), answers.joined(more)
            rewards = rewards.joined(added)
        signal = has_signal(rewards.total.reshape(-1, group_size))
        groups = np.sort(np.argsort(~signal, kind="stable")[: wanted // group_size])
        rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        return prompts_R[rows], answers.taken(rows), rewards.taken(rows)

    def _rewards_of(self, rollout: Rollout) -> RoundRewards:
        prompts, answers = self._rounds.asked(rollout.prompts_R), rollout.answers
        costs = None if self._cost is None else self._cost(prompts, answers, rollout.cost_scores)
        return self._reward(prompts, answers, rollout.scores), costs

    def _finish(
        self, rollout: Rollout, rewards: Rewards, costs: Rewards | None, controls: Controls
    ) -> tuple[list[Batch], Controls]:
        """The batches of a round of sampling, one for each of its steps, and the controls of the next one."""
        objective = self._context.config.objective
        num_steps, group_size = objective.updates_per_rollout, objective.group_size
        answers, given = rollout.answers, dict(rollout.measured)
        stream, sampled_BL = policy_rows(answers)
        is_truncated_B = self._is_truncated(answers)
        penalties_BL = np.zeros(sampled_BL.shape, np.float32)
        if self._reference is not None and objective.kl.within == "reward":
            log_p = (jnp.asarray(x_BL) for x_BL in (sampled_BL, given["reference_BL"]))
            penalties_BL = controls.kl_beta * np.asarray(kl_estimate(*log_p, estimator=objective.kl.estimator))
        greedy_N = None
        if rollout.greedy is not None:
            asked = self._rounds.asked(rollout.prompts_R[::group_size])
            greedy_N = self._reward(asked, rollout.greedy, rollout.greedy_scores).total
        total_B = rewards.total
        if costs is not None:
            total_B = (total_B - controls.multiplier * costs.total) / (1 + controls.multiplier)
        has_reward_B = np.isfinite(total_B)
        if greedy_N is not None:
            has_reward_B &= np.isfinite(np.repeat(greedy_N, group_size))
        # Of the others, the judge said nothing usable: they are left out like padding.
        stream = replace(stream, loss_weights=stream.loss_weights * has_reward_B[:, None])
        rewards_NG = total_B.astype(np.float32).reshape(-1, group_size)
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
            "rewards_B": np.nan_to_num(rewards.total),
            "has_signal_B": np.repeat(has_signal(rewards_NG), group_size).astype(np.float32),
            "lengths_B": answers.lengths_R.astype(np.float32),
            "is_truncated_B": is_truncated_B.astype(np.float32),
        }
        if len(rewards.parts) > 1:
            given |= {f"{REWARD_PART}{name}": np.nan_to_num(part_B) for name, part_B in rewards.parts.items()}
        if objective.judges:
            given[UNJUDGED] = (~has_reward_B).astype(np.float32)
        if returns_BL is not None:
            given["returns_BL"] = returns_BL
        given |= self._controlled(controls, costs, num_rows=len(total_B))
        if (entropies_BL := given.pop("entropies_BL", None)) is not None:
            given["high_entropy_BL"] = self._high_entropy(entropies_BL, stream.loss_weights > 0)
        whole = Batch({"answers": stream}, given)
        batches = [share_of_tree(whole, n, num_steps) for n in range(num_steps)]
        return batches, self._next_controls(controls, rollout, stream, sampled_BL, costs)

    def _high_entropy(self, entropies_BL: np.ndarray, is_answer_BL: np.ndarray) -> np.ndarray:
        """1.0 for the tokens that are learned: of each step of a round, over all processes."""
        objective = self._context.config.objective
        copies = jax.process_count() // self._context.rows.count
        parts = []
        for n in range(objective.updates_per_rollout):
            entropies, is_answer = share_of_tree((entropies_BL, is_answer_BL), n, objective.updates_per_rollout)
            known = np.where(is_answer, entropies, np.nan)
            if jax.process_count() > 1:
                known = multihost_utils.process_allgather(known)
            everywhere = np.sort(known[np.isfinite(known)])[::copies]
            parts.append(high_entropy_tokens(entropies, is_answer, everywhere, fraction=objective.top_entropy_fraction))
        return np.concatenate(parts)

    def _controlled(self, controls: Controls, costs: Rewards | None, *, num_rows: int) -> dict[str, np.ndarray]:
        """The values of a round's answers that are reported of a constraint and an adaptive coefficient."""
        given = {}
        if costs is not None:
            given = {"cost_B": np.nan_to_num(costs.total), "harmful_B": _is_harmful(costs.total)}
            given["multiplier_B"] = np.full(num_rows, controls.multiplier, np.float32)
        if self._context.config.objective.kl.adaptive is not None:
            given["kl_beta_B"] = np.full(num_rows, controls.kl_beta, np.float32)
        return given

    def _next_controls(
        self, controls: Controls, rollout: Rollout, stream: Stream, sampled_BL: np.ndarray, costs: Rewards | None
    ) -> Controls:
        """The controls of the next round, from means over the answers of all processes."""
        objective = self._context.config.objective

        def mean(x_B: np.ndarray) -> float | None:
            known = x_B[np.isfinite(x_B)]
            total, count = self._over_processes(np.array([np.sum(known, dtype=np.float64), len(known)]))
            return float(total / count) if count else None

        if costs is not None and (mean_cost := mean(costs.total)) is not None:
            limits = {"rate": objective.constraint.rate, "largest": objective.constraint.largest_multiplier}
            controls = controls.after_costs(mean_cost, limit=objective.constraint.limit, **limits)
        if (adaptive := objective.kl.adaptive) is not None:
            gain_BL = (sampled_BL - rollout.measured["reference_BL"]) * (stream.loss_weights > 0)
            if (kl := mean(gain_BL.sum(axis=1))) is not None:
                controls = controls.after_divergence(kl, target=adaptive.target, rate=adaptive.rate)
        return controls

    def _samples(self, step: int, rollout: Rollout, batch: Batch) -> Iterator[dict[str, Any]]:
        """The first answers of a round, as `samples.jsonl` has them."""
        values, tokenizer = batch.values, self._context.tokenizer
        parts = [name for name in values if name.startswith(REWARD_PART)]
        for row in range(min(LOGGED_ANSWERS, len(values["rewards_B"]))):
            prompt = self._rounds.prompts[rollout.prompts_R[row]]
            yield {
                "step": step,
                "id": prompt.place,
                "prompt": tokenizer.decode(prompt.ids),
                "answer": rollout.answers.texts[row],
                "reward": None if UNJUDGED in values and values[UNJUDGED][row] else float(values["rewards_B"][row]),
                **{name: float(values[name][row]) for name in parts},
                "advantage": float(values["advantages_BL"][row].sum() / max(values["lengths_B"][row], 1)),
                "weights": f"{rollout.answers.fingerprints_R[row]:08x}",
                "truncated": bool(values["is_truncated_B"][row]),
            }

    @property
    def _num_rounds(self) -> int:
        dynamic = self._context.config.objective.dynamic_sampling
        return 1 if dynamic is None else dynamic.max_rounds

    def _open_text(self) -> PackedRows:
        """Rows of pretraining: as many in a step as there are answers."""
        config, objective = self._context.config, self._context.config.objective
        return open_mixture(
            [(source.path, source.weight) for source in objective.pretraining.sources],
            seed=config.seed,
            batch_size=config.batch_size * objective.group_size,
            expected_fingerprint=self._context.tokenizer.fingerprint,
            expected_row_length=config.row_length,
        )

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


def _is_harmful(costs: np.ndarray) -> np.ndarray:
    """1.0 for answers whose cost is above 0."""
    return (costs > 0).astype(np.float32)


def share_of_tree(tree: Any, part: int, num_parts: int) -> Any:
    """One of equal parts of the rows of all arrays."""
    return jax.tree.map(lambda x: share_of(x, part, num_parts), tree)
