"""What Hugging Face's transformers computes for the tiny models of tests/families: writes tests/families/golden/.

    python tools/family_goldens.py [NAME ...]        # needs torch and transformers: the extra `parity`

Each file has logits, loss, norm of the gradient and a greedy continuation of the first row; no weights, which are
drawn from a seed. maxlm itself is not used.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from drawn_weights import draw, inputs  # noqa: E402
from family_cases import CASES, SCORE_CASES, file_name  # noqa: E402

NEW_TOKENS = 8


def compute(settings: dict) -> dict[str, np.ndarray]:
    model = load_model(AutoModelForCausalLM, settings)
    tokens, mask = (torch.from_numpy(x).long() for x in inputs())
    # Row by row, the shorter one first: transformers scales rotary positions of all rows by the longest text so far.
    rows = [row[own == 1] for row, own in zip(tokens, mask)]
    by_row = [model(row[None]).logits[0] for row in reversed(rows)][::-1]
    logits = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, tokens.shape[1] - len(x))) for x in by_row])
    losses = [torch.nn.functional.cross_entropy(x[:-1], row[1:], reduction="sum") for x, row in zip(by_row, rows)]
    loss = sum(losses) / sum(len(row) - 1 for row in rows)
    loss.backward()
    first = tokens[:1]
    greedy = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return {
        "logits": logits.detach().numpy(),
        "loss": np.float32(loss.item()),
        "gradient_norm": _gradient_norm(model),
        "greedy": greedy[0, first.shape[1] :].numpy().astype(np.int32),
    }


def compute_scores(settings: dict) -> dict[str, np.ndarray]:
    """Scores of each row, and the norm of the gradient of the sum of their squares."""
    model = load_model(AutoModelForSequenceClassification, settings)
    tokens, mask = (torch.from_numpy(x).long() for x in inputs())
    scores = model(tokens, attention_mask=mask).logits
    scores.square().sum().backward()
    return {"scores": scores.detach().numpy(), "gradient_norm": _gradient_norm(model)}


def load_model(kind: type, settings: dict) -> torch.nn.Module:
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with tempfile.TemporaryDirectory() as folder:
        # Names in files, which may differ from those of modules.
        kind.from_config(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        save_file({name: draw(name, x.shape) for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
        # With "eager", Falcon's biases by distance are added twice in transformers 5.23.
        implementation = "sdpa" if settings.get("alibi") else "eager"
        return kind.from_pretrained(folder, attn_implementation=implementation).eval()


def _gradient_norm(model: torch.nn.Module) -> np.float32:
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return np.float32(sum(squares).sqrt().item())


def main() -> None:
    for name in sys.argv[1:] or [*CASES, *SCORE_CASES]:
        computed = compute(CASES[name]) if name in CASES else compute_scores(SCORE_CASES[name])
        np.savez_compressed(TESTS / "families" / "golden" / f"{file_name(name)}.npz", **computed)
        print(name)


if __name__ == "__main__":
    main()
