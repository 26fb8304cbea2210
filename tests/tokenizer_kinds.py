"""Small tokenizers of each kind, as folders of Hugging Face, trained on the help topics of Python."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "", " ", "  ", "Hello world", " leading", "trailing ", "two  spaces   three", "don't WE'LL I'm",
    "def f(x):\n    return x ** 2  # square\n\n\n\tif x:\r\n", "天地玄黃，宇宙洪荒。", "mixed 中文 words文字",
    "👩‍👩‍👧 emoji 🙂🇩🇪", "e\u0301 combining café", "12345 3.14159", "\x00\x07 control \x7f\u200b", "a" * 37,
    " " * 17 + "x" + " " * 8, "مرحبا שלום", "ﬁ ligature ①", "\n\n\n", "x\n \n  y", "İstanbul naïve ŉ", "▁ mark ▁▁",
    "<s> text </s><|im_end|> <|eot|>[SEP] after", "<think>x</think>",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|role|>{{ message.role }}\n\n{{ message.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
_LINES = "\n\n".join(topics[name] for name in sorted(topics)[:25]).splitlines(keepends=True)


def _write(folder: Path, tokenizer: Tokenizer, **config) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_byte_tokenizer(folder: Path, *control_tokens: str, **config) -> None:
    """A tokenizer of bytes with these control tokens."""
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control_tokens])
    _write(folder, tokenizer, **config)


def _byte_level(folder: Path) -> None:
    """Like Qwen: a pattern that splits text, no bos token, a token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    added = {str(tokenizer.get_vocab_size()): {"content": "<think>", "special": False, "normalized": False}}
    _write(
        folder,
        tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        added_tokens_decoder=added,
    )


def _byte_level_with_bos(folder: Path) -> None:
    """Like Llama 3: a post-processor that adds a bos token, several stop tokens in the generation config."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|eot|>", "<|end|>", "<|role|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    _write(folder, tokenizer, bos_token="<|begin|>", eos_token={"__type": "AddedToken", "content": "<|end|>"})
    (folder / "chat_template.jinja").write_text(HEADERS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))


def _word_piece(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    _write(folder, tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def _unigram(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    _write(folder, tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def _sentencepiece(folder: Path, **settings) -> None:
    """Like Llama 2: only tokenizer.model and its settings."""
    folder.mkdir(exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in _LINES if line.strip()),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "chat_template": INSTRUCTIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece_bpe(folder: Path) -> None:
    _sentencepiece(
        folder,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )


def _sentencepiece_unigram(folder: Path) -> None:
    """Like T5: NFKC, single spaces."""
    _sentencepiece(folder, model_type="unigram")


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level BPE": _byte_level,
    "byte-level BPE with bos": _byte_level_with_bos,
    "WordPiece": _word_piece,
    "Unigram": _unigram,
    "SentencePiece BPE": _sentencepiece_bpe,
    "SentencePiece unigram": _sentencepiece_unigram,
}
