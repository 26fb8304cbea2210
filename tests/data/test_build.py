import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pyarrow.parquet as parquet
import pytest
from corpora import make_text, read_jsonl, write_jsonl

from maxlm.config import TokenizerConfig, dump_yaml
from maxlm.data.build import build_data
from maxlm.data.datasets import local_data_files
from maxlm.data.loader import open_in_order
from maxlm.data.rows import Packer
from maxlm.data.show import read_rows
from maxlm.errors import DataError, TokenizerError
from maxlm.runtime.manifest import manifest_chain, read_manifest
from maxlm.runtime.storage import locked, storage_path
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer


def read_documents(output, split) -> list[dict]:
    return parquet.read_table(output / "documents" / f"{split}.parquet").to_pylist()


def contents(output) -> dict[str, bytes]:
    """Every file of a build except the manifests, which contain times."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture
def texts(tmp_path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": make_text(n), "id": f"doc{n}"} for n in range(60)])


# Outputs


def test_every_record_is_kept_or_rejected_with_a_reason(tmp_path, data_config):
    texts = [make_text(n, 120) for n in range(40)]
    copy = texts[0].split()
    copy[7] = "otherwise"
    exam = make_text(99, 30)
    rows = [{"text": text} for text in texts] + [
        {"text": texts[3] + "\r\n"},
        {"text": " ".join(copy)},
        {"text": f"{make_text(50, 40)} {exam} {make_text(51, 40)}"},
        {"text": "short"},
        {"text": "12345 67890 " * 20},
        {"text": "same line of words\n" * 30},
        {"text": " \n"},
        {"body": "x"},
    ]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    with path.open("a") as file:
        file.write("broken\n")
    config = data_config(str(path), decontaminate={"files": [write_jsonl(tmp_path / "exam.jsonl", [{"q": exam}])]})
    metrics = build_data(config)["metrics"]

    assert metrics["rejected"] == {
        "contaminated": 1, "empty": 1, "exact_duplicate": 1, "few_letters": 1, "near_duplicate": 1, "no_json": 1,
        "no_text": 1, "repeated_lines": 1, "too_short": 1,
    }  # fmt: skip
    assert metrics["records_in"] == 49 == metrics["documents"] + sum(metrics["rejected"].values())
    rejects = read_jsonl(tmp_path / "data" / "rejects.jsonl")
    assert [set(reject) for reject in rejects] == [{"id", "source", "reason", "detail", "text"}] * 9
    by_reason = {reject["reason"]: reject for reject in rejects}
    assert by_reason["exact_duplicate"]["detail"] == "the same text as a.jsonl:4"
    assert "are shared with a.jsonl:1" in by_reason["near_duplicate"]["detail"]
    assert by_reason["near_duplicate"]["text"] == " ".join(copy)
    assert by_reason["no_json"]["id"] == "a.jsonl:49"
    kept = read_documents(tmp_path / "data", "train") + read_documents(tmp_path / "data", "valid")
    assert sorted(document["text"] for document in kept) == sorted(texts)


def test_rows_contain_the_documents_and_the_manifest_counts_them(tmp_path, texts, data_config, tokenizer_folder):
    build_data(data_config(texts))
    output = tmp_path / "data"
    tokenizer = Tokenizer.load(tokenizer_folder)
    metrics = read_manifest(output)["metrics"]
    for split in ("train", "valid"):
        documents = read_documents(output, split)
        rows = open_in_order([output], split=split, batch_size=1)
        stream = []
        for step in range(rows.num_steps):
            batch = rows.batch(step)
            stream += batch["tokens"][batch["segment_ids"] > 0].tolist()
        expected = [i for d in documents for i in tokenizer.encode(d["text"], bos=True, eos=True)]
        assert stream in (expected, expected[:-1])
        assert metrics["splits"][split].pop("hash")
        assert metrics["splits"][split] == {
            "documents": len(documents),
            "characters": sum(len(d["text"]) for d in documents),
            "bytes": sum(len(d["text"].encode()) for d in documents),
            "tokens": len(expected),
            "rows": rows.num_steps,
        }
    assert metrics["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert metrics["row_length"] == 32
    assert [m["stage"] for m in manifest_chain(output)] == ["data/documents", "tokenizer", "data"]
    assert list(read_manifest(output / "documents")["inputs"]) == [texts]


def test_documents_have_id_source_and_licence(tmp_path, texts, data_config):
    build_data(
        data_config(
            sources=[{"uri": texts, "id_field": "id", "licence": "CC0-1.0"}, {"uri": "python:stdlib", "limit": 20}]
        ),
        stop_after="documents",
    )
    documents = read_documents(tmp_path / "data", "train") + read_documents(tmp_path / "data", "valid")
    first = next(d for d in documents if d["id"] == "doc0")
    assert (first["source"], first["licence"], first["text"]) == (texts, "CC0-1.0", make_text(0))
    assert {d["licence"] for d in documents if d["source"] == "python:stdlib"} == {"PSF-2.0"}
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_workers_do_not_change_the_result(tmp_path, texts, data_config):
    for workers in (1, 2):
        build_data(data_config(texts, workers=workers, output=str(tmp_path / f"{workers}")))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_build_into_its_input_folder_is_reproducible(tmp_path, data_config):
    write_jsonl(tmp_path / "raw.jsonl", [{"text": make_text(n)} for n in range(30)] + [{"text": "short"}])
    config = data_config(f"{tmp_path}/**/*.jsonl", output=str(tmp_path / "out"))
    first = build_data(config, stop_after="documents")["metrics"]
    (tmp_path / "out" / "documents.tmp").mkdir()
    write_jsonl(tmp_path / "out" / "documents.tmp" / "rejects.jsonl", [{"text": make_text(99)}])
    (tmp_path / "out" / "documents" / "manifest.json").unlink()
    second = build_data(config, stop_after="documents")["metrics"]
    for name in ("records_in", "documents", "rejected", "splits"):
        assert first[name] == second[name]
    assert first["records_in"] == 31


# Splits


def test_split_depends_only_on_id_and_seed(tmp_path, data_config):
    rows = [{"text": make_text(n), "id": f"doc{n}"} for n in range(200)]

    def valid_ids(rows, seed=0):
        path = write_jsonl(tmp_path / "some.jsonl", rows)
        source = {"uri": path, "id_field": "id"}
        build_data(data_config(sources=[source], valid_fraction=0.3, seed=seed), stop_after="documents")
        return {d["id"] for d in read_documents(tmp_path / "data", "valid")}

    valid = valid_ids(rows)
    assert 40 <= len(valid) <= 80
    assert valid_ids(rows[::-1]) == valid
    assert valid_ids(rows[:100]) == {name for name in valid if int(name[3:]) < 100}
    assert valid_ids(rows, seed=1) != valid


def test_valid_has_no_near_duplicates_of_train(tmp_path, data_config):
    rows = []
    for n in range(60):
        words = make_text(n, 100).split()
        for variant in range(3):
            words[10 * variant] = f"variant{variant}"
            rows.append({"text": " ".join(words)})
    build_data(data_config(write_jsonl(tmp_path / "a.jsonl", rows), valid_fraction=0.5), stop_after="documents")
    shingles = {}
    for split in ("train", "valid"):
        texts = [d["text"].split() for d in read_documents(tmp_path / "data", split)]
        shingles[split] = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in texts]
    assert min(map(len, shingles.values())) > 10
    for first, second in product(shingles["train"], shingles["valid"]):
        assert len(first & second) / len(first | second) < 0.8


def test_few_documents_still_leave_one_held_out(tmp_path, data_config):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(n)} for n in range(4)])
    metrics = build_data(data_config(path, valid_fraction=0.001))["metrics"]
    assert [metrics["splits"][split]["documents"] for split in ("train", "valid")] == [3, 1]


def test_valid_fraction_may_be_zero(tmp_path, texts, data_config):
    metrics = build_data(data_config(texts, valid_fraction=0.0))["metrics"]
    assert metrics["splits"]["valid"] == {"documents": 0, "characters": 0, "bytes": 0, "tokens": 0, "rows": 0}
    with pytest.raises(DataError, match="has no rows of the split 'valid'"):
        open_in_order([tmp_path / "data"], batch_size=1)


# Rebuilding


def made_at(output) -> dict[str, int]:
    names = ("documents/train.parquet", "packed/train.array_record")
    return {name.split("/")[0]: (output / name).stat().st_mtime_ns for name in names}


def test_only_changed_outputs_are_rebuilt(tmp_path, texts, data_config, tokenizer_folder, capsys):
    output = tmp_path / "data"
    first = build_data(data_config(texts))
    before = made_at(output)
    assert build_data(data_config(texts, workers=2)) == first
    assert made_at(output) == before
    assert "is up to date" in capsys.readouterr().err

    other = tmp_path / "tokenizer"
    train_tokenizer(
        TokenizerConfig(kind="tokenizer", input=str(output), output=str(other), vocab_size=300, algorithm="unigram")
    )
    build_data(data_config(texts, tokenizer=str(other)))
    after = made_at(output)
    assert after["documents"] == before["documents"]
    assert after["packed"] > before["packed"]
    assert read_manifest(output)["metrics"]["tokenizer_fingerprint"] == Tokenizer.load(other).fingerprint

    with open(texts, "a") as file:
        file.write(json.dumps({"text": make_text(1000)}) + "\n")
    assert build_data(data_config(texts, tokenizer=str(other)))["metrics"]["records_in"] == 61
    assert made_at(output)["documents"] > after["documents"]


def test_tokenizer_retrained_on_the_same_text_keeps_the_rows(tmp_path, texts, data_config, tokenizer_folder):
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, copy)
    build_data(data_config(texts, tokenizer=str(copy)))
    before = made_at(tmp_path / "data")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"created": "later"}))
    build_data(data_config(texts, tokenizer=str(copy)))
    assert made_at(tmp_path / "data") == before


def test_killed_build_is_incomplete_and_can_be_rerun(tmp_path, data_config):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(n, 300)} for n in range(1000)])
    config = data_config(path)
    (tmp_path / "data.yaml").write_text(dump_yaml(config))
    code = (
        "import sys; from maxlm.config import load_config; from maxlm.data.build import build_data\n"
        "build_data(load_config(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data.yaml")])
    while not (tmp_path / "data" / "documents.tmp" / "rejects.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "data").rglob("manifest.json"))
    with pytest.raises(DataError, match="has not finished"):
        open_in_order([tmp_path / "data"], batch_size=1)
    assert build_data(config)["metrics"]["documents"] == 1000
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        ".lock",
        "documents",
        "manifest.json",
        "packed",
        "rejects.jsonl",
    ]


def test_build_that_fails_while_packing_keeps_only_its_documents(tmp_path, texts, data_config, monkeypatch):
    build_data(data_config(texts))
    with monkeypatch.context() as patch:
        patch.setattr(Packer, "finish", lambda packer: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            build_data(data_config(texts, row_length=16))
    assert not (tmp_path / "data" / "manifest.json").exists()
    read_manifest(tmp_path / "data" / "documents")
    assert build_data(data_config(texts, row_length=16))["metrics"]["row_length"] == 16


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"tokenizer": "/nowhere"}, TokenizerError, "train a tokenizer there with `maxlm tokenizer train`"),
        ({"clean": {"min_characters": 10**6}}, DataError, "no document is left"),
        ({"decontaminate": {"files": ["/nowhere.jsonl"]}}, DataError, "decontaminate.files: /nowhere.jsonl"),
    ],
)
def test_build_errors_are_one_clear_sentence(texts, data_config, changes, error, sentence):
    with pytest.raises(error) as caught:
        build_data(data_config(texts, **changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_single_document_cannot_be_split(tmp_path, data_config):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(0)}])
    with pytest.raises(DataError, match=r"none of the 1 documents fell into the .* split .*split_on_blank_lines"):
        build_data(data_config(path))


def test_concurrent_build_and_retrained_tokenizer_are_reported(tmp_path, texts, data_config, tokenizer_folder):
    output = tmp_path / "data"
    copy = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    config = data_config(texts, tokenizer=str(copy))
    rows_hash = build_data(config)["metrics"]["splits"]["train"]["hash"]
    with locked(storage_path(output), seconds=0), pytest.raises(DataError, match="another process builds there"):
        build_data(config)
    shutil.rmtree(output)
    assert build_data(config)["metrics"]["splits"]["train"]["hash"] == rows_hash
    manifest = read_manifest(output)
    manifest["metrics"]["tokenizer_fingerprint"] = "0" * 32
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        TokenizerError, match=r"tokenizer: is not the tokenizer \([0-9a-f]{12}\) that the rows of .* were"
    ):
        next(read_rows(output, "train"))


@pytest.mark.parametrize("catalogue", ["hf", "tfds"])
def test_files_of_a_local_dataset_are_its_inputs(tmp_path, catalogue):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "a.parquet").touch()
    assert local_data_files(f"{catalogue}:{tmp_path / 'set'}:train") == [tmp_path / "set" / "train" / "a.parquet"]
    assert local_data_files(f"{catalogue}:{tmp_path / 'set'}") == [tmp_path / "set" / "train" / "a.parquet"]
    assert local_data_files(f"{catalogue}:imdb") == local_data_files("python:stdlib") == []
