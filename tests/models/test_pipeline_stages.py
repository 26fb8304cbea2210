"""Pipeline stages: the same loss and gradients as one device, for every schedule."""

from functools import cache, partial

import jax
import numpy as np
import pytest
import same_gradient
from tiny_decoder import EXECUTION, VOCAB_SIZE, tiny_config

from maxlm.config import ModelConfig, TrainConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.pipeline import PipelineConfig
from maxlm.config.train import RegularizationConfig
from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import make_mesh, mesh_sizes
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder
from maxlm.models.pipeline_parallelism import Schedule
from maxlm.objectives.pretrain import Pretraining
from maxlm.train.layout import check_layout
from maxlm.train.loss import TrainingLoss
from maxlm.train.step import loss_and_gradient

ROWS, LENGTH = 16, 12


def packed_rows(seed=0) -> Batch:
    """Two documents and some padding in each row; two rows are all padding."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, VOCAB_SIZE, (2, ROWS, LENGTH)).astype(np.int32)
    first, second = random.integers(2, 6, (2, ROWS, 1))
    place = np.arange(LENGTH)
    segments = np.where(place < first, 1, np.where(place < first + second, 2, 0)).astype(np.int32)
    segments[[3, 11]] = 0
    positions = np.where(segments == 2, place - first, place * (segments > 0)).astype(np.int32)
    weights = (random.uniform(0.2, 2, (ROWS, LENGTH)) * (segments > 0)).astype(np.float32)
    return Batch({"text": Stream(tokens, targets, weights, segments, positions)})


BATCH = packed_rows()


LOSS = TrainingLoss(
    Pretraining(sources=[{"path": "nowhere"}], z_loss=0.1),
    RegularizationConfig(router_balance=0.3, router_z_loss=0.1),
    lambda trainable, frozen: trainable,
)


def configured(config: ModelConfig | None = None, *, remat="none", **settings) -> Decoder:
    pipeline = {name: settings.pop(name) for name in ("schedule", "microbatches", "repeats") if name in settings}
    config = config or tiny_config(**{"num_layers": 8, "window_pattern": (5,), "num_kv_heads": 4, **settings})
    return Decoder(config, EXECUTION.model_copy(update={"pipeline": PipelineConfig(**pipeline), "remat": remat}))


def gradient_function(plan, accumulate=1):
    pipeline = plan.execution.pipeline

    def compute(model, batch):
        return loss_and_gradient(model, {}, batch, loss_function=LOSS, accumulate=accumulate, pipeline=pipeline)

    return jax.jit(compute)


@cache
def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights, drawn once for all meshes.

    Not larger: 1.5 times as large, a change of every last bit changes gradients of ten layers with experts by 8e-4.
    """
    return flatten(jax.device_get(initialize(configured(config), jax.random.key(0))))


def terms_and_gradient(plan, sizes=None, *, batch=BATCH, accumulate=1):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **(sizes or {})}))
    with jax.set_mesh(mesh):
        model = jax.device_put(unflatten(weights(plan.config), abstract(plan)), shardings(plan, mesh))
        output, gradient = gradient_function(plan, accumulate)(model, put_batch(batch, mesh))
    return same_gradient.on_host({**output.terms, **output.metrics}, gradient)


assert_same = partial(same_gradient.assert_same, atol=2e-5)


@pytest.fixture(scope="module")
def alone():
    """Terms and gradient on one device, for each window pattern."""
    return cache(lambda windows: terms_and_gradient(configured(window_pattern=windows)))


