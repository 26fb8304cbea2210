"""A small tokenizer, and builds of small texts."""

from pydoc_data.topics import topics

import pytest

from maxlm.config import DataConfig, TokenizerConfig
from maxlm.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    """A BPE tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    train_tokenizer(TokenizerConfig(kind="tokenizer", input=str(text), output=str(folder / "out"), vocab_size=400))
    return str(folder / "out")


@pytest.fixture
def data_config(tmp_path, tokenizer_folder):
    """Creates a build configuration in the test's folder."""

    def make(*uris: str, **changes) -> DataConfig:
        defaults = {
            "kind": "data",
            "output": str(tmp_path / "data"),
            "tokenizer": tokenizer_folder,
            "sources": [{"uri": uri} for uri in uris],
            "row_length": 32,
            "workers": 1,
        }
        return DataConfig(**defaults | changes)

    return make
