"""A decoder with experts: loss and gradient do not depend on mesh, packing or accumulation; generation agrees."""

from functools import cache, partial

import jax
import numpy as np
import pytest
import same_gradient
from tiny_decoder import EXECUTION, VOCAB_SIZE, documents, pack, text_loss, tiny_config

from maxlm.config import ModelConfig
from maxlm.config.adapters import LoraConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import put_batch
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten, unflatten
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.models.quantized import quantize_model
from maxlm.ops.qtensor import QTensor
from maxlm.train.step import loss_and_gradient
from maxlm.train.trained_model import num_active_parameters

MOE = {
    "num_experts": 8,
    "experts_per_token": 2,
    "dim": 16,
    "num_shared_experts": 1,
    "scoring": "sigmoid",
    "routed_scaling": 1.5,
    "router_bias": True,
}
TERMS = {"cross_entropy", "moe_balance", "router_bias", "router_z_loss"}


def config(**changes) -> ModelConfig:
    return tiny_config(num_kv_heads=4, moe={**MOE, **changes})


@cache
def weights_of(model_config):
    """Weights, drawn once for all meshes."""
    model = jax.tree.map(
        lambda leaf: 1.5 * np.asarray(leaf), initialize(Decoder(model_config, EXECUTION), jax.random.key(0))
    )
    [[layers]] = model.layers
    bias = layers.mlp.router_bias
    layers.mlp.router_bias = bias + np.linspace(-0.2, 0.2, bias.shape[1], dtype=np.float32)
    return model


def model_of(model_config, mesh=None):
    """Weights large enough to distinguish experts, and a bias that changes some choices."""
    layout = None if mesh is None else shardings(Decoder(model_config, EXECUTION), mesh)
    return jax.device_put(weights_of(model_config), layout)


PACKED = pack(documents(), rows=8, length=32, per_row=3)


@partial(jax.jit, static_argnames="accumulate")
def compute(model, batch, accumulate):
    def loss_function(model, frozen, batch):
        return text_loss(model, batch)

    return loss_and_gradient(model, None, batch, loss_function=loss_function, accumulate=accumulate)


def terms_and_gradient(batch=PACKED, *, mesh=None, accumulate=1):
    if mesh is None:
        result = compute(model_of(config()), batch, accumulate)
    else:
        with jax.set_mesh(mesh):
            result = compute(model_of(config(), mesh), put_batch(batch, mesh), accumulate)
    output, gradient = result
    return same_gradient.on_host(output.terms, gradient)


def assert_same(left, right):
    assert right[0].keys() == TERMS
    same_gradient.assert_same(left, right)


@pytest.fixture(scope="module")
def whole():
    return terms_and_gradient()


def test_microbatches_packing_and_padding_change_nothing(whole):
    assert_same(terms_and_gradient(pack(documents(), rows=16, length=24, per_row=2), accumulate=4), whole)


@pytest.mark.exhaustive
def test_mesh_changes_nothing(whole):
    mesh = make_mesh(MeshConfig(fsdp=1, expert=2, context=2, tensor=2))
    assert_same(terms_and_gradient(mesh=mesh, accumulate=2), whole)


def test_bias_gradient_is_load_error_and_adds_no_loss(whole):
    terms, gradient = whole
    assert terms["router_bias"][0] == 0
    pull = gradient["layers/0/0/mlp/router_bias"]
    np.testing.assert_allclose(pull.sum(axis=1), 0, atol=1e-6)
    # An expert with such a large bias gets all tokens, so its bias has the largest possible gradient.
    model = model_of(config())
    [[layers]] = model.layers
    layers.mlp.router_bias = layers.mlp.router_bias.at[:, 3].add(10.0)
    pulled = compute(model, PACKED, 1)[1].layers[0][0].mlp.router_bias
    # Half of all choices, minus an equal share; each of the two layers is half of the term.
    np.testing.assert_allclose(pulled[:, 3], (1 / 2 - 1 / 8) / 2, rtol=1e-5)


