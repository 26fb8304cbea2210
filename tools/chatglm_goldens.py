"""What its authors' code computes for the tiny ChatGLM models of tests/families: writes tests/families/golden/.

    python tools/chatglm_goldens.py FIRST LATER      # needs torch and transformers 4.33

FIRST and LATER are folders with `modeling_chatglm.py`, `configuration_chatglm.py` and `quantization.py` as published
with ChatGLM-6B and ChatGLM2-6B. They are run, so read them before. As they advise for CPUs, in float32.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from chatglm_comparison import CASES, golden_file, rows  # noqa: E402
from drawn_weights import draw  # noqa: E402

NEW_TOKENS = 8


def compute(settings: dict, code: Path) -> dict[str, np.ndarray]:
    model = _load(settings, code)
    texts = [torch.from_numpy(text).long() for text in rows()[0]]
    by_row = [_logits(model, text) for text in texts]
    losses = [torch.nn.functional.cross_entropy(x[:-1], row[1:], reduction="sum") for x, row in zip(by_row, texts)]
    loss = sum(losses) / sum(len(row) - 1 for row in texts)
    loss.backward()
    squares = [x.grad.double().square().sum() for x in model.parameters() if x.grad is not None]
    text = texts[0]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            text = torch.cat([text, _logits(model, text)[-1:].argmax(-1)])
    return {
        "logits": torch.cat(by_row).detach().numpy(),
        "loss": np.float32(loss.item()),
        "gradient_norm": np.float32(sum(squares).sqrt().item()),
        "greedy": text[len(texts[0]) :].numpy().astype(np.int32),
    }


def _load(settings: dict, code: Path) -> torch.nn.Module:
    # As a package, because the files import one another.
    sys.path.insert(0, str(code.parent))
    modeling = importlib.import_module(f"{code.name}.modeling_chatglm")
    config = importlib.import_module(f"{code.name}.configuration_chatglm").ChatGLMConfig(**settings)
    model = modeling.ChatGLMForConditionalGeneration(config, empty_init=False).float().eval()
    state = {name: torch.from_numpy(draw(name, tuple(x.shape))) for name, x in model.named_parameters()}
    model.load_state_dict(state, strict=False)
    if config.tie_word_embeddings and hasattr(model, "lm_head"):
        model.lm_head.weight = model.transformer.word_embeddings.weight
    return model


def _logits(model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    given = model.prepare_inputs_for_generation(text[None])
    places = {name: given[name] for name in ("position_ids", "attention_mask") if given.get(name) is not None}
    return model(text[None], **places, use_cache=False).logits[0]


def main() -> None:
    first, later = (Path(folder).resolve() for folder in sys.argv[1:])
    for name, settings in CASES.items():
        computed = compute(settings, first if "first" in name else later)
        np.savez_compressed(golden_file(name), **computed)
        print(name, computed["greedy"])


if __name__ == "__main__":
    main()
