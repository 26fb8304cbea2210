"""Learn pieces to add to a vocabulary from text in a script that it splits into bytes.

For BPE, training continues where that of the tokenizer ended: its own tokens take the place of characters, so that all
its merges come first, and each new piece is a merge of two tokens that it really puts side by side. For unigram, the
pieces are those of a model of the new text.
"""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import sentencepiece
import tokenizers
from sentencepiece import SentencePieceTrainer

from maxlm.errors import TokenizerError
from maxlm.tokenizer.encoder import SPACE_MARK, Additions, Encoder

# As in SentencePiece.
_LONGEST_PIECE = 16
# Names of atoms for BPE's trainer: one character each, beyond those that have a meaning for it.
_FIRST_ATOM = 0x10000

# A token of whole characters, by its id, or a character that takes several tokens.
_Atom = int | str


def learn_pieces(
    encoder: Encoder, texts: Sequence[str], runs: re.Pattern[str], *, add: int, character_coverage: float
) -> Additions:
    """At most `add` pieces, most useful first.

    Args:
      runs: matches the parts of a text that may contain new pieces: see `runs_of`.
      character_coverage: share of the characters in them that get a piece of their own, the most frequent first.

    Raises:
      TokenizerError: the tokenizer is of a kind that cannot be extended, or there is nothing to learn.
    """
    if not any(runs.search(text) for text in texts):
        raise TokenizerError("the text has no characters of this script; give another text, or another --script")
    if encoder.algorithm == "unigram":
        return _learn_unigram(encoder, texts, runs, add, character_coverage)
    if encoder.algorithm is None:
        raise TokenizerError("only tokenizers of kind BPE and unigram can be extended")
    if not {bytes([byte]) for byte in range(0x80, 0xC0)} <= {*encoder.pieces}:
        raise TokenizerError("has no tokens for bytes, so it loses characters, which cannot be learned from their ids")
    return _BpeLearner(encoder, add).learn(texts, runs, character_coverage)


class _BpeLearner:
    """Collects pieces and merges, as the files of the tokenizer write them."""

    def __init__(self, encoder: Encoder, add: int):
        self._encoder, self._add = encoder, add
        self._known = {encoder.piece_name(id_) for id_ in range(encoder.vocab_size)}
        self._pieces: list[str] = []
        # A set in the order of insertion: the characters of one block begin with the same bytes.
        self._merges: dict[tuple[str, str], None] = {}
        self._num_known = 0
        self._texts = [_decoded(piece) for piece in encoder.pieces]
        # The tokens of each character that takes several.
        self._spellings: dict[str, Counter[tuple[int, ...]]] = {}

    def learn(self, texts: Sequence[str], runs: re.Pattern[str], character_coverage: float) -> Additions:
        sequences: Counter[tuple[_Atom, ...]] = Counter()
        for text in texts:
            for ids in self._encoder.encode_words(text):
                sequences.update(self._atoms_in_runs(ids, runs))
        names: dict[_Atom, str] = {
            atom: self._encoder.piece_name(atom) for atoms in sequences for atom in atoms if isinstance(atom, int)
        }
        names |= self._add_characters(sequences, character_coverage)
        self._add_merges(sequences, names)
        return Additions(tuple(self._pieces), tuple(self._merges), num_known=self._num_known)

    def _atoms_in_runs(self, ids: Sequence[int], runs: re.Pattern[str]) -> Iterator[tuple[_Atom, ...]]:
        """The atoms of a word, for each run, and for each part of one if a token crosses its bounds."""
        atoms = list(self._atoms(ids))
        whole = "".join(text for _, text in atoms)
        run_of = [0] * len(whole)
        for number, match in enumerate(runs.finditer(whole), 1):
            run_of[match.start() : match.end()] = [number] * len(match[0])
        start, places = 0, []
        for atom, text in atoms:
            inside = {*run_of[start : start + len(text)]}
            start += len(text)
            places.append((atom, inside.pop() if len(inside) == 1 and atom is not None else 0))
        for number, group in itertools.groupby(places, key=lambda place: place[1]):
            if number:
                yield tuple(atom for atom, _ in group if atom is not None)

    def _atoms(self, ids: Sequence[int]) -> Iterator[tuple[_Atom | None, str]]:
        """Tokens with whole characters, characters of several tokens, and None for several characters of these."""
        pending: list[int] = []
        for id_ in ids:
            text = self._texts[id_]
            if not pending and text:
                yield id_, text
                continue
            pending.append(id_)
            text = _decoded(b"".join(self._encoder.pieces[each] for each in pending))
            if text is None:
                continue
            if len(text) == 1:
                self._spellings.setdefault(text, Counter())[tuple(pending)] += 1
            yield (text if len(text) == 1 else None), text
            pending = []

    def _add_characters(self, sequences: Counter[tuple[_Atom, ...]], coverage: float) -> dict[_Atom, str]:
        """Add the most frequent characters; their names, by character."""
        counts: Counter[str] = Counter()
        num_characters = 0
        for atoms, count in sequences.items():
            num_characters += count * len(atoms)
            for atom in atoms:
                if isinstance(atom, str):
                    counts[atom] += count
        names: dict[_Atom, str] = {}
        for character in _most_frequent(counts, (1 - coverage) * num_characters):
            spelling = self._spelling(character)
            if len(self._pieces) + max(1, len(spelling) - 1) > self._add:
                break
            names[character] = self._add_character(spelling)
        return names

    def _spelling(self, character: str) -> tuple[str, ...]:
        """What a character's piece is merged from: tokens of its bytes, or itself if bytes are never merged."""
        [(ids, _)] = self._spellings[character].most_common(1)
        if any(self._encoder.is_byte(id_) for id_ in ids):
            return (character,)
        return tuple(self._encoder.piece_name(id_) for id_ in ids)

    def _add_character(self, spelling: tuple[str, ...]) -> str:
        name = spelling[0]
        if len(spelling) == 1:
            self._add_piece(name)
        for part in spelling[1:]:
            self._add_merge(name, part)
            name += part
        return name

    def _add_merges(self, sequences: Counter[tuple[_Atom, ...]], names: dict[_Atom, str]) -> None:
        """Add merges of atoms, most frequent first, as BPE's training finds them."""
        if (room := self._add - len(self._pieces)) <= 0:
            return
        characters = {
            atom: chr(_FIRST_ATOM + number) for number, atom in enumerate(sorted(names, key=lambda atom: names[atom]))
        }
        atoms = {character: names[atom] for atom, character in characters.items()}

        def parts() -> Iterator[str]:
            for sequence, count in sequences.items():
                # Characters without a piece are not merged.
                for is_named, group in itertools.groupby(sequence, key=names.__contains__):
                    if is_named:
                        yield from itertools.repeat("".join(characters[atom] for atom in group), count)

        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=len(atoms) + room, min_frequency=2, max_token_length=_LONGEST_PIECE, show_progress=False
        )
        trained = tokenizers.Tokenizer(tokenizers.models.BPE())
        trained.train_from_iterator(parts(), trainer)
        for pair in json.loads(trained.to_str())["model"]["merges"]:
            left, right = ("".join(atoms[character] for character in part) for part in pair)
            self._add_merge(left, right)

    def _add_merge(self, left: str, right: str) -> None:
        if (left, right) not in self._merges:
            self._merges[left, right] = None
            self._add_piece(left + right)

    def _add_piece(self, name: str) -> None:
        if name in self._known:
            self._num_known += 1
            return
        self._known.add(name)
        self._pieces.append(name)


