import argparse
import json
import re

import pytest

from maxlm.config import DataConfig, TokenizerConfig
from maxlm.data.build import build_data
from maxlm.errors import ConfigError, DataError, TokenizerError
from maxlm.runtime.manifest import manifest_chain, read_manifest
from maxlm.runtime.storage import locked, storage_path
from maxlm.tokenizer import cli
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer


def config(text_file, output, **changes) -> TokenizerConfig:
    return TokenizerConfig(
        **{"kind": "tokenizer", "input": str(text_file), "output": str(output), "vocab_size": 600} | changes
    )


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_training_is_deterministic(text_file, tmp_path, algorithm):
    first, second = (
        train_tokenizer(config(text_file, tmp_path / name, algorithm=algorithm)).fingerprint for name in "ab"
    )
    assert first == second


def test_manifest_records_the_inputs(text_file, tmp_path):
    tokenizer = train_tokenizer(config(text_file, tmp_path))
    manifest = read_manifest(tmp_path)
    files = {path.name for path in tmp_path.iterdir() if path.name != ".lock"}
    assert files == {"tokenizer.model", "chat_template.json", "manifest.json"}
    assert manifest["stage"] == "tokenizer"
    assert manifest["metrics"]["fingerprint"] == tokenizer.fingerprint
    assert manifest["metrics"]["vocab_size"] == tokenizer.vocab_size == 600
    assert manifest["metrics"]["trained_on_characters"] == len(text_file.read_text(encoding="utf-8"))
    text = text_file.read_text(encoding="utf-8")
    assert manifest["metrics"]["characters_per_token"] == pytest.approx(
        len(text) / len(tokenizer.encode(text)), rel=0.02
    )


def test_tokenizer_is_retrained_only_after_changes(text_file, tmp_path):
    train_tokenizer(config(text_file, tmp_path))
    model = tmp_path / "tokenizer.model"
    made = model.stat().st_mtime_ns
    train_tokenizer(config(text_file, tmp_path))
    assert model.stat().st_mtime_ns == made
    train_tokenizer(config(text_file, tmp_path, vocab_size=610))
    assert model.stat().st_mtime_ns > made


def test_folder_is_locked_by_one_process_at_a_time(text_file, tmp_path):
    with locked(storage_path(tmp_path), seconds=0), pytest.raises(DataError, match="another process writes there"):
        train_tokenizer(config(text_file, tmp_path))
    assert train_tokenizer(config(text_file, tmp_path)).vocab_size == 600


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_too_large_vocabulary_reports_the_maximum(text_file, tmp_path, algorithm):
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"set vocab_size to at most \d+") as error:
        train_tokenizer(config(short, tmp_path / "out", vocab_size=50_000, algorithm=algorithm))
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert not (tmp_path / "out").exists()
    assert (
        train_tokenizer(config(short, tmp_path / "out", vocab_size=largest, algorithm=algorithm)).vocab_size == largest
    )


def test_too_small_vocabulary_reports_the_minimum(text_file, tmp_path):
    with pytest.raises(TokenizerError, match=r"set vocab_size to at least \d+") as error:
        train_tokenizer(config(text_file, tmp_path, vocab_size=100))
    smallest = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert train_tokenizer(config(text_file, tmp_path, vocab_size=smallest)).vocab_size == smallest


def test_text_with_reserved_characters_is_still_used_for_training(tmp_path):
    path = tmp_path / "marks.txt"
    path.write_text("zebra ▁ zebra\0zebra ▅ zebra\tzebra\n" * 50, encoding="utf-8")
    tokenizer = train_tokenizer(config(path, tmp_path / "out", vocab_size=280))
    assert "zebra" in [tokenizer.token_text(id_).strip() for id_ in range(tokenizer.vocab_size)]


def test_max_characters_samples_evenly(text_file, tmp_path):
    train_tokenizer(config(text_file, tmp_path, max_characters=60_000))
    drawn = read_manifest(tmp_path)["metrics"]["trained_on_characters"]
    assert 20_000 <= drawn <= 100_000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no such file"), (b"", "has no text"), (b"ab\xff\xfe", r"is not UTF-8 text \(byte 3\)")],
)
def test_bad_input_is_reported_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        train_tokenizer(config(path, tmp_path / "out"))


def test_documents_to_tokenizer_to_rows(text_file, tmp_path):
    data = DataConfig(
        kind="data",
        output=str(tmp_path / "data"),
        tokenizer=str(tmp_path / "tokenizer"),
        sources=({"uri": str(text_file), "split_on_blank_lines": 2000},),
        workers=1,
    )
    build_data(data, stop_after="documents")
    tokenizer = train_tokenizer(config(tmp_path / "data", tmp_path / "tokenizer"))
    build_data(data)
    stages = [manifest["stage"] for manifest in manifest_chain(tmp_path / "data")]
    assert stages == ["data/documents", "tokenizer", "data"]
    assert read_manifest(tmp_path / "data")["metrics"]["tokenizer_fingerprint"] == tokenizer.fingerprint


# Command line


def call(capsys, *words) -> str:
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers())
    args = parser.parse_args(["tokenizer", *map(str, words)])
    assert args.func(args) == 0
    return capsys.readouterr().out


def test_train_and_show_on_the_command_line(text_file, tmp_path, capsys):
    path = tmp_path / "tokenizer.yaml"
    path.write_text(f"kind: tokenizer\ninput: {text_file}\noutput: {tmp_path / 'out'}\n")
    assert "600 tokens" in call(capsys, "train", path, "vocab_size=600")
    assert json.loads(call(capsys, "train", path, "vocab_size=600", "--json"))["stage"] == "tokenizer"
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.fingerprint in call(capsys, "show", tmp_path / "out")
    shown = json.loads(call(capsys, "show", tmp_path / "out", "--text", "a = 1\n", "--json"))
    assert shown["ids"] == tokenizer.encode("a = 1\n")
    assert "".join(shown["tokens"]) == "a = 1\n"
    assert "6 characters" in call(capsys, "show", tmp_path / "out", "--text", "a = 1\n")


def test_config_of_another_kind_is_rejected(tmp_path, capsys):
    path = tmp_path / "data.yaml"
    path.write_text("kind: data\n")
    with pytest.raises(ConfigError, match="needs kind: tokenizer"):
        call(capsys, "train", path)


def test_record_files_are_not_accepted_as_plain_text(tmp_path):
    for name in ("a.jsonl", "a.JSON", "a.parquet", "a.txt.gz"):
        (tmp_path / name).write_text('{"text": "words"}\n')
        config = TokenizerConfig(kind="tokenizer", input=str(tmp_path / name), output=str(tmp_path / "out"))
        with pytest.raises(DataError, match=r"is not plain text, .* `maxlm data build CONFIG --stop-after documents`"):
            train_tokenizer(config)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_spaces_survive_after_training_on_text_without_any(tmp_path, algorithm):
    (tmp_path / "text.txt").write_text("\n".join(f"{number}+{number}={2 * number}" for number in range(500)))
    settings = {"input": str(tmp_path / "text.txt"), "output": str(tmp_path / "out"), "vocab_size": 279}
    tokenizer = train_tokenizer(TokenizerConfig(kind="tokenizer", algorithm=algorithm, **settings))
    text = " 3 + 4\u2581= 7 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" ")) == 1
