"""What torch computes when it trains tiny models of Hugging Face's transformers: writes tests/train/golden/.

    python tools/training_goldens.py        # needs torch and transformers: the extra `parity`

Each file has the loss and the norm of the gradient of each step, and the logits after the last one. Weights are drawn
from a seed. maxlm itself is not used.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from family_goldens import load_model
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from drawn_weights import inputs  # noqa: E402
from family_cases import CASES  # noqa: E402
from training_traces import BETAS, LEARNING_RATE, STEPS, TRACES, WEIGHT_DECAY, Trace, draw_adapter  # noqa: E402


class LowRank(torch.nn.Module):
    """A frozen matrix plus alpha / rank * B A."""

    def __init__(self, name: str, weight: torch.Tensor, trace: Trace):
        super().__init__()
        down, up = draw_adapter(name, trace.rank, *weight.shape)
        self.down, self.up = (torch.nn.Parameter(torch.from_numpy(x)) for x in (down, up))
        self.scale = trace.alpha / trace.rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * self.up @ self.down


def compute(trace: Trace) -> dict[str, np.ndarray]:
    model = load_model(AutoModelForCausalLM, CASES[trace.family])
    if trace.rank is not None:
        add_adapters(model, trace)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(decay_groups(trained, trace), lr=LEARNING_RATE, betas=BETAS)
    tokens, mask = (torch.from_numpy(x).long() for x in inputs())
    labels = torch.where(mask == 1, tokens, -100)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, trace.clip_norm or float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits.numpy()
    return {"losses": np.array(losses), "gradient_norms": np.array(norms), "logits": logits}


def add_adapters(model: torch.nn.Module, trace: Trace) -> None:
    """Adapters of all linear layers but the output head; everything else is frozen."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            parametrize.register_parametrization(module, "weight", LowRank(name, module.weight, trace))


def decay_groups(trained: Iterable[torch.nn.Parameter], trace: Trace) -> list[dict]:
    def decay(parameter: torch.nn.Parameter) -> float:
        is_decayed = trace.rank is None and (trace.decays_all or parameter.ndim > 1)
        return WEIGHT_DECAY if is_decayed else 0.0

    return [{"params": [parameter], "weight_decay": decay(parameter)} for parameter in trained]


def main() -> None:
    for name, trace in TRACES.items():
        computed = compute(trace)
        np.savez_compressed(TESTS / "train" / "golden" / f"{name}.npz", **computed)
        print(name, computed["losses"], computed["gradient_norms"])


if __name__ == "__main__":
    main()
