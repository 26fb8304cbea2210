"""Extended tokenizers: old ids, control tokens and texts without the script stay; new pieces are really used."""

import json

import pytest
from extension_text import write_text
from tokenizer_kinds import KINDS, TEXTS

from maxlm.cli import main
from maxlm.config import TokenizerConfig
from maxlm.errors import ConfigError, TokenizerError
from maxlm.runtime.manifest import manifest_chain
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.extend import extend_tokenizer
from maxlm.tokenizer.extension import check_extends, former_ids
from maxlm.tokenizer.scripts import runs_of
from maxlm.tokenizer.train import train_tokenizer

ADD = 150
OWN = ("bpe", "unigram")
CHAT = [{"role": "user", "content": "一二 hello"}, {"role": "assistant", "content": "Fine 一."}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "han.txt"
    write_text(path)
    return path


@pytest.fixture(scope="module", params=[*OWN, *(name for name in KINDS if name != "WordPiece"), "with added tokens"])
def extended(request, text, text_file, tmp_path_factory):
    """The folder of a tokenizer, and that of its extension."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer(request.param, folder / "old", text_file)
    found = extend_tokenizer(folder / "old", text, folder / "new", add=ADD, scripts=["Han"])
    return folder / "old", folder / "new", found


def make_tokenizer(name, folder, text_file):
    if name in OWN:
        config = {"kind": "tokenizer", "input": str(text_file), "output": str(folder)}
        train_tokenizer(TokenizerConfig(**config, vocab_size=600, algorithm=name))
        return
    KINDS["SentencePiece BPE" if name == "with added tokens" else name](folder)
    if name == "with added tokens":
        # Their ids follow those of tokenizer.model.
        (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 600, "<think>": 601}))


def load(folders):
    return Tokenizer.load(folders[0]), Tokenizer.load(folders[1])


def test_ids_and_texts_without_the_script_are_unchanged(extended):
    old, new = load(extended)
    check_extends(new, old)
    assert new.control_tokens == old.control_tokens
    assert (new.bos_id, new.eos_id, new.pad_id, new.unk_id) == (old.bos_id, old.eos_id, old.pad_id, old.unk_id)
    assert new.stop_ids == old.stop_ids
    without = [text for text in TEXTS if not runs_of("Han").search(text)]
    assert len(without) > 15
    assert new.encode_batch(without) == old.encode_batch(without)


def test_texts_with_the_script_take_fewer_tokens_and_round_trip(extended, text):
    old, new = load(extended)
    sample = text.read_text(encoding="utf-8")[-2000:]
    for each in [sample, *TEXTS, "一二三", " 一 ", "x一y，z。"]:
        before, after = old.encode(each), new.encode(each)
        # Those that lose unknown characters write them as one token.
        if old.decode(before) == each:
            assert new.decode(after) == each
            assert len(after) <= len(before)
    assert any(id_ >= old.vocab_size for id_ in new.encode(sample))
    if old.decode(old.encode(sample)) == sample:
        assert len(new.encode(sample)) < 0.5 * len(old.encode(sample))


def test_new_pieces_are_of_the_script_and_used(extended):
    old, new = load(extended)
    found, runs = extended[2], runs_of("Han")
    assert new.vocab_size == old.vocab_size + found.pieces_added
    assert ADD - 10 <= found.pieces_added <= ADD
    assert found.pieces_used >= 0.7 * found.pieces_added
    parts = 0
    for id_ in range(old.vocab_size, new.vocab_size):
        try:
            assert runs.fullmatch(new.token_bytes(id_).decode())
        except UnicodeDecodeError:
            parts += 1
    # Byte-level BPE merges the bytes of a character one by one.
    assert parts < 10
    assert found.english_before == found.english_after
    assert found.fingerprint == new.fingerprint != old.fingerprint


def test_chat_template_is_kept(extended):
    old, new = load(extended)
    try:
        expected = old.encode_chat(CHAT)
    except TokenizerError:
        # Unigram has no template.
        return
    got = new.encode_chat(CHAT)
    assert new.decode(got.ids, skip_control=False) == old.decode(expected.ids, skip_control=False)
    assert [id_ for id_ in got.ids if new.is_control(id_)] == [id_ for id_ in expected.ids if old.is_control(id_)]


def test_former_ids_are_those_of_the_text(extended):
    old, new = load(extended)
    former = former_ids(new, old)
    assert len(former) == new.vocab_size - old.vocab_size
    for id_, ids in enumerate(former, old.vocab_size):
        assert ids
        if old.unk_id not in ids:
            # Where texts are normalized, a space may come first.
            assert b"".join(map(old.token_bytes, ids)).removeprefix(b" ") == new.token_bytes(id_).removeprefix(b" ")


def test_own_tokenizer_is_the_same_as_files_of_hugging_face(extended, text, tmp_path):
    new = Tokenizer.load(extended[1])
    for name, content in new.huggingface_files().items():
        (tmp_path / name).write_bytes(content)
    for each in (text.read_text(encoding="utf-8")[:3000], "x一y，z。"):
        assert Tokenizer.load(tmp_path).encode(each) == new.encode(each)


def test_extending_again_counts_what_is_there(text, text_file, tmp_path):
    make_tokenizer("unigram", tmp_path / "old", text_file)
    extend_tokenizer(tmp_path / "old", text, tmp_path / "new", add=60, scripts=["Han"])
    found = extend_tokenizer(tmp_path / "new", text, tmp_path / "newer", add=60, scripts=["Han"])
    assert found.pieces_known >= 20
    check_extends(Tokenizer.load(tmp_path / "newer"), Tokenizer.load(tmp_path / "old"))
    # Fewer are found than are asked for.
    assert extend_tokenizer(tmp_path / "old", text, tmp_path / "new", add=5000, scripts=["Han"]).pieces_added < 2000


def test_other_languages_without_a_script(text, text_file, tmp_path):
    make_tokenizer("bpe", tmp_path / "old", text_file)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(text.read_text(encoding="utf-8") + "слово привет словами 123 " * 300, encoding="utf-8")
    found = extend_tokenizer(tmp_path / "old", mixed, tmp_path / "new", add=100)
    pieces = [Tokenizer.load(tmp_path / "new").token_text(600 + i) for i in range(found.pieces_added)]
    assert " слово" in pieces
    assert not any(character in "123\n" for piece in pieces for character in piece)


def test_scripts_include_their_marks_and_punctuation():
    assert runs_of("Han").findall("ab 你好，世界。x 々《書》カ Ａ１") == [" 你好，世界。", " 々《書》"]
    assert runs_of("devanagari").findall("x हिन्दी y") == [" हिन्दी"]
    assert runs_of("Hiragana", "Katakana").findall("ひカ漢") == ["ひカ"]
    with pytest.raises(TokenizerError, match="--script Hann: Unicode has no such script; examples are Han"):
        runs_of("Hann")


@pytest.mark.parametrize(
    ("kind", "script", "sentence"),
    [
        ("WordPiece", "Han", "only tokenizers of kind BPE and unigram can be extended"),
        ("bpe", "Thai", "the text has no characters of this script; give another text, or another --script"),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_sentence(kind, script, sentence, text, text_file, tmp_path):
    make_tokenizer(kind, tmp_path / "old", text_file)
    with pytest.raises(TokenizerError, match=sentence) as error:
        extend_tokenizer(tmp_path / "old", text, tmp_path / "new", add=10, scripts=[script])
    assert str(tmp_path / "old") in str(error.value)
    assert not (tmp_path / "new").exists()


def test_change_of_what_it_has_is_refused(extended, tmp_path):
    old, new = load(extended)
    with pytest.raises(TokenizerError, match=rf"has {old.vocab_size} tokens, fewer than the {new.vocab_size}"):
        check_extends(old, new)
    KINDS["byte-level BPE"](tmp_path)
    with pytest.raises(TokenizerError, match=r"is not an extension: the token \d+ is '.*', and must be '.*'"):
        check_extends(new.with_vocab_size(2000), Tokenizer.load(tmp_path).with_vocab_size(1000))


def test_command_line_and_manifest(text, text_file, tmp_path, capsys):
    make_tokenizer("bpe", tmp_path / "old", text_file)
    words = ["tokenizer", "extend", str(tmp_path / "old"), str(text), str(tmp_path / "new"), "--script", "han"]
    assert main([*words, "--add", "120"]) == 0
    printed = capsys.readouterr().out
    assert "720 tokens, of which 120 are new" in printed
    assert "held-out text: 0." in printed
    assert main([*words, "--add", "90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pieces_added"] == 90
    chain = manifest_chain(tmp_path / "new")
    assert [each["stage"] for each in chain] == ["tokenizer", "tokenizer"]
    assert chain[-1]["config"] == {"add": 90, "scripts": ["han"], "character_coverage": 0.9995, "seed": 0}
    assert chain[-1]["metrics"]["vocab_size"] == 690
    assert main([*words[:4], words[2], "--add", "9"]) == 2
    assert "is the tokenizer to extend; give a new folder" in capsys.readouterr().err


def test_folder_of_something_else_is_not_replaced(text, text_file, tmp_path):
    make_tokenizer("bpe", tmp_path / "old", text_file)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and was not written by maxlm"):
        extend_tokenizer(tmp_path / "old", text, tmp_path / "new", add=10)
