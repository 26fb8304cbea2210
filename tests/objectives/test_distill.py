"""Distillation: divergence and gradient match the formula, and a student learns to match its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_gradient
from model_section import uniform
from tiny_decoder import documents, pack

from maxlm.config.execution import ExecutionConfig
from maxlm.config.load import parse_config
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.train import RegularizationConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.parameters import initialize
from maxlm.core.sharding import make_mesh
from maxlm.errors import CheckpointError, ConfigError
from maxlm.models.decoder import Decoder
from maxlm.objectives.distill import Distillation
from maxlm.objectives.teacher import token_divergence
from maxlm.ops.divergences import kl_divergence
from maxlm.train.loss import TrainingLoss
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.step import loss_and_gradient

EXECUTION = {"max_length": 32, "activation_dtype": "float32", "matmul_dtype": "float32"}


def small(**changes) -> dict:
    sizes = {"num_layers": 1, "embed_dim": 16, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    return uniform(**{**sizes, **changes})


def large(**changes) -> dict:
    return small(embed_dim=32, mlp_dim=48, **changes)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk_length", [3, 100])
def test_divergence_and_gradient_match_formula(chunk_length):
    shape = {"vocab_size": 23, "tie_embeddings": False}
    execution = ExecutionConfig(**EXECUTION, loss_chunk_length=chunk_length)
    student = initialize(Decoder(ModelConfig(**small(**shape)), execution), jax.random.key(0))
    teacher = initialize(Decoder(ModelConfig(**large(**shape)), execution), jax.random.key(1))
    random = np.random.default_rng(0)
    hidden, taught = (random.normal(0, 20, (2, 7, width)).astype(np.float32) for width in (16, 32))
    weights, temperature = random.random((2, 7)).astype(np.float32), 1.7

    def total(student):
        return jnp.sum(
            weights * token_divergence(student, hidden, teacher, taught, kl_divergence, temperature=temperature)
        )

    found, gradient = jax.value_and_grad(total)(student)

    q = softmax(hidden.astype(np.float64) @ np.asarray(student.head, np.float64).T / temperature)
    p = softmax(taught.astype(np.float64) @ np.asarray(teacher.head, np.float64).T / temperature)
    expected = (weights * (p * (np.log(p) - np.log(q))).sum(axis=-1)).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    expected_gradient = np.einsum("bl,blv,bld->vd", weights, (q - p) / temperature, hidden)
    np.testing.assert_allclose(gradient.head, expected_gradient, rtol=1e-4, atol=1e-5 * np.abs(expected_gradient).max())


def distill_config(output, teacher, data, *, objective=None, **settings):
    tree = {
        "kind": "train",
        "output": str(output),
        "model": small(),
        "execution": EXECUTION,
        "objective": {
            "kind": "distill",
            "teacher": str(teacher),
            "sources": [{"path": str(data)}],
            "temperature": 2.0,
            "alpha": 0.8,
            **(objective or {}),
        },
        "mesh": {"fsdp": 2, "tensor": 1},
        "optim": {"learning_rate": 1e-2, "schedule": {"kind": "constant", "warmup_steps": 1}},
        "steps": 12,
        "batch_size": 8,
        "row_length": 32,
        "log_every": 4,
        "eval_every": 0,
        "eval_batches": 1,
        **settings,
    }
    return parse_config(tree)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_data_folder):
    """A run folder of a larger model, configured for 1F1B, trained on the data for a few steps."""
    folder = tmp_path_factory.mktemp("teacher")
    tree = distill_config(folder, "none", tiny_data_folder).model_dump()
    objective = {"kind": "pretrain", "sources": [{"path": tiny_data_folder}]}
    model, execution = large(num_layers=2), {**EXECUTION, "pipeline": {"schedule": "1f1b"}}
    train(parse_config({**tree, "model": model, "execution": execution, "objective": objective, "steps": 8}))
    return folder


@pytest.mark.exhaustive
def test_student_learns_to_match_teacher(teacher, tiny_data_folder, tmp_path):
    manifest = train(distill_config(tmp_path / "run", teacher, tiny_data_folder))
    assert manifest["stage"] == "train/distill"
    assert manifest["inputs"]["teacher"]["path"]
    assert {"loss", "bits_per_byte"} <= set(manifest["metrics"]["valid"])
    records = [record for record in read_metrics(tmp_path / "run") if "divergence" in record]
    first, last = records[0], records[-1]
    assert last["divergence"] < 0.7 * first["divergence"]
    for record in (first, last):
        expected = 0.8 * 4 * record["divergence"] + 0.2 * record["student_cross_entropy"]
        # A mean over steps compared with a mean over their tokens.
        np.testing.assert_allclose(record["loss"], expected, rtol=1e-3)


def test_mesh_that_does_not_fit_is_rejected(teacher, tiny_data_folder, tmp_path):
    config = distill_config(tmp_path / "run", teacher, tiny_data_folder, mesh={"fsdp": 1, "tensor": 8})
    with pytest.raises(ConfigError, match=r"model\.layers\.mixer\.num_heads: 2 is not divisible by"):
        train(config)


@pytest.mark.exhaustive
# The teacher has more layers, of which one is outside its trunk.
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_stages_with_a_teacher_change_nothing(schedule, repeats):
    objective = distill_config("x", "none", "none").objective
    loss = TrainingLoss(objective, RegularizationConfig(), lambda trainable, frozen: trainable)
    pipeline = {"schedule": schedule, "microbatches": 4, "repeats": repeats}
    execution = ExecutionConfig(**EXECUTION, pipeline=pipeline)
    own, other = small(num_layers=4, vocab_size=48), large(num_layers=8, vocab_size=48)
    other["layers"] = [other["layers"], {**other["layers"], "repeat": 1}]
    plans = [Decoder(ModelConfig(**section), execution) for section in (own, other)]
    batch = Batch({"text": pack(documents(), rows=8, length=32, per_row=3)})

    def compute(student, teacher, batch):
        settings = {"loss_function": loss, "accumulate": 1, "pipeline": execution.pipeline}
        return loss_and_gradient(student, {"teacher": teacher}, batch, **settings)

    def result(**sizes):
        mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
        with jax.set_mesh(mesh):
            models = [initialize(plan, jax.random.key(seed), mesh) for seed, plan in enumerate(plans)]
            # Two nearly uniform distributions would differ by less than their rounding.
            models = jax.tree.map(lambda leaf: 1.5 * leaf, models)
            output, gradient = jax.jit(compute)(*models, put_batch(batch, mesh))
        return same_gradient.on_host({**output.terms, **output.metrics}, gradient)

    same_gradient.assert_same(result(stage=2, data=2), result(), atol=4e-5)


@pytest.mark.exhaustive
def test_student_learns_in_1f1b_pipeline(teacher, tiny_data_folder, tmp_path):
    settings = {"model": small(num_layers=2), "execution": {**EXECUTION, "pipeline": {"schedule": "1f1b"}}}
    config = distill_config(tmp_path / "run", teacher, tiny_data_folder, mesh={"fsdp": 1, "stage": 2}, **settings)
    train(config)
    first, *_, last = [record for record in read_metrics(tmp_path / "run") if "divergence" in record]
    assert last["divergence"] < 0.7 * first["divergence"]


def test_teacher_uses_pipeline_settings_of_student(teacher, tmp_path, tiny_data_folder):
    """A teacher trained with 1F1B can teach a student that uses GPipe."""
    student = small(num_layers=2)
    mesh = {"fsdp": 1, "stage": 2}
    config = distill_config(tmp_path / "run", teacher, tiny_data_folder, mesh=mesh, model=student, steps=1)
    assert train(config)["metrics"]["finished"]


def test_teacher_with_non_finite_logits_is_rejected_before_first_step(teacher, tiny_data_folder, tmp_path, monkeypatch):
    load_teacher = Distillation.load_teacher

    def broken(*arguments):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, load_teacher(*arguments))

    monkeypatch.setattr(Distillation, "load_teacher", broken)
    with pytest.raises(CheckpointError, match=r"objective\.teacher: .* gives non-finite logits"):
        train(distill_config(tmp_path / "run", teacher, tiny_data_folder))
    assert not (tmp_path / "run" / "checkpoints").exists()
