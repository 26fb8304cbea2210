"""`maxlm eval` and `maxlm report` on runs made by the real commands."""

import argparse
import json

import pytest
from model_section import uniform

from maxlm.config import DataConfig, TokenizerConfig, TrainConfig
from maxlm.data.build import build_data
from maxlm.errors import CheckFailed, CheckpointError, DataError
from maxlm.eval import cli as eval_cli
from maxlm.eval.inputs import read_held_out_by_source
from maxlm.eval.likelihood import bits_per_byte
from maxlm.generate.model import load
from maxlm.report import cli as report_cli
from maxlm.tokenizer.train import train_tokenizer
from maxlm.train.run import train


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, sentences):
    """A folder with data, a tokenizer and a run of two steps, a checkpoint at each."""
    folder = tmp_path_factory.mktemp("pipeline")
    texts = [f"{number}. {sentence} {sentence[::-1]}" for number, sentence in enumerate(sentences)]
    for name, part in {"text": texts[:100], "few": texts[100:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = DataConfig(
        kind="data",
        output=str(folder / "data"),
        sources=[{"uri": str(folder / name)} for name in ("text.jsonl", "few.jsonl")],
        clean={"min_characters": 5, "min_letter_fraction": 0},
        deduplicate={"near_threshold": None},
        valid_fraction=0.3,
        tokenizer=str(folder / "tokenizer"),
        row_length=32,
        workers=1,
    )
    build_data(data, stop_after="documents")
    train_tokenizer(TokenizerConfig(kind="tokenizer", output=data.tokenizer, input=data.output, vocab_size=330))
    build_data(data)
    train(
        TrainConfig(
            kind="train",
            output=str(folder / "run"),
            objective={"kind": "pretrain", "sources": [{"path": data.output}]},
            model=uniform(num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8),
            execution={"max_length": 32},
            mesh={"fsdp": 1},
            steps=2,
            batch_size=4,
            row_length=32,
            log_every=1,
            eval_batches=1,
            checkpoint={"every": 1, "keep": 2},
        )
    )
    return folder


@pytest.fixture
def run(capsys):
    """Run a command line; returns its exit code and standard output."""

    def call(*words) -> tuple[int, str]:
        parser = argparse.ArgumentParser(prog="maxlm")
        subparsers = parser.add_subparsers(required=True)
        for commands in (eval_cli, report_cli):
            commands.register(subparsers)
        args = parser.parse_args([str(word) for word in words])
        capsys.readouterr()
        code = args.func(args)
        return code, capsys.readouterr().out

    return call


def test_run_is_evaluated_on_its_own_held_out_documents(pipeline, run):
    code, out = run("eval", pipeline / "run", "--json")
    assert code == 0
    text = json.loads(out)["text"]
    held_out = read_texts(pipeline / "data" / "documents" / "valid.parquet")
    assert text["documents"] == len(held_out)
    assert text["bytes"] == sum(len(t.encode()) for t in held_out)
    expected = bits_per_byte(load(pipeline / "run"), held_out).bits_per_byte
    assert text["bits_per_byte"] == expected.to_dict()
    assert text["bits_per_byte"]["low"] < text["bits_per_byte"]["value"] < text["bits_per_byte"]["high"]
    assert text["baselines"]["valid_bytes"] == text["bytes"]
    assert set(text["baselines"]) >= {"unigram", "bigram", "xz", "xz_after_training"}


def read_texts(path) -> list[str]:
    import pyarrow.parquet as parquet

    return parquet.read_table(path).column("text").to_pylist()


def test_two_checkpoints_are_compared_on_text_and_tasks(pipeline, run, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text(
        "".join(json.dumps({"prompt": f"the {i}", "answer": "stone", "kind": f"k{i % 2}"}) + "\n" for i in range(4))
    )
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"prompt": "the", "choices": [" river", " 橋"], "answer": 0}) + "\n")
    output = tmp_path / "out" / "result.json"
    words = (
        "--data",
        pipeline / "data",
        "--task",
        task,
        "--task",
        choices,
        "--compare",
        pipeline / "run" / "checkpoints" / "1",
    )
    code, out = run("eval", pipeline / "run", *words, "--max-new-tokens", 3, "--no-baselines", "--output", output)
    assert code == 0
    for text in ("bits per byte", "difference", "needs two or more", "4 examples", "k0", "wrong"):
        assert text in out, text
    result = json.loads(output.read_text())
    text = result["text"]
    difference = text["compare"]["bits_per_byte"]["value"] - text["bits_per_byte"]["value"]
    assert text["difference"]["value"] == pytest.approx(difference)
    assert text["baselines"] is None
    assert [len(task["examples"]) for task in result["tasks"]] == [4, 1]
    assert result["tasks"][1]["examples"][0]["output"] in (" river", " 橋")
    assert {"prompt", "answer", "output", "correct", "compare_output"} == set(result["tasks"][0]["examples"][0])


