"""Adapters against Hugging Face's peft: its files read here, and ours read there, with the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from drawn_weights import inputs
from family_cases import CASES
from family_comparison import write_folder

from maxlm.config.adapters import Ia3Config, LoraConfig, PrefixConfig, PromptTuningConfig
from maxlm.interop.huggingface import load_huggingface
from maxlm.interop.peft import read_peft, write_peft
from maxlm.models.adapters.apply import apply_adapters, merge_adapters
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.decoder import Decoder

# Fused matrices (phi3, gpt2), matrices stored input-first (gpt2), biases (qwen2, glm), interleaved rotary channels
# (glm).
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "glm": ("q_proj", "k_proj", "o_proj"),
}
THEIRS = {
    "lora": lambda targets: peft.LoraConfig(r=3, lora_alpha=12, target_modules=list(targets), task_type="CAUSAL_LM"),
    "rslora with patterns": lambda targets: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=list(targets),
        rank_pattern={targets[0]: 2},
        alpha_pattern={targets[-1]: 7},
        task_type="CAUSAL_LM",
    ),
    "dora of one layer": lambda targets: peft.LoraConfig(
        r=3, use_dora=True, target_modules=list(targets), layers_to_transform=[1], task_type="CAUSAL_LM"
    ),
    "dora": lambda targets: peft.LoraConfig(r=3, use_dora=True, target_modules=list(targets), task_type="CAUSAL_LM"),
    "ia3": lambda targets: peft.IA3Config(
        target_modules=list(targets),
        feedforward_modules=[name for name in targets if name in ("down_proj", "mlp.c_proj")],
        task_type="CAUSAL_LM",
    ),
}


def their_logits(model) -> np.ndarray:
    tokens, mask = (torch.from_numpy(x).long() for x in inputs())
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits.numpy()[inputs()[1] == 1]


def our_logits(model) -> np.ndarray:
    tokens, mask = inputs()
    found = jax.jit(lambda model: model.logits(model(tokens, segment_ids_BL=mask).hidden_BLD))(model)
    return np.asarray(found)[mask == 1]


def their_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def drawn(model):
    """The model with adapters that change it."""
    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = torch.from_numpy(random.standard_normal(tuple(parameter.shape)).astype(np.float32))
                start = 0 if "lora_A" in name or "lora_B" in name else parameter
                parameter.copy_(start + 0.2 * step)
    return model.eval()


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("family", TARGETS)
def test_their_adapters_compute_the_same_here(family, kind, tmp_path):
    write_folder(tmp_path, CASES[family])
    base = their_base(tmp_path)
    plain = their_logits(base)
    adapted = drawn(peft.get_peft_model(base, THEIRS[kind](TARGETS[family])))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = their_logits(adapted)
    assert np.abs(expected - plain).max() > 0.05
    model, _ = load_huggingface(tmp_path)
    config, adapters = read_peft(tmp_path / "adapter", model)
    bound = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(our_logits(apply_adapters(model, adapters, config)), expected, atol=bound, rtol=0)
    np.testing.assert_allclose(our_logits(merge_adapters(model, adapters, config)), expected, atol=bound, rtol=0)


OURS = {
    "lora": LoraConfig(rank=3, alpha=4, targets=("query", "value", "up", "down")),
    "rslora": LoraConfig(rank=2, alpha=2, scaling="rank_stabilized"),
    "dora of a layer": LoraConfig(rank=2, alpha=4, decomposed=True, targets=("layers/1/*",)),
    "ia3": Ia3Config(),
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", TARGETS)
def test_our_adapters_compute_the_same_there(family, kind, tmp_path):
    write_folder(tmp_path, CASES[family])
    model, _ = load_huggingface(tmp_path)
    config = OURS[kind]
    random = np.random.default_rng(1)
    fresh = create_adapters(Decoder(model.config, model.execution), config, model, jax.random.key(0))
    adapters = {
        path: {
            name: leaf
            + (leaf_mask(path, name, leaf, config) * 0.2 * random.standard_normal(leaf.shape)).astype("float32")
            for name, leaf in adapter.items()
        }
        for path, adapter in fresh.items()
    }
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", model, adapters, config)
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "adapter").eval()
    expected = our_logits(apply_adapters(model, adapters, config))
    bound = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(their_logits(theirs), expected, atol=bound, rtol=0)


def leaf_mask(path, name, leaf, config) -> np.ndarray:
    """Zero for the layers that are not chosen: adapters of those stay as they begin."""
    del path, name
    mask = np.ones(leaf.shape)
    if config == OURS["dora of a layer"] and leaf.shape[0] == 2:
        mask[0] = 0
    return mask


# Heads that share keys, a factor on rotated keys (yarn), norms of keys (qwen3), rotary positions of some channels (glm:
# interleaved), and matrices that are fused by head (gpt_neox).
WITH_PREFIX = ["llama", "llama, yarn", "qwen3", "glm", "gpt_neox"]


@pytest.mark.parametrize("family", WITH_PREFIX)
@pytest.mark.parametrize("projection", [False, True])
def test_their_prefixes_compute_the_same_here(family, projection, tmp_path):
    """P-tuning v2 and prefix tuning; peft folds the MLP into what it saves."""
    write_folder(tmp_path, CASES[family])
    base = their_base(tmp_path)
    plain = their_logits(base)
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=9, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, config)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape)).astype(np.float32)))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = their_logits(adapted)
    assert np.abs(expected - plain).max() > 0.05
    model, _ = load_huggingface(tmp_path)
    config, adapters = read_peft(tmp_path / "adapter", model)
    bound = 1e-5 * max(1, np.abs(expected).max())
    for change in (apply_adapters, merge_adapters):
        np.testing.assert_allclose(our_logits(change(model, adapters, config)), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("family", WITH_PREFIX)
@pytest.mark.parametrize("reparametrize", [None, {"dim": 6}])
def test_our_prefixes_compute_the_same_there(family, reparametrize, tmp_path):
    write_folder(tmp_path, CASES[family])
    model, _ = load_huggingface(tmp_path)
    config = PrefixConfig(tokens=4, reparametrize=reparametrize)
    random = np.random.default_rng(1)
    adapters = {
        path: {name: jnp.asarray(random.standard_normal(leaf.shape), "float32") for name, leaf in adapter.items()}
        for path, adapter in declare_adapters(Decoder(model.config, model.execution), config).items()
    }
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", model, adapters, config)
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "adapter").eval()
    expected = our_logits(apply_adapters(model, adapters, config))
    assert np.abs(expected - our_logits(model)).max() > 0.05
    bound = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(their_logits(theirs), expected, atol=bound, rtol=0)


# With a factor on embeddings too (gemma), and without rotary keys of some channels (gpt_neox).
WITH_PROMPT = [*WITH_PREFIX, "gemma"]


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_their_prompts_compute_the_same_here(family, tmp_path):
    write_folder(tmp_path, CASES[family])
    base = their_base(tmp_path)
    plain = their_logits(base)
    adapted = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = their_logits_after_prompt(adapted, 5)
    assert np.abs(expected - plain).max() > 0.05
    model, _ = load_huggingface(tmp_path)
    config, adapters = read_peft(tmp_path / "adapter", model)
    bound = 1e-5 * max(1, np.abs(expected).max())
    for change in (apply_adapters, merge_adapters):
        np.testing.assert_allclose(our_logits(change(model, adapters, config)), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("family", WITH_PROMPT)
def test_our_prompts_compute_the_same_there(family, tmp_path):
    write_folder(tmp_path, CASES[family])
    model, _ = load_huggingface(tmp_path)
    config = PromptTuningConfig(tokens=4)
    prompt = np.random.default_rng(1).standard_normal((4, model.config.embed_dim)).astype("float32")
    adapters = {"virtual_tokens": {"prompt": jnp.asarray(prompt)}}
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", model, adapters, config)
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "adapter").eval()
    expected = our_logits(apply_adapters(model, adapters, config))
    assert np.abs(expected - our_logits(model)).max() > 0.05
    bound = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(their_logits_after_prompt(theirs, 4), expected, atol=bound, rtol=0)


def their_logits_after_prompt(model, tokens) -> np.ndarray:
    """peft returns logits of virtual tokens too."""
    ids, mask = (torch.from_numpy(x).long() for x in inputs())
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits.numpy()[:, tokens:][inputs()[1] == 1]
