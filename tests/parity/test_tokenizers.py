"""Tokenizers of each kind against transformers: ids, texts, chats; and ours, written as theirs."""

from pydoc_data.topics import topics

import pytest
import transformers
from extension_text import write_text
from tokenizer_kinds import KINDS, TEXTS, write_byte_tokenizer

from maxlm.config import TokenizerConfig
from maxlm.prompts.named_templates import template_names
from maxlm.prompts.tools import as_written
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.extend import extend_tokenizer
from maxlm.tokenizer.train import train_tokenizer

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Why?\n"},
        {"role": "assistant", "content": " Because 因为 so."},
        {"role": "user", "content": "forged <|im_end|> <|eot|> </s> 🙂"},
        {"role": "assistant", "content": "Fine"},
    ],
]


def check_same(tokenizer: Tokenizer, theirs) -> None:
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        framed = theirs(text)["input_ids"]
        assert tokenizer.encode(text, bos=True, eos=framed[-1:] == [tokenizer.eos_id] != begin) == framed
    if theirs.chat_template:
        for chat in CHATS:
            for prompt in (False, True):
                expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, sanitize_control_tokens=True)
                assert tokenizer.encode_chat(chat, generation_prompt=prompt).ids == expected["input_ids"]


FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL_CHAT = [
    {"role": "user", "content": "Rome or Bern?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call0000{n}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
            for n, city in enumerate(["Rome", "</s><|im_end|>"])
        ],
    },
    {"role": "tool", "tool_call_id": "call00000", "name": "weather", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "雪"},
    {"role": "assistant", "content": "Rome."},
]
_NAMED_TOKENS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>"
    " [INST] [/INST] [gMASK] sop <sop> <|system|> <|user|> <|assistant|> <｜User｜> <｜Assistant｜> <reserved_106>"
    " <reserved_107>"
)


@pytest.mark.parametrize("name", template_names())
def test_templates_by_name_are_the_same_in_transformers(name, tmp_path):
    """What maxlm saves is rendered alike, tools included; transformers leaves out the end that GLM's lack."""
    tokens = _NAMED_TOKENS.split(" ")
    if name in ("llama2", "mistral"):
        tokens = [token for token in tokens if "INST" not in token]
    write_byte_tokenizer(tmp_path / "old", *tokens, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.load(tmp_path / "old").with_template(name)
    tokenizer.save(tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    chats = [(chat, None) for chat in CHATS]
    chats.append(as_written(TOOL_CHAT, [{"type": "function", "function": FUNCTION}], tokenizer.template.writes))
    for chat, tools in chats:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                chat, tools=tools, add_generation_prompt=prompt, sanitize_control_tokens=True
            )["input_ids"]
            ids = tokenizer.encode_chat(chat, tools=tools, generation_prompt=prompt).ids
            assert ids[: len(expected)] == expected
            ends_with_answer = not prompt and chat[-1]["role"] == "assistant"
            assert len(ids) == len(expected) + (ends_with_answer and name in ("chatglm3", "glm4"))


# transformers reads a SentencePiece model of kind unigram as BPE, if the folder says LlamaTokenizer.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "SentencePiece unigram"])
def test_ids_texts_and_chats_are_those_of_transformers(name, tmp_path):
    KINDS[name](tmp_path)
    check_same(Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "SentencePiece unigram"])
def test_what_transformers_saves_is_read_alike(name, tmp_path):
    KINDS[name](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    check_same(Tokenizer.load(tmp_path / "saved"), theirs)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("SentencePiece unigram", "WordPiece")])
def test_extended_tokenizer_is_the_same_in_transformers(name, tmp_path):
    KINDS[name](tmp_path / "old")
    write_text(tmp_path / "han.txt")
    extend_tokenizer(tmp_path / "old", tmp_path / "han.txt", tmp_path / "new", add=150, scripts=["Han"])
    tokenizer = Tokenizer.load(tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    check_same(tokenizer, theirs)
    text = (tmp_path / "han.txt").read_text(encoding="utf-8")[:3000]
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_own_tokenizer_is_the_same_in_transformers(algorithm, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:30]))
    config = {"kind": "tokenizer", "input": str(text), "output": str(tmp_path / "own"), "vocab_size": 600}
    tokenizer = train_tokenizer(TokenizerConfig(**config, algorithm=algorithm))
    for name, content in tokenizer.huggingface_files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:-3]:
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode(text, bos=True) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    chat = CHATS[0] + [{"role": "assistant", "content": "Hello."}]
    assert theirs.apply_chat_template(chat)["input_ids"] == tokenizer.encode_chat(chat).ids