def test_custom_text_file(pipeline, run, tmp_path):
    (tmp_path / "a.txt").write_text("the river carries a stone under the bridge " * 9)
    code, out = run("eval", pipeline / "run", "--data", tmp_path / "a.txt", "--json")
    text = json.loads(out)["text"]
    assert code == 0
    assert text["documents"] == 1
    assert text["bits_per_byte"]["low"] is None
    # The baselines count the training text found through the model's manifests.
    assert text["baselines"]["train_bytes"] > text["bytes"]


def test_max_documents_samples_evenly(pipeline, run):
    code, out = run("eval", pipeline / "run", "--json", "--no-baselines", "--max-documents", 5)
    assert code == 0
    text = json.loads(out)["text"]
    texts, sources = read_held_out_by_source(pipeline / "data", limit=5)
    assert text["documents"] == len(texts) == 5
    everything, _ = read_held_out_by_source(pipeline / "data")
    assert {*texts} < {*read_held_out_by_source(pipeline / "data", limit=9)[0]} < {*everything}
    # Per-source results, each over some of the five, add up to the total.
    assert text["by_source"].keys() == {*sources} == {"text.jsonl", "few.jsonl"}
    sizes = [len(document.encode()) for document in texts]
    bits = sum(text["by_source"][source]["value"] * size for source, size in zip(sources, sizes)) / sum(sizes)
    assert bits == pytest.approx(text["bits_per_byte"]["value"], rel=1e-9)


def test_bounds_decide_the_exit_code(pipeline, run):
    words = ("eval", pipeline / "run", "--no-baselines", "--max-documents", 5)
    code, out = run(*words, "--max-bits-per-byte", 99)
    assert code == 0
    assert "text.jsonl" in out
    assert "few.jsonl" in out
    with pytest.raises(CheckFailed, match=r"bits per byte exceed 0\.5") as error:
        run(*words, "--max-bits-per-byte", 0.5)
    assert error.value.exit_code == 1
    code, out = run(*words, "--max-bits-per-byte", 0.5, "--json")
    assert code == 1
    assert "exceed 0.5" in json.loads(out)["failed"][0]


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("run-9",), CheckpointError, "no such folder"),
        (("run", "--compare", "run-9"), CheckpointError, "no such folder"),
        (("data", "--task", "none.jsonl"), DataError, "no such file"),
        (("run", "--data", "none.txt"), DataError, "no such file"),
        (("run", "--data", "tokenizer"), DataError, "is not a folder of `maxlm data build`"),
        (("run", "--output", "data"), DataError, "is a folder"),
    ],
)
def test_mistakes_raise_one_sentence_errors(pipeline, run, words, kind, message):
    words = [word if word.startswith("--") else str(pipeline / word) for word in words]
    with pytest.raises(kind, match=message) as error:
        run("eval", *words)
    assert error.value.exit_code == 2


def test_model_without_known_training_data(pipeline, run, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="--data"):
        run("eval", tmp_path / "model")


def test_report_of_a_run(pipeline, run):
    code, out = run("report", pipeline / "run", "--json")
    assert code == 0
    assert json.loads(out)["report"] == str(pipeline / "run" / "report.html")
    page = (pipeline / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("data/documents", "tokenizer", "train/pretrain", "Bits per byte", "same hash"):
        assert text in page, text


def test_model_of_hugging_face_is_evaluated_as_its_import(huggingface_folder, imported_run, run, tmp_path):
    text, task = tmp_path / "text.txt", tmp_path / "task.jsonl"
    text.write_text("The statement is a simple expression.\n\nA class has methods.")
    task.write_text(json.dumps({"prompt": "the", "choices": [" river", " stone"], "answer": 0}) + "\n")
    words = ("--data", text, "--task", task, "--compare", imported_run, "--no-baselines", "--json")
    code, out = run("eval", huggingface_folder, *words)
    assert code == 0
    result = json.loads(out)
    assert result["text"]["bits_per_byte"]["value"] > 0
    assert result["text"]["difference"]["value"] == 0
    [example] = result["tasks"][0]["examples"]
    assert example["output"] == example["compare_output"]