def test_decoding_with_cache_matches_full_forward():
    model_config = config()
    model = model_of(model_config)
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, (3, 12)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda m, t: m.logits(m(t).hidden_BLD))(model, tokens))
    extend = jax.jit(lambda m, t, caches, at: m(t, positions_BL=at, caches=caches))
    caches, prompts, places = model.create_caches(3, 16, "float32"), np.array([6, 3, 8]), np.arange(8)[None]
    positions = np.where(places < prompts[:, None], places, -1).astype(np.int32)
    output = extend(model, tokens[:, :8], caches, positions)
    got = np.asarray(model.logits(output.hidden_BLD))
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row, :prompt], expected[row, :prompt], rtol=1e-4, atol=1e-4)
    next_tokens, at = tokens[np.arange(3), prompts][:, None], prompts[:, None].astype(np.int32)
    got = model.logits(extend(model, next_tokens, output.caches, at).hidden_BLD)[:, 0]
    np.testing.assert_allclose(got, expected[np.arange(3), prompts], rtol=1e-4, atol=1e-4)


def test_adapters_apply_to_attention_and_shared_experts_but_not_routed_ones():
    adapted = declare_adapters(Decoder(config()), LoraConfig())
    assert set(adapted) == {
        f"layers/0/0/{name}"
        for name in (
            *(f"mixer/{part}" for part in ("query", "key", "value", "out")),
            *(f"mlp/shared/{part}" for part in ("gate", "up", "down")),
        )
    }


@pytest.mark.parametrize("changes", [{}, {"bias": True, "swiglu_limit": 2.0, "shared_gate": True, "shared_dim": 20}])
def test_int8_experts_are_close_and_router_is_unchanged(changes):
    # All experts, since in such a small model rounding routes some tokens to other ones.
    model = model_of(config(experts_per_token=8, **changes))
    biases = {path: leaf + 0.3 for path, leaf in flatten(model).items() if path.endswith(("gate_bias", "down_bias"))}
    model = unflatten(flatten(model) | biases, model)
    quantized = jax.jit(quantize_model)(model)
    assert isinstance(quantized.layers[0][0].mlp.gate, QTensor)
    np.testing.assert_array_equal(quantized.layers[0][0].mlp.router, model.layers[0][0].mlp.router)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    decode = jax.jit(lambda model: model.logits(model(tokens, caches=model.create_caches(2, 8, "float32")).hidden_BLD))
    exact, rough = np.asarray(decode(model)), np.asarray(decode(quantized))
    assert np.sqrt(np.mean((rough - exact) ** 2)) < 0.05 * exact.std()


def test_active_parameters_are_counted():
    """2 of 8 routed experts are active; everything else is."""
    plan = Decoder(config())
    routed = 2 * 3 * 8 * 16 * 16  # layers, matrices, experts, embed, mlp
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract(plan)))
    assert num_active_parameters([plan]) == total - routed * 3 / 4
    adapters = declare_adapters(plan, LoraConfig(rank=3))
    added = sum(leaf.size for leaf in jax.tree.leaves(abstract(adapters)))
    assert num_active_parameters([plan, plan], adapters) == 2 * (total - routed * 3 / 4) + added


def test_active_parameters_of_a_mixed_model_are_counted_layer_by_layer():
    """Of 4 experts 1 is active, of 8 experts 2, and all of a dense layer."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    few = {"kind": "moe", "num_experts": 4, "experts_per_token": 1, "dim": 10}
    many = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "dim": 6}
    pattern = [{"times": 2, "mixer": sizes, "mlp": few}, {"mixer": sizes, "mlp": {"dim": 24}}]
    layers = [{"repeat": 3, "pattern": pattern}, {"repeat": 2, "mixer": sizes, "mlp": many}]
    plan = Decoder(ModelConfig(vocab_size=VOCAB_SIZE, embed_dim=16, layers=layers))
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract(plan)))
    idle = 6 * 3 * 3 * 16 * 10 + 2 * 6 * 3 * 16 * 6  # layers, idle experts, matrices, embed, hidden channels
    assert num_active_parameters([plan]) == total - idle


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token (9) exceeds num_experts (8)"),
    ],
)
def test_invalid_configuration_is_rejected(changes, message):
    with pytest.raises(ValueError, match="mlp") as caught:
        config(**changes)
    assert message in str(caught.value)
