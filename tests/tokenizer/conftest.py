"""Small tokenizers, trained on the help topics of every Python installation."""

from pydoc_data.topics import topics

import pytest

from maxlm.config import TokenizerConfig
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)[:30]), encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request, text_file, tmp_path_factory) -> Tokenizer:
    output = tmp_path_factory.mktemp(request.param)
    return train_tokenizer(
        TokenizerConfig(
            kind="tokenizer", input=str(text_file), output=str(output), vocab_size=600, algorithm=request.param
        )
    )
