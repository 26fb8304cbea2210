"""The table of biases by distance that layers share: what it is for optimizers, adapters, int8 and exports.

What it computes is in test_decoder.py, and its gradient under pipeline stages in test_pipeline_stages.py.
"""

import jax
import numpy as np
import pytest
from tiny_decoder import EXECUTION, VOCAB_SIZE

from maxlm.config import ModelConfig
from maxlm.config.adapters import LoraConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.interop.huggingface import find_family
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.models.quantized import quantize_model
from maxlm.optim.build import make_optimizer

RELATIVE = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "rope": None, "relative_bias": {}}
LAYERS = [
    {"repeat": 1, "mixer": RELATIVE | {"window": 5}, "mlp": {"dim": 24}},
    {"repeat": 2, "pattern": [{"mixer": RELATIVE}, {"mixer": {"kind": "gru", "dim": 12}}]},
]
PLAN = Decoder(ModelConfig(vocab_size=VOCAB_SIZE, embed_dim=16, layers=LAYERS), EXECUTION)


def test_layers_share_one_table_with_heads_sharded_as_theirs():
    [(path, table)] = [each for each in flatten(PLAN).items() if each[1].role == "bias_table"]
    assert (path, table.shape, table.axes) == ("relative_bias", (32, 4), (None, "heads"))
    assert (table.num_stacked, table.is_matrix) == (0, False)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adam8bit", "muon"])
def test_optimizers_move_it_and_do_not_decay_it(kind):
    plan = {"relative_bias": PLAN.relative_bias, "embedding": PLAN.embedding}
    params = initialize(plan, jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(kind=kind, weight_decay=0.5), plan)

    @jax.jit
    def updates_of(grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    still = updates_of(jax.tree.map(np.zeros_like, params))
    assert not np.any(still["relative_bias"])
    assert np.any(still["embedding"])
    assert np.all(updates_of(jax.tree.map(np.ones_like, params))["relative_bias"] < 0)


def test_adapters_and_int8_leave_it_unchanged():
    assert "relative_bias" not in declare_adapters(PLAN, LoraConfig(rank=2))
    model = initialize(PLAN, jax.random.key(0))
    np.testing.assert_array_equal(quantize_model(model).relative_bias, model.relative_bias)


def test_export_to_hugging_face_is_refused_by_name():
    with pytest.raises(CheckpointError, match="relative_bias: none of the families that maxlm writes"):
        find_family(PLAN)
