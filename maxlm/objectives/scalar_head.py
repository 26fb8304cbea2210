"""What objectives share that train a head with one score in place of the output table.

Dimensions: B pairs.
"""

from typing import ClassVar

import jax

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.batch import Batch
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.scores import sequence_scores, with_labels
from maxlm.train.objective import Objective


class ScalarHead(Objective):
    """Base class of objectives whose model scores texts; `label` is what the score is."""

    label: ClassVar[str]

    def declare(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        return Decoder(config.model_copy(update={"labels": (self.label,)}), execution)

    def from_decoder(self, decoder: Decoder, key: jax.Array) -> Decoder:
        return with_labels(decoder, (self.label,), key)


def pair_scores(model: AppliedModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The scores [B] of the streams `chosen` and `rejected`."""

    def scores(name: str) -> jax.Array:
        places = {"positions_BL": batch[name].positions, "segment_ids_BL": batch[name].segment_ids}
        return sequence_scores(model.decoder, model.outputs[name], **places)[:, 0]

    return scores("chosen"), scores("rejected")
