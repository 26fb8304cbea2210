"""Tokenizers of Hugging Face with given control tokens."""

import pytest
from tokenizer_kinds import write_byte_tokenizer

from maxlm.tokenizer.codec import Tokenizer


@pytest.fixture
def make_tokenizer(tmp_path):
    """(control tokens, settings of tokenizer_config.json) -> a tokenizer of bytes, saved in a folder."""

    def make(*control_tokens, **settings):
        write_byte_tokenizer(tmp_path / "tokenizer", *control_tokens, **settings)
        return Tokenizer.load(tmp_path / "tokenizer")

    return make
