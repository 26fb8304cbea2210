"""Other layouts of the same weights: regrouped and unrolled layers, matrices cast to the dtype of their products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, VOCAB_SIZE, tiny_config

from maxlm.config.layers import LayerGroup
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder, with_matrices_cast
from maxlm.models.quantized import quantize_model
from maxlm.models.regroup import regroup, unrolled

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": VOCAB_SIZE,
        "embed_dim": 16,
        "layers": [
            {"repeat": 1, "mixer": HEADS, "mlp": {"kind": "moe", "dim": 12}},
            {
                "repeat": 2,
                "pattern": [
                    {"times": 2, "mixer": {"kind": "gru", "dim": 8}, "mlp": {"dim": 24}},
                    {"mixer": HEADS, "mlp": {"kind": "plain", "dim": 20}},
                ],
            },
        ],
    }
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 9)).astype(np.int32)


def model_of(config=CONFIG, execution=EXECUTION):
    return initialize(Decoder(config, execution), jax.random.key(0))


@jax.jit
def logits(model):
    return model.logits(model(TOKENS).hidden_BLD)


@pytest.mark.exhaustive
@pytest.mark.parametrize("quantized", [False, True])
def test_unrolled_model_is_the_same_function(quantized):
    model = quantize_model(model_of()) if quantized else model_of()
    other = jax.jit(unrolled)(model)
    assert [group.repeat for group in other.config.layers] == [1]
    assert list(other.config.each_layer()) == list(CONFIG.each_layer())
    np.testing.assert_allclose(logits(other), logits(model), rtol=1e-5, atol=1e-5)


def test_regrouping_back_gives_the_same_weights():
    model = model_of()
    back = regroup(unrolled(model), CONFIG.layers)
    assert back.config == model.config
    for path, leaf in flatten(model).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf, err_msg=path)


def test_heads_of_other_models_are_kept():
    model = model_of(tiny_config().model_copy(update={"labels": ("good", "bad")}))
    assert unrolled(model).config.labels == ("good", "bad")
    np.testing.assert_array_equal(unrolled(model).score, model.score)


def test_groups_of_other_layers_are_refused():
    other = tiny_config(num_layers=2).layers[0]
    with pytest.raises(ValueError, match="other layers"):
        regroup(model_of(), (LayerGroup(repeat=2, pattern=other.pattern),))


def test_cast_matrices_give_the_same_results_in_half_the_bytes():
    model = model_of(execution=EXECUTION.model_copy(update={"matmul_dtype": "bfloat16"}))
    cast = with_matrices_cast(model)
    np.testing.assert_array_equal(logits(cast), logits(model))
    changed = {path for path, leaf in flatten(cast).items() if leaf.dtype == jnp.bfloat16}
    assert changed == {path for path, each in flatten(Decoder(CONFIG, EXECUTION)).items() if each.role == "matrix"}


def test_float32_products_and_quantized_matrices_are_not_cast():
    for model in (model_of(), quantize_model(model_of())):
        before = {path: leaf.dtype for path, leaf in flatten(model).items()}
        assert {path: leaf.dtype for path, leaf in flatten(with_matrices_cast(model)).items()} == before
