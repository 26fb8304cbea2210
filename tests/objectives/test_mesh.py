"""Post-training on several devices: every loss can be sharded over a mesh, and batches do not depend on the mesh."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from toy_task import EXECUTION, chat, make_config, question, toy_model, write_lines

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import logical_to_spec, make_mesh
from maxlm.core.tree import flatten
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.train.loss import TrainingLoss
from maxlm.train.objective import RunContext
from maxlm.train.step import loss_and_gradient
from maxlm.train.trained_model import assemble

RECORDS = {
    "sft": [chat("sky", "blue"), chat("grass", "green"), chat("coin", "yes")],
    "preference": [{"prompt": question(f"coin {n}"), "chosen": "yes", "rejected": "no"} for n in range(4)],
    "unpaired_preference": [{"prompt": question(f"coin {n}"), "completion": "yes", "label": n < 2} for n in range(4)],
    "reward": [{"prompt": question(f"coin {n}"), "chosen": "yes", "rejected": "no"} for n in range(4)],
    "policy": [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(4)],
}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def model_config(tokenizer):
    # Two key-value heads, so that they can be sharded over two devices.
    return toy_model(num_kv_heads=2, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def weights(model_config):
    """Weights, drawn once for all meshes."""
    return jax.device_get(
        initialize(Decoder(ModelConfig(**model_config), ExecutionConfig(**EXECUTION)), jax.random.key(0))
    )


@pytest.fixture
def build(tokenizer, model_config, weights, tmp_path):
    """(kind, mesh sizes) -> configuration, mesh, plan, data with an untrained reference."""

    def make(kind, mesh, lora=None):
        objective = {"kind": kind, "train_file": write_lines(tmp_path / f"{kind}.jsonl", RECORDS[kind])}
        if kind == "policy":
            objective |= {"max_new_tokens": 4, "group_size": 2, "kl": {"beta": 0.1}}
        config = make_config(
            tmp_path / kind, init_from="x", objective=objective, mesh=mesh, adapters=lora, model=model_config
        )
        mesh = make_mesh(config.mesh)
        reference = jax.device_put(weights, shardings(Decoder(config.model, config.execution), mesh))
        with jax.set_mesh(mesh):
            data = config.objective.open_data(RunContext(config, tokenizer, mesh, lambda: reference))
        return config, mesh, config.objective.declare(config.model, config.execution), data, reference

    return make


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("sizes", "lora"),
    [(MESH, None), (MESH, {"kind": "lora", "rank": 2}), ({"fsdp": 2, "context": 2, "tensor": 2}, None)],
    ids=["full", "lora", "context"],
)
@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired_preference", "reward", "policy"])
def test_gradient_of_every_objective_can_be_sharded_over_rows_weights_and_heads(build, kind, sizes, lora):
    """Shardings are part of types here: a mistake raises when the step is traced."""
    config, mesh, plan, data, reference = build(kind, sizes, lora)
    trainable = abstract(plan if lora is None else declare_adapters(plan, config.adapters), mesh)

    def on_mesh(x):
        spec = logical_to_spec(("batch", "length", *[None] * x.ndim)[: x.ndim])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        batch = jax.tree.map(on_mesh, next(data.batches(0, lambda: reference)))
        step = partial(
            loss_and_gradient,
            loss_function=TrainingLoss(config.objective, config.regularization, partial(assemble, config)),
            accumulate=1,
        )
        frozen = {} if lora is None else {"base": abstract(plan, mesh)}
        _, gradient = jax.eval_shape(step, trainable, frozen, batch)
    layout = lambda tree: {path: (x.shape, x.sharding.spec) for path, x in flatten(tree).items()}  # noqa: E731
    assert layout(gradient) == layout(trainable)


@pytest.mark.parametrize("kind", ["preference", "unpaired_preference", "policy"])
def test_batches_that_need_a_model_are_the_same_on_any_mesh(build, kind):
    batches = []
    for mesh in ({"data": 1, "fsdp": 1, "tensor": 1}, MESH):
        _, mesh, _, data, reference = build(kind, mesh)
        with jax.set_mesh(mesh):
            batches.append(next(data.batches(3, lambda reference=reference: reference)))
    for one, eight in zip(jax.tree.leaves(batches[0]), jax.tree.leaves(batches[1])):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5)