def _decoded(data: bytes) -> str | None:
    """The text of UTF-8 bytes, unless they end or begin within a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _learn_unigram(
    encoder: Encoder, texts: Sequence[str], runs: re.Pattern[str], add: int, character_coverage: float
) -> Additions:
    known = {encoder.piece_name(id_) for id_ in range(encoder.vocab_size)}
    found = Counter(run for text in texts for run in runs.findall(encoder.normalize(text)))
    counts: Counter[str] = Counter()
    for run, count in found.items():
        for character in run:
            counts[character] += count
    new = Counter({each: count for each, count in counts.items() if each.replace(" ", SPACE_MARK) not in known})
    kept = _most_frequent(new, (1 - character_coverage) * counts.total())[:add]
    dropped = re.compile(f"[{re.escape(''.join(sorted({*new} - {*kept})))}]") if len(kept) < len(new) else None

    def parts() -> Iterator[str]:
        for run, count in found.items():
            for part in [run] if dropped is None else dropped.split(run):
                if part:
                    yield from itertools.repeat(part, count)

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=parts(),
            model_writer=model,
            model_type="unigram",
            # Known characters and three control tokens are in its vocabulary too.
            vocab_size=add + len(counts) - len(new) + 4,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(f"SentencePiece cannot train on the text: {error}") from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = (trained.id_to_piece(id_) for id_ in range(trained.vocab_size()))
    learned = [name for name in names if runs.fullmatch(name.replace(SPACE_MARK, " "))]
    pieces = [name for name in learned if name not in known]
    # The first ones are the most probable, but every character must be there.
    pieces = [name for name in pieces if name in kept] + [name for name in pieces if name not in kept]
    pieces = pieces[:add]
    scores = tuple(trained.get_score(trained.piece_to_id(name)) for name in pieces)
    return Additions(tuple(pieces), log_probabilities=scores, num_known=len(learned) - len({*learned} - known))


def _most_frequent(counts: Counter[str], uncovered: float) -> list[str]:
    """The characters that must have a piece so that at most `uncovered` occurrences have none, frequent ones first."""
    left, found = counts.total(), []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= uncovered:
            break
        left -= count
        found.append(character)
    return found
