"""What an extended tokenizer shares with the one that it was made from: all of its ids."""

from maxlm.errors import TokenizerError
from maxlm.tokenizer.codec import Tokenizer


def check_extends(new: Tokenizer, old: Tokenizer) -> None:
    """Raise TokenizerError, naming the first token that differs, unless each id of `old` is the same token in `new`."""
    if new.vocab_size < old.vocab_size:
        raise TokenizerError(
            f"has {new.vocab_size} tokens, fewer than the {old.vocab_size} of the other, which it must all have"
        )
    for id_ in range(old.vocab_size):
        before, after = ((each.token_text(id_), each.token_bytes(id_), each.is_control(id_)) for each in (old, new))
        if before != after:
            raise TokenizerError(f"is not an extension: the token {id_} is {after[0]!r}, and must be {before[0]!r}")
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        if getattr(old, name) != getattr(new, name):
            raise TokenizerError(
                f"is not an extension: its {name} is {getattr(new, name)}, and must be {getattr(old, name)}"
            )


def former_ids(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """The ids of `old` for the text of each token that only `new` has; none for control tokens."""
    bytes_of = {old.token_bytes(id_): id_ for id_ in range(old.vocab_size) if len(old.token_bytes(id_)) == 1}
    found = []
    for id_ in range(old.vocab_size, new.vocab_size):
        data = new.token_bytes(id_)
        try:
            found.append(old.encode_within(data.decode()) if data else [])
        except UnicodeDecodeError:
            # A part of a character.
            found.append([bytes_of[bytes([byte])] for byte in data])
    return found
