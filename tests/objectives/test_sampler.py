"""Answers do not depend on where the weights are, no device holds a sharded model, and other weights are found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.execution import ExecutionConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.core.fingerprint import fingerprint
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import make_mesh, named_sharding
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.objectives.sampling.weight_sync import WeightSync, WeightSyncError, tolerance

EXECUTION = ExecutionConfig(activation_dtype="float32", matmul_dtype="float32")
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODELS = {
    "attention": {"repeat": 2, "mixer": ATTENTION, "mlp": {"dim": 64}},
    "window and recurrence": {
        "repeat": 1,
        "pattern": [
            {"mixer": {**ATTENTION, "window": 6}, "mlp": {"dim": 64}},
            {"mixer": {"kind": "gru", "dim": 32}, "mlp": {"dim": 64}},
        ],
    },
    "latent attention and experts": {
        "repeat": 2,
        "mixer": {
            "kind": "mla",
            "num_heads": 4,
            "content_dim": 8,
            "rope_dim": 4,
            "value_dim": 8,
            "latent_dim": 16,
        },
        "mlp": {"kind": "moe", "dim": 16, "num_experts": 4, "experts_per_token": 2},
    },
}
GROUP = 20
MESHES = {
    "attention": [{"fsdp": 4, "tensor": 2}],
    "window and recurrence": [{"data": 2, "fsdp": 2, "tensor": 2}],
    "latent attention and experts": [{"fsdp": 2, "expert": 2, "tensor": 2}],
}


class Numbers:
    """A tokenizer without text."""

    stop_ids = (2, 3, 4)

    def decode(self, ids):
        return " ".join(map(str, ids))


def decoder(layers, **settings):
    return Decoder(ModelConfig(embed_dim=32, vocab_size=64, layers=layers, **settings), EXECUTION)


def weights_of(plan, seed=0):
    return jax.device_get(initialize(plan, jax.random.key(seed)))


def placed(weights, plan, sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1} | sizes))
    return mesh, jax.device_put(weights, shardings(plan, mesh))


def prompts():
    random = np.random.default_rng(0)
    drawn = [Prompt(random.integers(5, 64, size=n).tolist(), {}) for n in (3, 1, 9, 5, 12, 2, 7, 4)]
    return [prompt for prompt in drawn for _ in range(GROUP)]


def sample(model, mesh, layout, **settings):
    sampler = Sampler(Numbers(), mesh, prompt_length=12, max_new_tokens=16, seed=0, layout=layout)
    given = prompts()
    with jax.set_mesh(mesh):
        return sampler(
            model,
            given,
            np.arange(len(given)),
            **{"stream": 3, "temperature": 1.3, "group_size": GROUP} | settings,
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", list(MODELS))
def test_sharded_weights_give_the_answers_of_one_device(kind):
    plan = decoder(MODELS[kind])
    weights = weights_of(plan)
    mesh, model = placed(weights, plan, {})
    # Alone on one device, without groups: rows of other lengths do not affect an answer.
    one = sample(model, mesh, "replicated", group_size=1)
    assert len(set(one.lengths_R.tolist())) > 5, "answers of many lengths"
    for sizes in MESHES[kind]:
        mesh, model = placed(weights, plan, sizes)
        many = sample(model, mesh, "sharded")
        np.testing.assert_array_equal(one.tokens_RN, many.tokens_RN)
        np.testing.assert_array_equal(one.lengths_R, many.lengths_R)
        np.testing.assert_allclose(one.log_probabilities_RN, many.log_probabilities_RN, atol=1e-5)
        np.testing.assert_array_equal(one.fingerprints_R, many.fingerprints_R)
        with jax.set_mesh(mesh):
            assert WeightSync(mesh).check(model, many, temperature=1.3) < 1e-5


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_no_device_holds_the_whole_model(sizes):
    """What a device needs at any time, weights and caches and all, is a part of the model's size."""
    layers = {"repeat": 16, "mixer": {**ATTENTION, "num_kv_heads": 4, "head_dim": 32}, "mlp": {"dim": 512}}
    plan = Decoder(ModelConfig(embed_dim=128, vocab_size=64, layers=layers), EXECUTION)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract(plan)))
    mesh = make_mesh(MeshConfig(**sizes))
    model = abstract(plan, mesh)

    def rows(*shape, dtype=jnp.int32):
        sharding = named_sharding(mesh, ("batch", *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def bytes_of_a_device(layout):
        sampler = Sampler(Numbers(), mesh, prompt_length=4, max_new_tokens=4, seed=0, layout=layout)
        arguments = rows(8, 4), rows(8), rows(8, 3, dtype=jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)
        with jax.set_mesh(mesh):
            memory = sampler.program(model).lower(model, *arguments).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    assert bytes_of_a_device("sharded") < whole / 2


def test_large_models_stay_sharded_and_small_ones_are_gathered(monkeypatch):
    plan = decoder(MODELS["attention"])
    mesh = make_mesh(MeshConfig(fsdp=8))
    model = abstract(plan, mesh)
    sampler = Sampler(Numbers(), mesh, prompt_length=4, max_new_tokens=4, seed=0)
    small = sampler.program(model)
    monkeypatch.setattr("maxlm.objectives.sampling.sampler.REPLICATED_BYTES", 1000)
    assert sampler.program(model) is not small


def test_layouts_that_decoding_cannot_divide_are_refused_by_name():
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=2))
    with pytest.raises(ConfigError, match=r"objective\.sampler=sharded: .* mesh\.context = 2 cannot divide"):
        Sampler(Numbers(), mesh, prompt_length=4, max_new_tokens=4, seed=0, layout="sharded")


