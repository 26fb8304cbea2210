"""A tiny tokenizer trained on the spot, and a tiny decoder with random weights."""

import jax
import pytest
from model_section import uniform

from maxlm.config import ModelConfig, TokenizerConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import initialize
from maxlm.generate.model import LoadedModel
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.train import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. A model writes one token at a time, and then another one.\n" * 40


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return train_tokenizer(
        TokenizerConfig(kind="tokenizer", output=str(folder / "out"), input=str(folder / "text.txt"), vocab_size=330)
    )


def make_decoder(tokenizer, *, window: int) -> Decoder:
    """One layer sees all tokens before, the other one those of a window."""
    section = uniform(
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        mlp_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        window_pattern=(None, window),
    )
    config = ModelConfig(**section)
    execution = ExecutionConfig(max_length=128, activation_dtype="float32", matmul_dtype="float32")
    decoder = initialize(Decoder(config, execution), jax.random.key(0))
    # At initialization all tokens are nearly equally likely; larger embeddings separate them.
    decoder.embedding = decoder.embedding * 12
    return decoder


@pytest.fixture(scope="session")
def decoder(tokenizer):
    return make_decoder(tokenizer, window=12)


@pytest.fixture(scope="session")
def model(decoder, tokenizer):
    return LoadedModel(decoder, tokenizer, name="tiny")
