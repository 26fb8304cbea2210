"""Proof that answers were sampled with the weights that are trained.

Two comparisons after each round of sampling. The fingerprint of the weights, which the sampling program computes of
what it decodes with, must be that of the trained weights: any other bit is found. And the log-probabilities of
canaries, the first answer of each device's rows, must be those of the training pass: this finds another temperature,
mask, position or cache with the same weights.

Dimensions: B rows, L length of prompt and answer.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maxlm.config.execution import ExecutionConfig
from maxlm.core.batch import Stream, put_batch
from maxlm.core.fingerprint import fingerprint
from maxlm.core.sharding import row_groups
from maxlm.errors import CheckFailed
from maxlm.objectives.sampling.rollouts import policy_rows
from maxlm.objectives.sampling.sampler import Answers
from maxlm.objectives.sequences import local_rows, target_log_probabilities, whole_rows
from maxlm.ops.linear import operand_dtype
from maxlm.runtime.agree import any_process

# How far the mean log-probability of a token may differ, in nats: with 32-bit numbers, the order of sums is all that
# differs. With others, rounding: 0.014 on average was measured with 16-bit activations (docs/decisions/rollouts.md).
_EXACT, _ROUNDED = 1e-3, 0.2


class WeightSyncError(CheckFailed):
    """Answers were not sampled from the policy that is trained."""


class WeightSync:
    """Compares what sampled answers with what is trained."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._fingerprint = jax.jit(fingerprint)
        self._log_p = jax.jit(_log_probabilities, static_argnames="temperature")

    def check(self, model: Any, answers: Answers, *, temperature: float) -> float:
        """Check answers of `Sampler`; all processes must call it.

        Args:
          model: the trained one, that was to be sampled from.
          temperature: of these answers.

        Returns:
          Mean absolute difference between the log-probabilities of the canaries' tokens, in nats.

        Raises:
          WeightSyncError: the weights or the log-probabilities differ.
        """
        trained = int(self._fingerprint(model))
        others = [f"{other:08x}" for other in np.unique(answers.fingerprints_R) if other != trained]
        if any_process(bool(others)):
            raise WeightSyncError(
                "sampling used other weights than those that are trained: their fingerprint is"
                f" {', '.join(others) or 'another one on another process'} instead of {trained:08x}; nothing is learned"
                " from these answers"
            )
        groups = len(row_groups(self._mesh))
        canaries = np.arange(groups) * (len(answers.lengths_R) // groups)
        stream, sampled_BL = policy_rows(answers.taken(canaries))
        log_p_BL = local_rows(self._log_p(model, put_batch(stream, self._mesh), temperature=temperature or 1.0))
        difference = float(np.abs(log_p_BL - sampled_BL).sum() / max(stream.loss_weights.sum(), 1))
        limit = tolerance(model.execution)
        if any_process(not difference <= limit):
            raise WeightSyncError(
                f"log-probabilities of sampled tokens differ by {difference:.3g} on average between sampling and"
                f" training, and at most {limit:g} is rounding: with the same weights, the two compute different"
                " policies; nothing is learned from these answers"
            )
        return difference


def tolerance(execution: ExecutionConfig) -> float:
    """The largest mean difference that comes from rounding, in nats."""
    operands = (execution.matmul_dtype, execution.layer_matmul_dtype)
    dtypes = {execution.activation_dtype, *map(operand_dtype, operands)}
    return _EXACT if dtypes == {"float32"} else _ROUNDED


def _log_probabilities(model: Any, rows: Stream, *, temperature: float) -> jax.Array:
    return whole_rows(target_log_probabilities(model, rows, temperature=temperature))
