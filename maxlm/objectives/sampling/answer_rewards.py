"""Rewards of sampled answers: of their texts by functions, and of their tokens by reward models.

Dimensions: R answers of this process, B rows (answers), L length of prompt and answer.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from maxlm.core.batch import Stream, put_batch
from maxlm.core.sharding import shard
from maxlm.data.examples.chat import share_of
from maxlm.data.examples.preference import Prompt, pad, round_up
from maxlm.errors import CheckpointError, ConfigError, TokenizerError
from maxlm.interop.load import load_reward_model
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.scores import sequence_scores
from maxlm.objectives.beside import check_beside
from maxlm.objectives.sampling.sampler import Answers
from maxlm.objectives.sequences import local_rows
from maxlm.prompts.chat_template import ChatTokens
from maxlm.scoring.judged_reward import JudgeOfAnswers
from maxlm.scoring.reward_call import CheckedReward, Rewards
from maxlm.scoring.rewards import RewardPart, RewardSetting, find_rewards, judges_of, names_of, parts_of
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import RunContext


class AnswerRewards:
    """The weighted sum of reward functions, judges and reward models, the latter sharded over the mesh like the policy.

    Scores of models are computed by all processes together, so they are apart from calls of functions and judges, which
    may run while training goes on.

    Raises:
      MaxlmError: there is no such function or model, or it does not fit.
    """

    def __init__(self, context: RunContext, setting: RewardSetting, *, key: str = "objective.reward"):
        objective = context.config.objective
        self._context, self._key = context, key
        self._functions = CheckedReward(find_rewards(setting), time_limit=objective.reward_time_limit)
        parts = parts_of(setting)
        paths = {name: part.model for name, part in zip(names_of(parts), parts) if isinstance(part, RewardPart)}
        weights = dict(zip(names_of(parts), (part.weight for part in parts)))
        self._models = {name: load_reward_model_beside(path, context, key=key) for name, path in paths.items() if path}
        self._judges = open_judges(setting, context, key=key)
        self._weights = {name: weights[name] for name in self._models}
        self._judge_weights = {name: weights[name] for name in self._judges}
        self._score = jax.jit(_scores)
        self._tail = _tail(context.tokenizer)

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Call the functions and judges; see `CheckedReward.try_out` and `JudgeOfAnswers.try_out`."""
        self._functions.try_out(prompts)
        for judge in self._judges.values():
            judge.try_out(prompts[0])

    def scores(self, prompts: Sequence[Prompt], answers: Answers) -> dict[str, np.ndarray]:
        """The scores of answers at their last token under each reward model: float32 [R] by name."""
        if not self._models:
            return {}
        context, num_parts = self._context, self._context.config.objective.updates_per_rollout
        rows = self._rows(prompts, answers)
        parts = [jax.tree.map(lambda x, n=n: share_of(x, n, num_parts), rows) for n in range(num_parts)]
        placed = [put_batch(part, context.mesh) for part in parts]
        return {
            name: np.concatenate([local_rows(self._score(model, part)) for part in placed])
            for name, model in self._models.items()
        }

    def __call__(self, prompts: Sequence[Prompt], answers: Answers, scores: Mapping[str, np.ndarray]) -> Rewards:
        """The rewards of answers, given their `scores`; NaN for those that a judge has said nothing usable about.

        Raises:
          ConfigError: a function raised or took too long, or its reward is not a finite number.
          MaxlmError: a judge cannot go on; see `JudgeOfAnswers`.
        """
        rewards = self._functions(prompts, answers.texts, answers.lengths_R)
        total = rewards.total.astype(np.float64)
        judged = {name: judge(prompts, answers.texts) for name, judge in self._judges.items()}
        for name, weight in self._judge_weights.items():
            total += weight * judged[name].astype(np.float64)
        for name, weight in self._weights.items():
            if not np.isfinite(scores[name]).all():
                place = prompts[int(np.argmin(np.isfinite(scores[name])))].place
                raise ConfigError([f"{self._key}: the reward model {name} gives {place} no finite score; retrain it"])
            total += weight * scores[name].astype(np.float64)
        return Rewards(total.astype(np.float32), {**rewards.parts, **judged, **scores})

    def at_once(self, prompts: Sequence[Prompt], answers: Answers) -> Rewards:
        """The rewards of answers; all processes call this together."""
        return self(prompts, answers, self.scores(prompts, answers))

    def _rows(self, prompts: Sequence[Prompt], answers: Answers) -> Stream:
        """Each prompt with its answer, as the reward model was trained on: one in a row."""
        sequences = []
        stops = self._context.tokenizer.stop_ids
        for row, prompt in enumerate(prompts):
            ids = answers.tokens_RN[row, : answers.lengths_R[row]].tolist()
            tail = self._tail if ids[-1] in stops and not isinstance(prompt.text, str) else []
            sequences.append(ChatTokens(prompt.ids + ids + tail, [0.0] * (len(prompt.ids) + len(ids) + len(tail))))
        longest = answers.prompts_RP.shape[1] + answers.tokens_RN.shape[1] + len(self._tail)
        return pad(sequences, round_up(longest, self._context.row_parts))


