"""Files of every kind, valid and corrupt, wherever commands read them."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet as parquet
import yaml
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from odd_values import RECIPES, broken_text, changed
from one_command import build, cases, check, write

TEXT = "Once upon a time there was a language model that read every file it was given."

NAMES = ["a b", "é", "x[1]", "*", "-n", ".hidden", "a\nb", "{0}", "#", "x" * 200, "..", "a.tar", "nul\udcff"]
SUFFIXES = [
    ".txt",
    ".md",
    ".jsonl",
    ".json",
    ".parquet",
    ".gz",
    ".txt.gz",
    ".jsonl.zst",
    ".json.gz",
    ".JSONL",
    ".csv",
    "",
]


def parquet_bytes(table: pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def tables() -> list[bytes]:
    """Parquet files of every kind of column that an id or a text may have."""
    text = TEXT
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    ids = [
        far,
        pyarrow.array([2**62], pyarrow.duration("us")),
        pyarrow.array([1]),
        pyarrow.array([b"\xff"]),
        pyarrow.array([None]),
    ]
    ids += [
        pyarrow.array([[1]]),
        pyarrow.array([{"a": 1}]),
        pyarrow.array(["x"]).dictionary_encode(),
        pyarrow.array([2**60], pyarrow.timestamp("ns")),
    ]
    texts = [
        pyarrow.array([text], pyarrow.large_string()),
        pyarrow.array([text.encode()]),
        pyarrow.array([b"\xff"]),
        pyarrow.array([1.5]),
        pyarrow.array([None]),
    ]
    texts += [
        pyarrow.array([[text]]),
        pyarrow.array([text]).dictionary_encode(),
        far,
        pyarrow.array([], pyarrow.string()),
    ]
    found = [pyarrow.table({"id": column, "text": [text]}) for column in ids]
    found += [pyarrow.table({"text": column}) for column in texts]
    found += [
        pyarrow.table([pyarrow.array([text])] * 2, names=names)
        for names in (["text", "text"], ["id", "id"], ["", "text"], ["text", "id"])
    ]
    found += [pyarrow.table({})]
    return [parquet_bytes(table) for table in found]


lines = "".join(json.dumps({"id": str(number), "text": TEXT * number}) + "\n" for number in range(1, 4)).encode()
CONTENTS = [
    b"",
    b"\n",
    b"\xff\xfe",
    b"\0" * 100,
    lines,
    b"[" + lines.replace(b"\n", b",")[:-1] + b"]",
    TEXT.encode("utf-16"),
    *tables(),
]
CONTENTS += [
    gzip.compress(lines, mtime=0),
    gzip.compress(lines, mtime=0) * 2,
    zstandard.compress(lines),
    b"\x1f\x8b",
    b"PAR1PAR1",
    b"[" * 3000,
    b"9" * 5000,
]


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A file name and its content, valid or corrupt."""
    content = draw(st.sampled_from(CONTENTS))
    name = draw(st.sampled_from(["file", *NAMES])) + draw(st.sampled_from(SUFFIXES))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        content = draw(st.sampled_from([content[:at], content[:at] + draw(st.binary(max_size=4)) + content[at + 4 :]]))
    return name, content


@cases(130)
@given(
    files(),
    st.sampled_from(["exact", "glob", "show", "tokenizer", "decontaminate", "eval"]),
    st.sampled_from([None, "id"]),
)
def test_files(place, file, use, id_field):
    name, content = file
    folder = place / "files"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    try:
        path = write(folder / name, content)
    except OSError:
        return
    match use:
        case "exact" | "show" if "\udcff" not in name:
            build(place, path, id_field=id_field)
        case "exact" | "glob" | "show":
            build(place, folder / "*", id_field=id_field)
        case "tokenizer":
            config = {"kind": "tokenizer", "input": "words.txt", "output": str(place / "tokenizer"), "vocab_size": 300}
            write(place / "tokenizer.yaml", yaml.safe_dump(config).encode())
            check("tokenizer", "train", "tokenizer.yaml", f"input={json.dumps(str(path))}")
        case "decontaminate":
            overrides = [f"decontaminate.files={json.dumps([str(path)])}", f"output={place / 'built'}"]
            text = write(place / "text.jsonl", lines)
            check(
                "data",
                "build",
                "configs/data/embedded.yaml",
                "--stop-after",
                "documents",
                f"sources=[{{uri: {text}}}]",
                *overrides,
            )
        case "eval":
            check("eval", "model", "--data", path, "--no-baselines")


STAGES = {
    "manifest.json": json.dumps(
        {
            "stage": "data",
            "inputs": {"tokenizer": {"path": "x", "hash": "y"}},
            "config": {},
            "versions": {},
            "created": "",
            "metrics": {
                "tokenizer_fingerprint": "a",
                "row_length": 32,
                "vocab_size": 9,
                "splits": {"train": {"rows": 1, "documents": 1}},
            },
        }
    ),
    "config.yaml": RECIPES["configs/quickstart/pretrain.yaml"],
    "metrics.jsonl": '{"step": 1, "loss": 2.0, "time": 1.0}\n{"step": 2, "loss": 1.5, "valid": {"loss": 3.0}}\n',
    "documents/manifest.json": json.dumps(
        {
            "stage": "data/documents",
            "inputs": {},
            "config": {},
            "versions": {},
            "metrics": {"splits": {"train": {"characters": 9}}},
        }
    ),
    "rejects.jsonl": '{"id": "a", "source": "b", "reason": "c", "detail": "d", "text": "e"}\n',
    "chat_template.json": '{"begin": [], "roles": {}}',
    "summary.json": '{"checks": [], "seconds": {}}',
    "trials.jsonl": '{"id": "a"}\n',
    "checkpoints/3/metadata.json": "{}",
}
LOOKS = [
    ("data", "show", "stage"),
    ("data", "show", "stage", "--rows"),
    ("data", "show", "stage", "--rejects", "--json"),
    ("data", "at-step", 1, "--run", "stage"),
    ("data", "at-step", 1, "--data", "stage"),
    ("tokenizer", "show", "stage", "--text", "a"),
    ("report", "stage"),
    ("eval", "stage", "--no-baselines"),
    ("generate", "stage", "Hello"),
    ("export", "stage", "bundle", "--data", "stage"),
    ("preview", "configs/quickstart/pretrain.yaml", "objective.sources.0.path=stage"),
    ("tokenizer", "train", "configs/quickstart/tokenizer.yaml", "input=stage"),
]


@cases(100)
@given(
    st.sampled_from(sorted(STAGES)).flatmap(lambda name: st.tuples(st.just(name), stage_file(name))),
    st.sampled_from(LOOKS),
)
def test_corrupted_stage_folders(place, case, look):
    """A file in a stage's folder that was edited, or truncated by a full disk."""
    changed_name, content = case
    for name, text in STAGES.items():
        path = place / "stage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content if name == changed_name else text.encode())
    check(*look)


def stage_file(name: str) -> st.SearchStrategy[bytes]:
    broken = broken_text(STAGES[name])
    if not name.endswith(".json"):
        return broken
    return st.one_of(broken, changed(json.loads(STAGES[name])).map(lambda tree: json.dumps(tree).encode()))


def test_valid_files_are_accepted(place):
    for name, content in (
        (".jsonl.gz", gzip.compress(lines)),
        (".parquet", parquet_bytes(pyarrow.table({"text": [TEXT]}))),
    ):
        assert build(place, write(place / f"right{name}", content)) == 0
