"""`maxlm generate` and `maxlm chat` on an int8 bundle."""

import argparse
import io
import json

import pytest

import maxlm
from maxlm.errors import CheckpointError, RequestError
from maxlm.generate import cli
from maxlm.generate.chat import Chat
from maxlm.interop.int8 import write_bundle
from maxlm.models.quantized import quantize_model


@pytest.fixture(scope="module")
def bundle(decoder, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    bundle = folder / "tiny-int8"
    bundle.mkdir()
    write_bundle(bundle, quantize_model(decoder), tokenizer, receipt={})
    return bundle


@pytest.fixture(scope="module")
def loaded(bundle):
    return maxlm.load(bundle)


def run(*argv):
    parser = argparse.ArgumentParser(prog="maxlm")
    cli.register(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in argv])
    return args.func(args)


def test_generate_prints_the_continuation(bundle, loaded, capsys):
    assert run("generate", bundle, "The quick", "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == loaded.generate("The quick", max_new_tokens=8)[0] + "\n"


def test_generate_json_output_is_reproducible_from_its_seed(bundle, capsys):
    command = ["generate", bundle, "The", "--temperature", 1, "--top-p", 0.9, "--max-new-tokens", 12, "--json"]
    run(*command)
    first = json.loads(capsys.readouterr().out)
    run(*command, "--seed", first["seed"])
    assert json.loads(capsys.readouterr().out) == first
    assert first["prompt"] == "The"
    assert first["finish_reason"] in ("length", "stop")
    assert first["new_tokens"] <= 12


def test_generate_reads_standard_input(bundle, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
    run("generate", bundle, "-", "--max-new-tokens", 4, "--json")
    assert json.loads(capsys.readouterr().out)["prompt"] == "The quick"


def test_generate_reports_errors(bundle, tmp_path):
    with pytest.raises(RequestError, match="the context holds 128"):
        run("generate", bundle, "The", "--max-new-tokens", 999)
    with pytest.raises(RequestError, match="top_p"):
        run("generate", bundle, "The", "--top-p", 7)
    with pytest.raises(CheckpointError, match="no such folder"):
        run("generate", tmp_path / "none", "The")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        run("generate", tmp_path, "The")


def converse(loaded, lines, capsys, **settings):
    """Run a chat with these input lines; return its output and final history."""
    given = iter(lines)

    def read_line(prompt):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    with loaded.engine(num_slots=2) as engine:
        chat = Chat(loaded, engine, temperature=0.0, max_new_tokens=6, **settings)
        assert chat.run(read_line) == 0
    return capsys.readouterr().out, chat.messages


def test_chat_sees_the_whole_conversation(loaded, capsys):
    printed, messages = converse(loaded, ["The fox", "", "And then?"], capsys, system="Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    for index in (2, 4):
        expected = loaded.generate(messages[:index], max_new_tokens=6)[0]
        assert messages[index]["content"] == expected
        assert expected in printed


def test_chat_reset_and_quit(loaded, capsys):
    printed, messages = converse(loaded, ["The fox", "/reset", "/huh", "/quit", "never read"], capsys)
    assert messages == []
    assert "conversation cleared" in printed
    assert "unknown command /huh" in printed


def test_chat_drops_a_question_that_does_not_fit(loaded, capsys):
    printed, messages = converse(loaded, ["fox " * 200, "The dog"], capsys)
    assert "the context holds 128" in printed
    assert next(message["content"] for message in messages) == "The dog"


def test_help_has_an_example(capsys):
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        assert f"example: maxlm {command}" in capsys.readouterr().out
