"""SentencePiece models as `tokenizers` computes them: read, and written as a tokenizer of Hugging Face."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from maxlm.errors import TokenizerError
from maxlm.prompts.chat_template import ChatTemplate
from maxlm.prompts.jinja_template import to_jinja
from maxlm.tokenizer.encoder import SPACE_MARK, Additions, Algorithm

_UNIGRAM, _BPE = 1, 2
_NORMAL = 1
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def read_sentencepiece(model: bytes) -> Any:
    """The parsed model: a `ModelProto`.

    Raises:
      TokenizerError: it is not one.
    """
    parsed: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        parsed.ParseFromString(model)
    except DecodeError:
        raise TokenizerError("tokenizer.model is not a SentencePiece model") from None
    if not parsed.pieces:
        raise TokenizerError("tokenizer.model is not a SentencePiece model")
    return parsed


def sentencepiece_algorithm(parsed: Any) -> Algorithm | None:
    """How a parsed model splits texts; None: in another way than bpe and unigram."""
    kinds: dict[int, Algorithm] = {_UNIGRAM: "unigram", _BPE: "bpe"}
    return kinds.get(parsed.trainer_spec.model_type)


def extend_sentencepiece(model: bytes, additions: Additions, added: Mapping[str, bool]) -> bytes:
    """A model with more pieces, whose ids follow all others.

    Args:
      added: tokens whose ids follow those of the model, in their order, and whether they are special: they become
        pieces of it, so that the new pieces do not take their ids.
    """
    parsed = read_sentencepiece(model)
    existing = [piece.score for piece in parsed.pieces if piece.type == _NORMAL]
    for name, is_special in added.items():
        parsed.pieces.add(piece=name, score=0.0, type=_CONTROL if is_special else _USER_DEFINED)
    for name, score in zip(additions.pieces, additions.scores(existing)):
        parsed.pieces.add(piece=name, score=score)
    parsed.trainer_spec.vocab_size = len(parsed.pieces)
    return parsed.SerializeToString()


def to_tokenizers(model: bytes, *, prefix: Literal["first", "always"] = "first") -> tokenizers.Tokenizer:
    """A tokenizer that gives the same ids as a SentencePiece model.

    Args:
      prefix: where a space is put in front, if the model does: at the beginning of a text, or after each control token
        too.

    Raises:
      TokenizerError: it is not a SentencePiece model of kind bpe or unigram.
    """
    parsed = read_sentencepiece(model)
    pieces = [(piece.piece, piece.score) for piece in parsed.pieces]
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    if trainer.model_type == _UNIGRAM:
        computed: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == _BPE:
        computed = models.BPE(
            vocab={piece: id_ for id_, (piece, _) in enumerate(pieces)},
            merges=list(_merges(parsed)),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise TokenizerError("tokenizer.model is neither of kind bpe nor unigram; train it as one of these")
    converted = tokenizers.Tokenizer(computed)
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    # `Metaspace` takes a text for continued whose first character is not where it was before normalization.
    if normalizer.add_dummy_prefix and prefix == "first" and not steps:
        converted.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="first", split=False)
    elif normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    converted.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else [])
    )
    converted.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in parsed.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return converted


def huggingface_files(model: bytes, template: ChatTemplate) -> dict[str, bytes]:
    """A tokenizer of `maxlm tokenizer train` as files of Hugging Face, by name.

    The ids of a text are the same, but for texts with U+2581, which they take for a space, or with names of control
    tokens, which they recognize.
    """
    parsed = read_sentencepiece(model)
    trainer = parsed.trainer_spec
    converted = to_tokenizers(model)
    converted.add_special_tokens([AddedToken(trainer.unk_piece, normalized=False)])
    bos = trainer.bos_piece
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, trainer.bos_id)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": trainer.eos_piece,
        "pad_token": trainer.pad_piece,
        "unk_token": trainer.unk_piece,
        "clean_up_tokenization_spaces": False,
        "chat_template": to_jinja(template),
    }
    return {
        "tokenizer.json": converted.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _merges(parsed: Any) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that make another, best first.

    SentencePiece takes the leftmost of two pairs that make the same piece. Here the pair with the longer left part is
    taken, which is the leftmost one in a run of equal characters.
    """
    scores = {
        piece.piece: piece.score
        for piece in parsed.pieces
        if piece.type not in (_UNKNOWN, _CONTROL, _USER_DEFINED) and piece.piece
    }
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in reversed(range(1, len(piece))):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]
