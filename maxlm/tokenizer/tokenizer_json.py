"""The content of tokenizer.json, with more pieces."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from maxlm.tokenizer.encoder import Additions, Algorithm


def json_algorithm(described: dict[str, Any]) -> Algorithm | None:
    """How a tokenizer splits texts; None: in a way that cannot be extended."""
    model = described["model"]
    if model["type"] == "Unigram":
        return "unigram"
    is_plain = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    return "bpe" if model["type"] == "BPE" and is_plain else None


def extend_tokenizer_json(
    described: dict[str, Any], additions: Additions, added: Mapping[str, int], *, first: int
) -> bytes:
    """The file of a tokenizer with more pieces, whose ids follow all others.

    Args:
      described: as `tokenizers` describes it.
      added: tokens whose ids follow the vocabulary, in their order: they become part of it, so that the new pieces do
        not take their ids.
      first: the id of the first new piece.
    """
    described = copy.deepcopy(described)
    model = described["model"]
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        existing = [score for _, score in vocabulary]
        # An added token is split off before scores are used.
        vocabulary += [[name, min(existing)] for name in added]
        vocabulary += [list(pair) for pair in zip(additions.pieces, additions.scores(existing))]
    else:
        vocabulary.update(added)
        vocabulary.update((name, id_) for id_, name in enumerate(additions.pieces, first))
        model["merges"] += [list(pair) for pair in additions.merges]
    return json.dumps(described, ensure_ascii=False, indent=2).encode()
