"""Tiny models of ChatGLM, which transformers does not have, computed by maxlm and by its authors' code.

`tools/chatglm_goldens.py` computes their logits, loss, gradient and greedy text with that code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from drawn_weights import inputs

GOLDEN = Path(__file__).parent / "families" / "golden"

GMASK, START = 65, 66
COMMON = {
    "model_type": "chatglm",
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 3,
    "layernorm_epsilon": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIRST = {
    **COMMON,
    "vocab_size": 67,
    "inner_hidden_size": 40,
    "max_sequence_length": 64,
    "position_encoding_2d": True,
    "bos_token_id": START,
    "mask_token_id": 64,
    "gmask_token_id": GMASK,
}
LATER = {
    **COMMON,
    "padded_vocab_size": 67,
    "ffn_hidden_size": 40,
    "kv_channels": 16,
    "seq_length": 64,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 1,
    "original_rope": True,
    "bos_token_id": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "chatglm, first": FIRST,
    "chatglm, first, untied, one layer": {**FIRST, "num_layers": 1, "tie_word_embeddings": False},
    "chatglm 2": LATER,
    "chatglm 2, as many key heads, no biases": {
        **LATER,
        "multi_query_group_num": 3,
        "kv_channels": 24,
        "add_qkv_bias": False,
    },
}


def rows() -> tuple[list[np.ndarray], list[int]]:
    """Two texts of different lengths, and the length of the prefix of each, which ends with a mask token."""
    tokens, mask = inputs()
    texts = [row[own == 1] % 64 for row, own in zip(tokens, mask)]
    prefix_lengths = [10, 5]
    for text, length in zip(texts, prefix_lengths):
        text[length - 1 : length + 1] = GMASK, START
    return texts, prefix_lengths


@dataclass(frozen=True)
class AuthorsComparison:
    """Largest absolute difference of logits; relative ones of loss and gradient norm.

    same_greedy: the greedy continuation, with a cache, is that of the authors' code.
    same_tensors, same_model: what is exported is bit for bit what was imported, and describes the same model.
    """

    logits: float
    loss: float
    gradient_norm: float
    same_greedy: bool
    same_tensors: bool
    same_model: bool


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name.replace(', ', '-').replace(' ', '_')}.npz"


def compare_with_authors(name: str, folder: Path) -> AuthorsComparison:
    """Compare a case with what its authors' code computes for it. `folder`: an empty one."""
    # Here, as the tool that computes the goldens runs without JAX.
    import jax
    import jax.numpy as jnp
    from family_comparison import write_folder
    from safetensors.numpy import load_file

    from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface

    golden, tensors = np.load(golden_file(name)), write_folder(folder, CASES[name])
    model, _ = load_huggingface(folder)
    texts, prefix_lengths = rows()
    tokens = np.zeros((2, len(texts[0])), np.int32)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    prefixes = None
    if model.config.prefix_attention:
        prefixes = np.repeat(np.array(prefix_lengths, np.int32)[:, None], tokens.shape[1], axis=1)

    @jax.jit
    def compute(model):
        def loss(model):
            logits = model.logits(model(tokens, segment_ids_BL=mask, prefix_lengths_BL=prefixes).hidden_BLD)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(chosen * mask[:, 1:]) / jnp.sum(mask[:, 1:]), logits

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(model)
        return logits, value, jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))

    @jax.jit
    def extend(model, tokens, positions, prefixes, caches):
        output = model(tokens, positions_BL=positions, prefix_lengths_BL=prefixes, caches=caches)
        return jnp.argmax(model.logits(output.hidden_BLD)[0, -1]), output.caches

    logits, loss, gradient_norm = compute(model)
    # The first text in one piece, then one token at a time.
    length, greedy, caches = tokens.shape[1], [], model.create_caches(1, 32, jnp.float32)
    of_first = lambda count: None if prefixes is None else prefixes[:1, :count]  # noqa: E731
    token, caches = extend(model, tokens[:1], np.arange(length)[None], of_first(length), caches)
    for position in range(length, length + len(golden["greedy"])):
        greedy.append(int(token))
        token, caches = extend(model, token[None, None], np.array([[position]]), of_first(1), caches)

    out = folder / "out"
    out.mkdir()
    write_huggingface(out, model, None, {})
    written = load_file(out / "model.safetensors")
    return AuthorsComparison(
        logits=float(np.abs(np.asarray(logits)[mask == 1] - golden["logits"]).max()),
        loss=abs(float(loss / golden["loss"] - 1)),
        gradient_norm=abs(float(gradient_norm / golden["gradient_norm"] - 1)),
        same_greedy=greedy == golden["greedy"].tolist(),
        same_tensors=written.keys() == tensors.keys()
        and all(np.array_equal(written[path], tensor) for path, tensor in tensors.items()),
        same_model=read_description(out) == read_description(folder),
    )