# GPipe and 1F1B with every other axis, repeats, remat policy; microbatches with and without rows for each stage;
# identical layers, which compile in half the time, and alternating ones.
SAME, TURNS = (5,), (5, None)
CASES = [
    ({"stage": 2, "data": 2, "fsdp": 2}, {"schedule": "gpipe", "microbatches": 4}, 1, TURNS),
    ({"stage": 4, "context": 2}, {"schedule": "gpipe", "remat": "dots"}, 1, SAME),
    ({"stage": 2, "tensor": 2}, {"schedule": "gpipe", "microbatches": 2, "repeats": 2}, 2, TURNS),
    ({"stage": 2, "data": 2, "fsdp": 2}, {"schedule": "1f1b", "microbatches": 2, "remat": "full"}, 2, TURNS),
    ({"stage": 4, "tensor": 2}, {"schedule": "1f1b", "microbatches": 8, "remat": "dots"}, 1, SAME),
    ({"stage": 2, "context": 2}, {"schedule": "1f1b", "microbatches": 4, "repeats": 2}, 1, SAME),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sizes", "settings", "accumulate", "windows"), CASES, ids=str)
def test_stages_change_nothing(sizes, settings, accumulate, windows, alone):
    plan = configured(**settings, window_pattern=windows)
    assert_same(terms_and_gradient(plan, sizes, accumulate=accumulate), alone(windows))


MOE = {
    "num_experts": 4,
    "dim": 16,
    "router_bias": True,
}


@pytest.fixture(scope="module")
def experts_alone():
    return terms_and_gradient(configured(num_layers=4, moe=MOE))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_auxiliary_losses_are_counted_once_per_token_and_layer(schedule, experts_alone):
    """And idle stages add nothing."""
    settings = {"schedule": schedule, "microbatches": 4, "num_layers": 4, "moe": MOE}
    terms, gradient = terms_and_gradient(configured(**settings), {"stage": 2, "expert": 2})
    # The busiest expert is a metric per microbatch.
    for name in experts_alone[0].keys() - {"max_expert_load"}:
        np.testing.assert_allclose(terms[name], experts_alone[0][name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert_same(({}, gradient), ({}, experts_alone[1]))
    assert terms["moe_balance"][1] == 4 * (BATCH["text"].segment_ids > 0).sum()


# The longest group is the trunk, which stages share; the others are computed with the embedding or with the loss.
SIZES = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}
DENSE, SPARSE = {"mixer": SIZES, "mlp": {"dim": 24}}, {"mixer": SIZES, "mlp": {"kind": "moe", **MOE}}
LOCAL = {"mixer": {**SIZES, "window": 5, "rope": {"theta": 500.0}, "qk_norm": True}, "mlp": {"dim": 24}}
BIASED = SPARSE | {"mixer": {**SIZES, "rope": None, "relative_bias": {"buckets": 6, "max_distance": 9}}}
GROUPS = {
    "before": [{"repeat": 1, **DENSE}, {"repeat": 4, **LOCAL}],
    "after": [{"repeat": 4, "pattern": [{"times": 2, **LOCAL}]}, {"repeat": 2, **DENSE}],
    "both sides, with experts and a shared bias": [
        {"repeat": 1, **BIASED},
        {"repeat": 4, "pattern": [LOCAL, BIASED]},
        {"repeat": 1, **BIASED},
    ],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("settings", [{"schedule": "gpipe"}, {"schedule": "1f1b", "repeats": 2}], ids=str)
def test_groups_of_layers_beside_the_trunk_are_computed_once(name, settings):
    config = ModelConfig(vocab_size=VOCAB_SIZE, embed_dim=16, layers=GROUPS[name])
    expected_terms, expected = terms_and_gradient(configured(config))
    plan = configured(config, microbatches=4, **settings)
    terms, gradient = terms_and_gradient(plan, {"stage": 2, "data": 2}, accumulate=1)
    for term in expected_terms.keys() - {"max_expert_load"}:
        np.testing.assert_allclose(terms[term], expected_terms[term], rtol=1e-5, atol=1e-6, err_msg=term)
    assert_same(({}, gradient), ({}, expected))


def test_indivisible_rows_run_all_layers_on_every_device(alone):
    """Validation batches may have such rows."""
    batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), BATCH)
    with_padding = terms_and_gradient(configured(schedule="1f1b", microbatches=4), {"stage": 2}, batch=batch)
    assert_same(with_padding, alone(SAME))


# Schedules


@pytest.mark.parametrize(
    ("stages", "microbatches", "repeats"), [(2, 4, 1), (4, 4, 1), (4, 16, 1), (2, 4, 3), (4, 8, 4)]
)
def test_every_chunk_processes_every_microbatch_once_and_in_order(stages, microbatches, repeats):
    schedule = Schedule(stages, microbatches, repeats)
    when = {}
    for tick in range(schedule.num_ticks):
        for stage in range(stages):
            is_real, microbatch, turn = (int(x) for x in schedule.unit(np.int32(tick - stage)))
            if is_real:
                chunk = turn * stages + stage
                assert (microbatch, chunk) not in when
                when[microbatch, chunk] = tick
                # A ring: a stage's input was sent to it in the previous tick.
                assert chunk == 0 or when[microbatch, chunk - 1] == tick - 1
    assert len(when) == microbatches * stages * repeats
    # The rest is the bubble (arXiv:2104.04473, where it is relative to the work and not to the total).
    idle_share = 1 - len(when) / (stages * schedule.num_ticks)
    assert idle_share == pytest.approx((stages - 1) / (microbatches * repeats + stages - 1))


@pytest.mark.parametrize(("stages", "microbatches", "repeats"), [(2, 8, 1), (4, 16, 1), (2, 8, 2), (4, 16, 3)])
def test_input_is_kept_until_its_backward_pass(stages, microbatches, repeats):
    """No other input overwrites it in the stash before that."""
    schedule = Schedule(stages, microbatches, repeats)
    for stage in range(stages):
        taken = {}
        for tick in range(schedule.num_ticks + schedule.lead):
            is_real, microbatch, turn = (int(x) for x in schedule.unit(np.int32(tick - stage)))
            if is_real:
                place = (turn, microbatch % schedule.in_flight)
                assert place not in taken
                taken[place] = microbatch
            number = tick - schedule.lead - (stages - 1 - stage)
            is_real, microbatch, turn = (int(x) for x in schedule.unit(np.int32(number)))
            if is_real:
                assert taken.pop((repeats - 1 - turn, microbatch % schedule.in_flight)) == microbatch
        assert not taken


def temporary_bytes(microbatches, schedule):
    plan = configured(schedule=schedule, microbatches=microbatches, num_layers=4, remat="full")
    batch = jax.tree.map(lambda x: np.concatenate([x[:2]] * microbatches), BATCH)
    mesh = make_mesh(MeshConfig(stage=2, fsdp=1))
    with jax.set_mesh(mesh):
        compiled = gradient_function(plan).lower(abstract(plan, mesh), put_batch(batch, mesh)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_microbatches():
    activations = 2 * LENGTH * configured().config.embed_dim * 4
    more = {name: temporary_bytes(32, name) - temporary_bytes(8, name) for name in ("gpipe", "1f1b")}
    # The inputs of two layers for each of 24 microbatches, and the microbatch itself; versus only token ids.
    assert more["gpipe"] > 24 * 2 * activations
    assert more["1f1b"] < 24 * activations / 2


# Bad input


@pytest.mark.parametrize(
    ("mesh", "model", "batch_size", "message"),
    [
        (
            {"stage": 4},
            {"microbatches": 6},
            48,
            "execution.pipeline.microbatches: 6 is not divisible by mesh.stage = 4; the nearest that fits is 8",
        ),
        (
            {"stage": 2, "fsdp": 2},
            {"microbatches": 8},
            24,
            "batch_size: 24 in accumulate=1 microbatches is not divisible by execution.pipeline.microbatches = 8 and"
            " mesh.fsdp = 2; the nearest that fits is 32",
        ),
        (
            {"stage": 4},
            {"repeats": 3, "window_pattern": (5, None)},
            8,
            "model.layers.repeat: 4 is not divisible .*; set it to 12",
        ),
    ],
)
def test_settings_indivisible_by_stages_are_rejected(mesh, model, batch_size, message):
    objective = {"kind": "pretrain", "sources": [{"path": "nowhere"}]}
    plan = configured(**model)
    sections = {"objective": objective, "model": plan.config, "execution": plan.execution, "mesh": mesh}
    config = TrainConfig(kind="train", output="x", batch_size=batch_size, row_length=16, **sections)
    with pytest.raises(ConfigError, match=message):
        check_layout(config, mesh_sizes(MeshConfig(**{"fsdp": 1, **mesh}), 8))
