"""Group-relative policy optimization (arXiv:2402.03300) on answers that a program can check.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers of a prompt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.chat import EpochOrder, padded_batches, share_of, training_order
from maxlm.data.preference import Prompt, read_prompts, round_up
from maxlm.data.sample import even_sample
from maxlm.post.advantages import group_advantages, has_signal
from maxlm.post.reward_call import CheckedReward
from maxlm.post.rewards import check_answer, find_reward
from maxlm.post.sampler import Answers, Sampler
from maxlm.post.sequences import local_rows, token_log_probabilities, token_scores
from maxlm.train.objective import RunContext

# Draws for validation: no step has this number.
_VALIDATION_STREAM = 2**32 - 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "sampled_BL", "reference_BL", "advantages_B", "rewards_B", "has_signal_B"],
    meta_fields=[],
)
@dataclass(frozen=True)
class PolicyBatch:
    """Answers to learn from.

    rows: prompt and answer; loss weights are 1 where the target is the answer's.
    sampled_BL: log-probability of each target under the policy that drew it.
    reference_BL: the same under the starting model; zeros where it is not asked for.
    advantages_B, rewards_B: of each answer.
    has_signal_B: 1.0 where the rewards of the answer's group differ.
    """

    rows: Batch
    sampled_BL: Any
    reference_BL: Any
    advantages_B: Any
    rewards_B: Any
    has_signal_B: Any


def clipped_surrogate(
    log_ratio_BL: jax.Array, advantages_B: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, and whether the clip holds it (arXiv:1707.06347, with two bounds as in arXiv:2503.14476).

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = p(token) / p_sampled(token)

    Returns:
      (loss [B, L], bool [B, L]: the clip is active, so the token has no gradient).
    """
    ratio_BL = jnp.exp(log_ratio_BL)
    advantages_B1 = advantages_B[:, None]
    free_BL = ratio_BL * advantages_B1
    clipped_BL = jnp.clip(ratio_BL, 1 - clip_low, 1 + clip_high) * advantages_B1
    return -jnp.minimum(free_BL, clipped_BL), clipped_BL < free_BL


def kl_to_reference(log_p_BL: jax.Array, log_reference_BL: jax.Array) -> jax.Array:
    """An estimate of KL(p || p_ref) from samples of p that is never negative (Schulman, 2020: "k3").

    p_ref / p - log(p_ref / p) - 1
    """
    log_ratio_BL = log_reference_BL - log_p_BL
    return jnp.expm1(log_ratio_BL) - log_ratio_BL


