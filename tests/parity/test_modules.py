"""Prediction modules of a folder of DeepSeek-V3 or GLM-4.5, loaded and computed by transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from drawn_weights import inputs
from family_cases import CASES
from family_comparison import write_folder_with_modules
from transformers.modeling_layers import MtpModel

from maxlm.core.batch import Stream
from maxlm.interop.huggingface import find_family, load_huggingface, write_huggingface

MODULES = 2


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3, biases, scaled positions", "glm4_moe"])
def test_modules_compute_the_same_in_transformers(name, tmp_path, monkeypatch):
    case = {**CASES[name], "num_nextn_predict_layers": MODULES}
    write_folder_with_modules(tmp_path, case)
    model, _ = load_huggingface(tmp_path)
    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", model, None, {})

    tokens = inputs()[0][:1]
    length = tokens.shape[1]
    places = np.arange(length, dtype=np.int32)[None]
    stream = Stream(tokens, tokens, np.ones_like(places, np.float32), np.ones_like(places), places)
    predicted = jax.jit(lambda model: model.predict_ahead(model.apply(stream), stream))(model)

    # It knows the number of layers of the published model only.
    layers = case["num_hidden_layers"]
    ignored = [rf"model\.layers\.{layers + number}.*" for number in range(MODULES)]
    family, _ = find_family(model)
    kind = getattr(transformers, family.architecture)
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", ignored)
    theirs = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    modules = MtpModel.from_pretrained(theirs)
    given = torch.from_numpy(tokens).long()
    with torch.no_grad():
        hidden = theirs.model(given).last_hidden_state
        for number, (module, (_, output)) in enumerate(zip(modules.layers, predicted, strict=True), 1):
            kept = length - number
            positions = torch.arange(kept)[None]
            hidden = module(
                inputs_embeds=modules.embed_tokens(given[:, number:]),
                previous_hidden_state=hidden[:, :kept],
                position_embeddings=modules.rotary_emb(hidden, positions),
                attention_mask=torch.full((kept, kept), -torch.inf).triu(1)[None, None],
                position_ids=positions,
                past_key_values=None,
            )
            logits = jnp.asarray(model.logits(output.hidden_BLD))[:, :kept]
            np.testing.assert_allclose(logits, modules.shared_head(hidden).numpy(), atol=1e-4, rtol=0)