def test_fingerprint_depends_on_every_bit_and_place_and_not_on_the_mesh():
    plan = decoder(MODELS["attention"])
    weights = weights_of(plan)
    found = []
    for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "context": 2, "expert": 2}):
        mesh, model = placed(weights, plan, sizes)
        with jax.set_mesh(mesh):
            found.append(int(jax.jit(fingerprint)(model)))
    assert len(set(found)) == 1
    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    others = [x.copy() for _ in range(4)]
    others[0][1, 2, 3] = np.nextafter(x[1, 2, 3], 10)
    others[1][0, 0, [0, 1]] = x[0, 0, [1, 0]]
    others[2][[0, 1]] = x[[1, 0]]
    others[3][4, 3, 5] *= -1
    prints = [int(fingerprint({"x": each})) for each in (x, *others)] + [int(fingerprint({"y": x}))]
    assert len(set(prints)) == len(prints)
    assert int(fingerprint({"x": x.astype(jnp.bfloat16)})) not in prints


@pytest.fixture(scope="module")
def checked():
    """A mesh, two versions of a model on it, and answers of the first."""
    plan = decoder(MODELS["attention"])
    mesh, model = placed(weights_of(plan), plan, {"fsdp": 2})
    _, newer = placed(weights_of(plan, seed=1), plan, {"fsdp": 2})
    return mesh, model, newer, sample(model, mesh, "replicated")


def test_answers_of_stale_weights_are_refused(checked):
    mesh, model, newer, answers = checked
    with jax.set_mesh(mesh):
        assert WeightSync(mesh).check(model, answers, temperature=1.3) < 1e-5
        with pytest.raises(WeightSyncError, match=r"other weights than those that are trained: .* instead of"):
            WeightSync(mesh).check(newer, answers, temperature=1.3)


def test_one_device_with_other_weights_is_found(checked):
    mesh, model, _, answers = checked
    fingerprints_R = answers.fingerprints_R.copy()
    fingerprints_R[-1] ^= 1
    with jax.set_mesh(mesh), pytest.raises(WeightSyncError, match="other weights"):
        WeightSync(mesh).check(model, dataclasses.replace(answers, fingerprints_R=fingerprints_R), temperature=1.3)


def test_another_policy_with_the_same_weights_is_refused(checked):
    mesh, model, _, answers = checked
    with jax.set_mesh(mesh), pytest.raises(WeightSyncError, match=r"log-probabilities .* differ by .* at most 0\.001"):
        WeightSync(mesh).check(model, answers, temperature=1.0)


def test_tolerance_depends_on_the_dtype():
    assert tolerance(EXECUTION) < tolerance(ExecutionConfig(activation_dtype="bfloat16", matmul_dtype="float32"))
    assert tolerance(EXECUTION) < tolerance(ExecutionConfig(activation_dtype="float32", matmul_dtype="bfloat16"))
