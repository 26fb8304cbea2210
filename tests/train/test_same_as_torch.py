"""Training steps against those of torch: losses, norms of gradients, and what the model computes afterwards."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn_weights import inputs
from family_cases import CASES
from family_comparison import write_folder
from training_traces import BETAS, LEARNING_RATE, STEPS, TRACES, WEIGHT_DECAY, Trace, draw_adapter

from maxlm.config.adapters import LoraConfig
from maxlm.config.fault import GuardConfig
from maxlm.config.optim import OptimConfig
from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch, Stream
from maxlm.families.placement import placed_tensors
from maxlm.interop.huggingface import load_huggingface, read_description
from maxlm.models.adapters.apply import apply_adapters
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.objectives.sft import SupervisedFineTuning
from maxlm.optim.build import make_optimizer
from maxlm.train.loss import TrainingLoss
from maxlm.train.state import create_state
from maxlm.train.step import train_step

GOLDEN = Path(__file__).parent / "golden"


def batch() -> Batch:
    tokens, mask = inputs()
    is_predicted = np.pad(mask[:, 1:], ((0, 0), (0, 1))).astype(np.float32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch({"text": Stream(tokens, np.roll(tokens, -1, axis=1), is_predicted, mask, positions)})


def drawn_adapters(folder: Path, plan: dict, trace: Trace) -> dict:
    """The adapters of the golden values, stacked as the weights that they adapt."""
    family, description = read_description(folder)
    adapters = {path: {name: np.empty(each.shape, np.float32) for name, each in plan[path].items()} for path in plan}
    for tensor in placed_tensors(family, Decoder(description.model)).values():
        [piece] = tensor.pieces
        if piece.path in plan:
            down, up = draw_adapter(tensor.name.removesuffix(".weight"), trace.rank, *tensor.shape)
            adapters[piece.path]["down"][piece.place] = down.T
            adapters[piece.path]["up"][piece.place] = up.T
    return adapters


def optimizer_settings(trace: Trace) -> OptimConfig:
    return OptimConfig(
        learning_rate=LEARNING_RATE,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0 if trace.rank else WEIGHT_DECAY,
        clip_norm=trace.clip_norm,
        groups=[{"match": "*", "weight_decay": WEIGHT_DECAY}] if trace.decays_all else [],
    )


@pytest.mark.parametrize("name", TRACES)
def test_steps_are_those_of_torch(name, tmp_path):
    trace, golden = TRACES[name], np.load(GOLDEN / f"{name}.npz")
    write_folder(tmp_path, CASES[trace.family])
    trained, _ = load_huggingface(tmp_path)
    plan, frozen, assemble = Decoder(trained.config, trained.execution), {}, lambda trainable, frozen: trainable
    if trace.rank is not None:
        lora, frozen = LoraConfig(rank=trace.rank, alpha=trace.alpha), {"base": trained}
        plan = declare_adapters(plan, lora)
        trained = drawn_adapters(tmp_path, plan, trace)
        assemble = lambda trainable, frozen: apply_adapters(frozen["base"], trainable, lora)  # noqa: E731
    objective = SupervisedFineTuning(train_file="nowhere")
    optimizer = make_optimizer(optimizer_settings(trace), plan)
    step = jax.jit(
        partial(
            train_step,
            loss_function=TrainingLoss(objective, RegularizationConfig(), assemble),
            optimizer=optimizer,
            schedule=lambda step: 1.0,
            guard=GuardConfig(),
            accumulate=1,
        )
    )
    state, metrics = create_state(trained, optimizer), []
    for _ in range(STEPS):
        state, of_step = step(state, frozen, batch())
        metrics.append((of_step["loss"], of_step["grad_norm"]))
    losses, norms = np.array(metrics).T

    @jax.jit
    def logits(trainable, frozen):
        model = assemble(trainable, frozen)
        return model.logits(model.apply(batch()["text"]).hidden_BLD)

    np.testing.assert_allclose(losses, golden["losses"], rtol=5e-6)
    np.testing.assert_allclose(norms, golden["gradient_norms"], rtol=2e-5)
    is_real = inputs()[1] == 1
    found = np.asarray(logits(state.trainable, frozen))
    np.testing.assert_allclose(found[is_real], golden["logits"][is_real], atol=1e-4, rtol=0)
    print(
        "D",
        np.abs(losses / golden["losses"] - 1).max(),
        np.abs(norms / golden["gradient_norms"] - 1).max(),
        np.abs(found - golden["logits"])[is_real].max(),
    )