class Grpo:
    """Sample answers in groups, reward them, and make the better ones of each group likelier.

    The loss is a sum over the tokens of all answers divided by their number, so that a token counts the same in a
    short answer and in a long one.
    """

    def __init__(self, context: RunContext):
        config, objective = context.config, context.config.objective
        self._context = context
        self._reward = CheckedReward(objective.reward, find_reward(objective.reward))
        self._prompts = self._read(objective.train_file)
        self._valid_prompts = [] if objective.valid_file is None else self._read(objective.valid_file)
        longest = max(len(prompt.ids) for prompt in [*self._prompts, *self._valid_prompts])
        # Prompt and answer together are what devices share along a row.
        length = min(round_up(longest + objective.max_new_tokens, context.row_parts), config.row_length)
        self._sampler = Sampler(
            context.tokenizer,
            context.mesh,
            prompt_length=length - objective.max_new_tokens,
            max_new_tokens=objective.max_new_tokens,
            seed=config.seed,
        )
        self._token_scores = jax.jit(partial(token_scores, temperature=objective.temperature))
        self._sum = jax.jit(jnp.sum)

    @property
    def needs_reference(self) -> bool:
        return self._context.config.objective.kl_beta > 0

    @property
    def resume_multiple(self) -> int:
        """Answers are sampled with the weights of every so many steps, so a run can only go on from one of those."""
        return self._context.config.objective.updates_per_rollout

    def prepare(self, frozen: dict[str, Any]) -> None:
        self._reward.try_out([*self._prompts, *self._valid_prompts])

    def loss(self, model: Any, batch: PolicyBatch) -> LossOutput:
        objective = self._context.config.objective
        weights_BL = batch.rows.loss_weights
        num_tokens, num_rows = jnp.sum(weights_BL), jnp.sum(jnp.ones_like(batch.rewards_B))

        log_p_BL, auxiliary = token_log_probabilities(model, batch.rows, temperature=objective.temperature)
        loss_BL, is_clipped_BL = clipped_surrogate(
            log_p_BL - batch.sampled_BL,
            batch.advantages_B,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
        )
        terms = {"policy": Term(jnp.sum(weights_BL * loss_BL), num_tokens)}
        metrics = {
            "reward": Term(jnp.sum(batch.rewards_B), num_rows),
            "groups_with_signal": Term(jnp.sum(batch.has_signal_B), num_rows),
            "completion_length": Term(num_tokens, num_rows),
            "clip_fraction": Term(jnp.sum(weights_BL * is_clipped_BL), num_tokens),
        }
        if objective.kl_beta:
            kl_BL = kl_to_reference(log_p_BL, batch.reference_BL)
            terms["kl_penalty"] = Term(objective.kl_beta * jnp.sum(weights_BL * kl_BL), num_tokens)
            metrics["kl"] = Term(jnp.sum(weights_BL * kl_BL), num_tokens)
        return LossOutput(terms, metrics).joined(auxiliary)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[PolicyBatch]:
        step = start_step
        while True:
            yield from self._roll_out(current_model(), step)
            step += self.resume_multiple

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

    def _roll_out(self, model: Any, step: int) -> list[PolicyBatch]:
        """Answers for this process's prompts of the next `updates_per_rollout` steps, cut into those steps."""
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
        advantages_NG = group_advantages(rewards_NG, normalize_std=objective.normalize_std)
        sequences, sampled_BL = policy_rows(answers)
        whole = PolicyBatch(
            rows=sequences,
            sampled_BL=sampled_BL,
            reference_BL=np.zeros_like(sampled_BL),
            advantages_B=advantages_NG.reshape(-1),
            rewards_B=rewards_NG.reshape(-1),
            has_signal_B=np.repeat(has_signal(rewards_NG), group_size).astype(np.float32),
        )
        return [
            self._with_reference(jax.tree.map(lambda x, n=n: share_of(x, n, num_steps), whole))
            for n in range(num_steps)
        ]

    def _with_reference(self, batch: PolicyBatch) -> PolicyBatch:
        if not self.needs_reference:
            return batch
        scores = self._token_scores(self._context.reference, put_batch(batch.rows, self._context.mesh))
        return PolicyBatch(**{**vars(batch), "reference_BL": local_rows(scores)})

    def _mean_valid_reward(self, model: Any, temperature: float) -> float:
        """One answer for each prompt, in batches shaped as those of training, for which sampling is compiled."""
        config, objective = self._context.config, self._context.config.objective
        sample = even_sample([np.arange(len(self._valid_prompts))], config.eval_batches * config.batch_size)
        size = config.batch_size * objective.group_size * objective.updates_per_rollout
        total = 0.0
        for batch in padded_batches(len(sample), size, len(sample)):
            mine = share_of(batch, self._context.rows.index, self._context.rows.count)
            # The draws of a prompt depend on its place in the file, and not on which others are taken.
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
        room = config.row_length - config.objective.max_new_tokens
        prompts = read_prompts(
            path,
            self._context.tokenizer,
            max_prompt_length=room,
            row_length=config.row_length,
            form=config.objective,
        )
        for prompt in prompts:
            check_answer(config.objective.reward, prompt.record, prompt.place)
        return prompts


def policy_rows(answers: Answers) -> tuple[Batch, np.ndarray]:
    """Each prompt with its answer right behind it, and the sampled log-probability of each target: [B, L]."""
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
    return Batch(tokens, targets, loss_weights, segment_ids, positions), sampled_BL
