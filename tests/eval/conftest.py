"""A model small enough for every test: a tokenizer trained on a few sentences, and a decoder with random weights."""

import jax
import pytest
from model_section import uniform

from maxlm.config import ModelConfig, TokenizerConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import initialize
from maxlm.generate.model import LoadedModel
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.train import train_tokenizer

WORDS = ["the", "a", "river", "stone", "carries", "under", "and", "water", "light", "éclair", "橋", "falls", "12"]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Different sentences of 3 to 40 words."""
    return [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(3 + i % 38)) + "." for i in range(120)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    config = TokenizerConfig(
        kind="tokenizer", output=str(folder / "out"), input=str(folder / "text.txt"), vocab_size=320
    )
    return train_tokenizer(config)


def make_model(tokenizer, *, seed: int, **changes) -> LoadedModel:
    settings = {
        "vocab_size": tokenizer.vocab_size,
        "embed_dim": 32,
        "mlp_dim": 48,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    config = ModelConfig(**uniform(**{**settings, **changes}))
    execution = ExecutionConfig(max_length=48, activation_dtype="float32", matmul_dtype="float32")
    # Random weights of this size predict almost uniformly; larger ones make positions distinguishable.
    decoder = jax.tree.map(lambda leaf: leaf * 3, initialize(Decoder(config, execution), jax.random.key(seed)))
    return LoadedModel(decoder, tokenizer, name=f"model-{seed}")


@pytest.fixture(scope="session")
def model(tokenizer) -> LoadedModel:
    return make_model(tokenizer, seed=0)


@pytest.fixture(scope="session")
def other_model(tokenizer) -> LoadedModel:
    return make_model(tokenizer, seed=1)
