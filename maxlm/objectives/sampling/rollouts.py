"""Rounds of sampling: answers to the prompts of some steps, and what passes over them give.

Dimensions: R answers of this process, B rows (answers), L length of prompt and answer.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from maxlm.core.batch import Batch, Stream
from maxlm.errors import CheckpointError
from maxlm.models.critic import apply_critic
from maxlm.objectives.sampling.sampler import Answers
from maxlm.objectives.sequences import target_log_probabilities, token_entropies, whole_rows

# Fields of a round that hold arrays by name.
_BY_NAME = ("measured", "scores", "greedy_scores", "cost_scores")


@dataclass(frozen=True)
class Rollout:
    """A round of sampling on this process, before its answers are rewarded.

    prompts_R: the index of each answer's prompt in its file; answers to the same prompt are in a row.
    measured: values by name: [B, L] of `measure`, and [B] `sync_difference_B` of `WeightSync`.
    greedy: the greedy answer to each prompt, if asked for.
    scores, greedy_scores, cost_scores: of the answers under each reward model, or cost model: [R] by name.
    """

    prompts_R: np.ndarray
    answers: Answers
    measured: Mapping[str, np.ndarray]
    greedy: Answers | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    greedy_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    cost_scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    def write(self, file: epath.Path) -> None:
        """Write it to a file, whole or not at all."""
        content = io.BytesIO()
        parts = {"answers": self.answers} | ({} if self.greedy is None else {"greedy": self.greedy})
        arrays = {f"{name}/{key}": x for name, part in parts.items() for key, x in _arrays(part).items()}
        for part in _BY_NAME:
            arrays |= {f"{part}/{name}": x for name, x in getattr(self, part).items()}
        np.savez_compressed(content, allow_pickle=False, prompts_R=self.prompts_R, **arrays)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_bytes(content.getvalue())
        partial.replace(file)

    @classmethod
    def read(cls, file: epath.Path) -> Self:
        """Read a file of `write`.

        Raises:
          CheckpointError: it is missing.
        """
        if not file.exists():
            raise CheckpointError(
                f"{file}: is missing; its answers were sampled with earlier weights (objective.staleness), so the run"
                " cannot go on exactly; put it back, or start a new run"
            )
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            found = dict(arrays)

        def part(name: str) -> dict[str, np.ndarray]:
            return {path.split("/", 1)[1]: x for path, x in found.items() if path.startswith(f"{name}/")}

        greedy = part("greedy")
        by_name = {name: part(name) for name in _BY_NAME}
        return cls(
            found["prompts_R"], _answers(part("answers")), greedy=_answers(greedy) if greedy else None, **by_name
        )


def _arrays(answers: Answers) -> dict[str, np.ndarray]:
    arrays = {field.name: getattr(answers, field.name) for field in fields(answers)}
    return arrays | {"texts": np.array(json.dumps(answers.texts))}


def _answers(arrays: dict[str, np.ndarray]) -> Answers:
    return Answers(**{**arrays, "texts": json.loads(str(arrays["texts"]))})


class RolloutFiles:
    """Files of recent rounds in the run folder, one for each process; older ones are removed.

    Args:
      keep: how many rounds.
    """

    def __init__(self, folder: epath.Path, *, keep: int):
        self._folder, self._keep = folder / "rollouts", keep

    def write(self, number: int, rollout: Rollout) -> None:
        rollout.write(self._file(number))
        self._file(number - self._keep).unlink(missing_ok=True)

    def read(self, number: int) -> Rollout:
        return Rollout.read(self._file(number))

    def _file(self, number: int) -> epath.Path:
        return self._folder / f"{number}.{jax.process_index()}.npz"


def measure(model: Any, reference: Any, answers: Stream, *, objective: Any) -> dict[str, jax.Array]:
    """Values [B, L] of the tokens of answers under the current policy, the starting model, and the critic.

    `entropies_BL` are those of the current policy, for `PolicyData` alone; the others are values of a batch.
    """

    def log_p(model: Any) -> jax.Array:
        return whole_rows(target_log_probabilities(model, answers, temperature=objective.temperature))

    measured = {}
    if objective.importance is not None:
        measured["old_BL"] = log_p(model)
    if objective.top_entropy_fraction is not None:
        hidden_BLD = model.apply(answers).hidden_BLD
        measured["entropies_BL"] = whole_rows(token_entropies(model, hidden_BLD, temperature=objective.temperature))
    if reference is not None:
        measured["reference_BL"] = log_p(reference)
    if objective.critic is not None:
        measured["values_BL"] = whole_rows(apply_critic(model, answers))
    return measured


def policy_rows(answers: Answers) -> tuple[Stream, np.ndarray]:
    """Each prompt directly followed by its answer, and the sampled log-probability of each target: [B, L].

    Observations within an answer are attended to, and are not learned: their loss weight is 0.
    """
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
    loss_weights[rows, places - 1] = answers.is_sampled_RN[rows, columns]
    sampled_BL = np.zeros(tokens.shape, np.float32)
    sampled_BL[rows, places - 1] = answers.log_probabilities_RN[rows, columns]
    positions = np.arange(tokens.shape[1], dtype=np.int32) * segment_ids
    return Stream(tokens, targets, loss_weights, segment_ids, positions), sampled_BL


def sampled_values(batch: Batch) -> dict[str, Any]:
    """The log-probabilities [B, L] that the sampler recorded, by the stream of their tokens."""
    names = {"answers": "sampled_BL", "chosen": "sampled_chosen_BL", "rejected": "sampled_rejected_BL"}
    return {stream: batch.values[name] for stream, name in names.items() if name in batch.values}
