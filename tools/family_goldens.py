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
from transformers import AutoConfig, AutoModelForCausalLM

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from drawn_weights import draw, inputs  # noqa: E402
from family_cases import CASES, file_name  # noqa: E402

NEW_TOKENS = 8


def compute(settings: dict) -> dict[str, np.ndarray]:
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with tempfile.TemporaryDirectory() as folder:
        # Names in files, which may differ from those of modules.
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        save_file({name: draw(name, x.shape) for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens, mask = (torch.from_numpy(x).long() for x in inputs())
    logits = model(tokens, attention_mask=mask).logits
    loss = model(tokens, attention_mask=mask, labels=torch.where(mask == 1, tokens, -100)).loss
    loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    first = tokens[:1]
    greedy = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return {
        "logits": logits.detach().numpy(),
        "loss": np.float32(loss.item()),
        "gradient_norm": np.float32(sum(squares).sqrt().item()),
        "greedy": greedy[0, first.shape[1] :].numpy().astype(np.int32),
    }


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    for name in names:
        np.savez_compressed(TESTS / "families" / "golden" / f"{file_name(name)}.npz", **compute(CASES[name]))
        print(name)


if __name__ == "__main__":
    main()