def open_judges(setting: RewardSetting, context: RunContext, *, key: str) -> dict[str, JudgeOfAnswers]:
    """The judges of a reward by name, with what they said in earlier attempts of the run.

    Raises:
      ConfigError: one does not fit, or several processes would ask about the same answers, with different replies.
    """
    config, parts, found = context.config, context.rows.count, judges_of(setting)
    if found and jax.process_count() != parts:
        raise ConfigError(
            [
                f"{key}: a judge needs answers of its own on each process, and {jax.process_count()} processes share"
                f" {parts} parts of a batch; make mesh.data * mesh.stage * mesh.fsdp * mesh.expert a multiple of their"
                " number"
            ]
        )
    folder = None if context.folder is None else context.folder / "judges" / key.split(".")[-1]
    return {
        name: JudgeOfAnswers(
            part,
            name=f"{key}: {name}",
            folder=None if folder is None else folder / name / str(jax.process_index()),
            seed=config.seed,
            share=1 / parts,
            time_limit=config.objective.reward_time_limit,
        )
        for name, part in found.items()
    }


def load_reward_model_beside(path: str, context: RunContext, *, key: str) -> Decoder:
    """A reward model, sharded over the mesh of a run.

    Raises:
      CheckpointError: it does not exist, is another model, or has another tokenizer.
      ConfigError: it does not fit the mesh or the rows.
    """
    remedy = "train a reward model with the same one"
    _, execution = check_beside(path, context.config, context.tokenizer, context.mesh, key=key, remedy=remedy)
    model, _ = load_reward_model(path, context.mesh)
    if model.config.labels == ("process_reward",):
        raise CheckpointError(f"{key}: {path} scores steps of solutions, not whole answers; give a reward model")
    return with_execution(model, execution)


def critic_start(path: str, decoder: Decoder) -> Decoder:
    """The reward model that a critic of a policy begins with.

    Raises:
      CheckpointError: it is no reward model of the policy's shape.
    """
    model, _ = load_reward_model(path, jax.sharding.get_mesh())
    if model.config.model_copy(update={"labels": None}) != decoder.config.model_copy(update={"critic": None}):
        raise CheckpointError(
            f"objective.critic.start: {path} has another shape than the policy; give a reward model that was trained"
            " from the same model, or set it to null"
        )
    return model


def _scores(model: Decoder, rows: Stream) -> jax.Array:
    places = {"positions_BL": rows.positions, "segment_ids_BL": rows.segment_ids}
    return shard(sequence_scores(model, model.apply(rows), **places)[:, 0], "batch")


def _tail(tokenizer: Tokenizer) -> list[int]:
    """What a chat template writes after the end token of an answer: there, reward models are read."""
    question, answer = {"role": "user", "content": "a"}, {"role": tokenizer.answering_role, "content": "b"}
    try:
        chat = tokenizer.encode_chat([question, answer])
    except TokenizerError:
        return []
    return chat.ids[int(np.flatnonzero(chat.loss_weights)[-1]) + 1 :]
