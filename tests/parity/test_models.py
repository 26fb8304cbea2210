"""Models that are exported, loaded by transformers with no code of ours: logits, and the text of a trained one."""

import jax
import numpy as np
import pytest
import torch
import transformers
from drawn_weights import inputs
from family_cases import CASES, SCORE_CASES, file_name
from family_comparison import GOLDEN, write_folder
from tiny_decoder import EXECUTION, tiny_config

import maxlm
from maxlm.core.parameters import initialize
from maxlm.families.family import families
from maxlm.interop.huggingface import load_huggingface, write_huggingface
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer

IN_TRANSFORMERS = [name for name, case in CASES.items() if families()[case["model_type"]].is_in_transformers]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_export_computes_the_same_in_transformers(name, tmp_path):
    write_folder(tmp_path, CASES[name])
    model, _ = load_huggingface(tmp_path)
    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", model, None, {})
    # With eager attention, transformers adds Falcon's ALiBi twice.
    attention = "sdpa" if CASES[name].get("alibi") else "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation=attention
    )
    tokens, mask = inputs()
    # Row by row, the shorter one first: it scales rotary positions of all rows by the longest text so far.
    rows = [torch.from_numpy(row[own == 1]).long() for row, own in zip(tokens, mask)]
    with torch.no_grad():
        logits = [theirs(row[None]).logits[0].numpy() for row in reversed(rows)][::-1]
    expected = np.load(GOLDEN / f"{file_name(name)}.npz")["logits"]
    # The bound of tests/families. A row alone, or other attention code of theirs, differs by up to 2e-5 (Gemma 3).
    np.testing.assert_allclose(np.concatenate(logits), expected[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SCORE_CASES)
def test_exported_classifier_scores_the_same_in_transformers(name, tmp_path):
    write_folder(tmp_path, SCORE_CASES[name])
    model, _ = load_huggingface(tmp_path)
    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", model, None, {})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert tuple(theirs.config.id2label[i] for i in range(theirs.config.num_labels)) == model.config.labels
    tokens, mask = inputs()
    with torch.no_grad():
        scores = theirs(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)).logits.numpy()
    np.testing.assert_allclose(scores, np.load(GOLDEN / f"{file_name(name)}.npz")["scores"], atol=1e-5, rtol=0)


def test_own_model_continues_a_text_in_transformers(tmp_path, tiny_tokenizer_folder):
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    config = tiny_config(vocab_size=tokenizer.vocab_size, embed_dim=32)
    decoder = initialize(Decoder(config, EXECUTION), jax.random.key(0))
    write_huggingface(tmp_path, decoder, tokenizer, {})
    ours = maxlm.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The statement", "def f(x):\n", ""):
        [expected] = ours.generate([text], max_new_tokens=12)
        given = their_tokenizer(text, return_tensors="pt")
        ids = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
        # By our decoder: theirs writes a whole run of bytes as U+FFFD if one of them is not UTF-8.
        assert ours.tokenizer.decode(ids.tolist()) == expected
