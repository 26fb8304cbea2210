"""Check that sampling uses the same policy as training.

After an update of the weights, the log-probabilities that sampling records must match those of the training pass
for the same tokens. This exposes stale weights in sampling (especially adapters, which are small and easily left out)
and a different temperature.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maxlm.config.execution import ExecutionConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import put_batch
from maxlm.core.compat import quick_compiler_options
from maxlm.core.sharding import make_mesh
from maxlm.errors import CheckFailed
from maxlm.objectives.sampling.rollouts import sampled_values
from maxlm.objectives.sampling.weight_sync import WeightSyncError
from maxlm.objectives.sequences import local_rows, target_log_probabilities, whole_rows
from maxlm.verify.subject import Subject, place
from maxlm.verify.workspace import Workspace


def compare_rollout(
    subject: Subject, workspace: Workspace, *, execution: ExecutionConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """The largest difference of a sampled token's log-probability, as the values of a finding.

    Raises:
      CheckFailed: the update changes too little to expose stale weights.
    """
    mesh = make_mesh(MeshConfig(fsdp=1)) if mesh is None else mesh
    trainable_plan, frozen_plan = subject.plans(execution)
    trainable, frozen = subject.weights
    random = np.random.default_rng(1)
    updated = {path: leaf + 0.1 * random.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in trainable.items()}
    temperature = subject.config.objective.temperature
    data = subject.open_data(workspace, mesh)
    with jax.set_mesh(mesh):
        frozen = place(frozen, frozen_plan, mesh)
        before, after = (place(weights, trainable_plan, mesh) for weights in (trainable, updated))
        current = {"trainable": before}
        batches = data.batches(0, lambda: subject.assemble(current["trainable"], frozen))
        try:
            next(batches)
            current["trainable"] = after
            batch = next(batches)
        except WeightSyncError:
            return {"loss_difference": math.inf, "term": "weights and policy of the sampler"}

        def compute(trainable, frozen, rows):
            model = subject.assemble(trainable, frozen)
            return whole_rows(target_log_probabilities(model, rows, temperature=temperature))

        scores = jax.jit(compute, compiler_options=quick_compiler_options())
        recorded = sampled_values(batch)
        streams = [put_batch(batch[name], mesh) for name in recorded]
        old, new = (
            np.concatenate([local_rows(scores(weights, frozen, rows)) for rows in streams])
            for weights in (before, after)
        )
    sampled = np.concatenate(list(recorded.values()))
    difference = float(np.abs(sampled - new).max())
    if np.abs(new - old).max() < 0.01:
        raise CheckFailed("the update of the weights changes no sampled token's log-probability: nothing is compared")
    return {"loss_difference": difference / float(np.abs(new).max()), "term": "log-probability of sampled tokens"}
