"""Tokenizers of Hugging Face with given control tokens."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from maxlm.tokenizer import codec


@pytest.fixture
def make_tokenizer(tmp_path):
    """(control tokens, settings of tokenizer_config.json) -> a tokenizer of bytes, saved in a folder."""

    def make(*control_tokens, **settings):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={piece: id_ for id_, piece in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control_tokens])
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {key: value for key, value in settings.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return codec.Tokenizer.load(folder)

    return make
