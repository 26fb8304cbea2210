"""ChatGLM, which transformers does not have, against its authors' code: logits, gradient, greedy text, the way back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chatglm_cases import CASES, rows
from family_comparison import write_folder
from safetensors.numpy import load_file

from maxlm.errors import CheckpointError
from maxlm.generate.model import load
from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface

GOLDEN = Path(__file__).parent / "golden"


def prefixes_of(model, prefix_lengths, length: int):
    """`prefix_lengths_BL` of rows; None for a causal model."""
    if not model.config.prefix_attention:
        return None
    return np.repeat(np.array(prefix_lengths, np.int32)[:, None], length, axis=1)


@jax.jit
def compute(model, tokens, mask, prefixes):
    """Logits, loss and norm of the gradient."""

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


@pytest.mark.parametrize("name", CASES)
def test_same_as_the_authors_code_both_ways(name, tmp_path):
    golden = np.load(GOLDEN / f"{name.replace(', ', '-').replace(' ', '_')}.npz")
    tensors = write_folder(tmp_path, CASES[name])
    model, _ = load_huggingface(tmp_path)
    texts, prefix_lengths = rows()
    tokens = np.zeros((2, len(texts[0])), np.int32)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    prefixes = prefixes_of(model, prefix_lengths, tokens.shape[1])
    logits, loss, gradient_norm = compute(model, tokens, mask, prefixes)
    np.testing.assert_allclose(np.asarray(logits)[mask == 1], golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient_norm, golden["gradient_norm"], rtol=1e-3)

    # The first text's prompt in one piece, then one token at a time.
    length, greedy = len(texts[0]), []
    token, caches = extend(
        model,
        tokens[:1],
        np.arange(length)[None],
        prefixes if prefixes is None else prefixes[:1],
        model.create_caches(1, 32, jnp.float32),
    )
    for position in range(length, length + len(golden["greedy"])):
        greedy.append(int(token))
        one = prefixes if prefixes is None else prefixes[:1, :1]
        token, caches = extend(model, token[None, None], np.array([[position]]), one, caches)
    assert greedy == golden["greedy"].tolist()

    out = tmp_path / "out"
    out.mkdir()
    write_huggingface(out, model, None, {})
    assert read_description(out) == read_description(tmp_path)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for path, value in tensors.items():
        np.testing.assert_array_equal(written[path], value, err_msg=path)


def test_loaded_model_takes_prefixes(tmp_path):
    write_folder(tmp_path, CASES["chatglm, first"])
    texts, prefix_lengths = rows()
    golden = np.load(GOLDEN / "chatglm-first.npz")
    got = load(tmp_path).logits(texts[0][None], prefix_lengths=prefix_lengths[:1])
    np.testing.assert_allclose(got[0], golden["logits"][: len(texts[0])], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("chatglm 2", {"multi_query_attention": False}, "multi_query_attention is not set"),
        (
            "chatglm, first",
            {"position_encoding_2d": False},
            "position_encoding_2d is False, which maxlm does not support",
        ),
        ("chatglm, first", {"quantization_bit": 4}, "quantization_bit is 4"),
        ("chatglm, first", {"pre_seq_len": 8}, "pre_seq_len is 8"),
    ],
)
def test_settings_that_change_the_function_are_refused(name, setting, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_folder(tmp_path, CASES[name] | setting)
