"""Short trainings of tiny models that tools/training_goldens.py computes with torch, and tests/train with maxlm."""

from dataclasses import dataclass

import numpy as np
from drawn_weights import draw

STEPS = 6
LEARNING_RATE = 1e-3
BETAS = 0.9, 0.95
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Trace:
    """AdamW on the batch of `drawn_weights.inputs`, all of whose real tokens are predicted.

    family: the model, by its name in `family_cases.CASES`.
    decays_all: decay all parameters, and not matrices only.
    rank, alpha: of adapters of all matrices of the layers, which are trained alone, without decay.
    """

    family: str
    decays_all: bool = False
    clip_norm: float | None = None
    rank: int | None = None
    alpha: float = 6.0


TRACES = {
    "llama": Trace("llama", clip_norm=1.0),
    "gpt2": Trace("gpt2", decays_all=True),
    "llama_adapters": Trace("llama", rank=3),
}


def draw_adapter(name: str, rank: int, num_outputs: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """down [rank, inputs] and up [outputs, rank] of a matrix, both away from zero: A and B of arXiv:2106.09685."""
    shapes = {"A": (rank, num_inputs), "B": (num_outputs, rank)}
    down, up = (draw(f"{name}.lora_{letter}", shape) for letter, shape in shapes.items())
    return down, 0.3 * up
