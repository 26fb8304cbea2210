"""A tiny model as an int8 bundle on disk, and a server of it."""

import httpx
import jax
import pytest
from model_section import uniform
from running_server import serve

import maxlm
from maxlm.config import ModelConfig, TokenizerConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import initialize
from maxlm.interop.int8 import write_bundle
from maxlm.models.decoder import Decoder
from maxlm.models.quantized import quantize_model
from maxlm.tokenizer.train import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. A model writes one token at a time, and then another one.\n" * 40
MAX_LENGTH = 128


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer(
        TokenizerConfig(
            kind="tokenizer", output=str(folder / "tokenizer"), input=str(folder / "text.txt"), vocab_size=330
        )
    )
    section = uniform(
        vocab_size=tokenizer.vocab_size, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
    )
    config = ModelConfig(**section)
    execution = ExecutionConfig(max_length=MAX_LENGTH, activation_dtype="float32", matmul_dtype="float32")
    # A draw whose answers are not cut short and begin with whole characters.
    decoder = initialize(Decoder(config, execution), jax.random.key(8))
    # At initialization all tokens are nearly equally likely; larger embeddings separate them.
    decoder.embedding = decoder.embedding * 12
    bundle = folder / "tiny-int8"
    bundle.mkdir()
    write_bundle(
        bundle,
        quantize_model(decoder),
        tokenizer,
        receipt={},
    )
    return bundle


@pytest.fixture(scope="session")
def model(bundle):
    return maxlm.load(bundle)


@pytest.fixture(scope="session")
def served(model):
    with serve(model) as (url, engine):
        yield url, engine


@pytest.fixture(scope="session")
def url(served):
    return served[0]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
