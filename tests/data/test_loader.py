import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as parquet
import pytest
from corpora import make_text, write_jsonl

from maxlm.config import DataConfig
from maxlm.data.build import build_data
from maxlm.data.loader import open_in_order, open_mixture
from maxlm.errors import DataError, TokenizerError
from maxlm.tokenizer.codec import Tokenizer

KEYS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")


def build(folder, tokenizer_folder, *, num_documents, first=0, row_length=16) -> str:
    rows = [{"text": make_text(first + n)} for n in range(num_documents)]
    source = write_jsonl(folder / f"texts{first}-{row_length}.jsonl", rows)
    output = str(folder / f"data{first}-{row_length}")
    build_data(
        DataConfig(
            kind="data", output=output, sources=({"uri": source},), tokenizer=tokenizer_folder, row_length=row_length,
            valid_fraction=0.2, workers=1,
        )
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return (
        build(folder, tokenizer_folder, num_documents=12),
        build(folder, tokenizer_folder, num_documents=5, first=1000),
    )


def mixture(folders, seed=0, batch_size=8, weights=(3.0, 1.0)):
    return open_mixture(list(zip(folders, weights)), seed=seed, batch_size=batch_size)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def row_keys(batch) -> list[bytes]:
    return [tokens.tobytes() for tokens in batch["tokens"]]


def all_row_keys(folder) -> list[bytes]:
    rows = open_in_order([folder], split="train", batch_size=1)
    return [key for step in range(rows.num_steps) for key in row_keys(rows.batch(step))]


def test_batch_has_the_documented_shapes_and_dtypes(folders):
    batch = mixture(folders).batch(0)
    assert tuple(batch) == KEYS
    for name, array in batch.items():
        assert array.shape == (8, 16)
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
    assert batch["loss_weights"].any()


# The rows of a step are a pure function of seed and step


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_concatenated_shards_are_the_whole_batch(folders, num_shards):
    rows = mixture(folders)
    for step in (0, 3, 1000):
        shards = [rows.batch(step, shard=shard, num_shards=num_shards) for shard in range(num_shards)]
        assert equal({name: np.concatenate([s[name] for s in shards]) for name in KEYS}, rows.batch(step))


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_threads_do_not_change_the_order(folders, num_threads):
    rows = mixture(folders)
    batches = list(itertools.islice(rows.iterate(num_threads=num_threads, prefetch=3), 20))
    assert all(equal(batch, rows.batch(step)) for step, batch in enumerate(batches))


def test_resuming_at_a_step_reads_the_same_rows_as_an_uninterrupted_run(folders):
    unbroken = list(itertools.islice(mixture(folders).iterate(shard=1, num_shards=2), 30))
    resumed = itertools.islice(mixture(folders).iterate(17, shard=1, num_shards=2), 13)
    assert all(equal(*pair) for pair in zip(unbroken[17:], resumed, strict=True))


def test_the_seed_changes_the_order(folders):
    assert not equal(mixture(folders, seed=0).batch(0), mixture(folders, seed=1).batch(0))


# Rows read


def test_each_epoch_visits_each_row_once_in_a_new_order(folders):
    rows = open_mixture([(folders[0], 1.0)], seed=0, batch_size=1)
    everything = Counter(all_row_keys(folders[0]))
    size = everything.total()
    epochs = [[row_keys(rows.batch(step))[0] for step in range(start, start + size)] for start in (0, size, 5 * size)]
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_weights_are_shares_of_rows_far_beyond_the_shortest_source(folders):
    rows = mixture(folders, weights=(3.0, 1.0))
    first = {*all_row_keys(folders[0])}
    keys = [key for step in range(500, 600) for key in row_keys(rows.batch(step))]
    assert np.mean([key in first for key in keys]) == pytest.approx(0.75, abs=0.01)


def test_equal_folders_are_shuffled_differently(folders):
    rows = open_mixture([(folders[0], 1.0), (folders[0], 1.0)], seed=0, batch_size=2)
    assert sum(len({*row_keys(rows.batch(step))}) == 2 for step in range(20)) > 10


def test_step_lists_the_documents_it_reads(folders, tokenizer_folder):
    rows = mixture(folders)
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = {}
    for folder in folders:
        table = parquet.read_table(f"{folder}/documents/train.parquet")
        for ordinal, (id_, text) in enumerate(zip(table["id"].to_pylist(), table["text"].to_pylist())):
            texts[folder, ordinal, id_] = text
    for step in range(10):
        batch = rows.batch(step)
        named = [texts[d.folder, d.ordinal, d.id] for d in rows.documents(step)]
        assert len(named) == len({*named})
        read = set()
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                # A row may begin or end inside of a character's bytes; the text between must be in a document.
                part = tokenizer.decode(tokens[segments == segment].tolist()).strip("\ufffd")
                holders = [text for text in named if part in text]
                assert holders
                read.update(holders if len(holders) == 1 else [])
        assert read <= {*named}


# In order


def test_in_order_reads_every_row_once_and_pads_the_last_batch(folders):
    one_by_one = open_in_order(folders, batch_size=1)
    single = [one_by_one.batch(step) for step in range(one_by_one.num_steps)]
    rows = open_in_order(folders, batch_size=4)
    batches = list(rows.iterate())
    assert len(batches) == rows.num_steps == -(-len(single) // 4)
    for name in KEYS:
        whole = np.concatenate([batch[name] for batch in batches])
        assert np.array_equal(whole[: len(single)], np.concatenate([batch[name] for batch in single]))
    padding = np.concatenate([batch["loss_weights"] + batch["segment_ids"] for batch in batches])[len(single) :]
    assert len(padding) == -len(single) % 4
    assert not padding.any()
    assert rows.documents(rows.num_steps - 1)


def test_in_order_rows_support_shards_and_resuming(folders):
    rows = open_in_order(folders, batch_size=4)
    shards = [list(rows.iterate(1, shard=shard, num_shards=2)) for shard in range(2)]
    for step, pair in enumerate(zip(*shards, strict=True), start=1):
        assert equal({name: np.concatenate([part[name] for part in pair]) for name in KEYS}, rows.batch(step))
    with pytest.raises(DataError, match=f"step {rows.num_steps} is outside of the data's {rows.num_steps} steps"):
        rows.batch(rows.num_steps)


# Errors


def test_incompatible_folders_are_rejected(folders, tmp_path, tokenizer_folder):
    fingerprint = Tokenizer.load(tokenizer_folder).fingerprint
    fits = {"seed": 0, "batch_size": 4, "expected_fingerprint": fingerprint, "expected_row_length": 16}
    sources = [(folders[0], 1.0)]
    open_mixture(sources, **fits)
    with pytest.raises(TokenizerError, match=r"its rows were made with the tokenizer .*, but ffff is needed"):
        open_mixture(sources, **fits | {"expected_fingerprint": "ffff"})
    with pytest.raises(DataError, match="its rows have 16 tokens, but 32 are needed"):
        open_mixture(sources, **fits | {"expected_row_length": 32})
    longer = build(tmp_path, tokenizer_folder, num_documents=4, row_length=24)
    with pytest.raises(DataError, match="its rows have 24 tokens, but 16 are needed"):
        open_mixture([*sources, (longer, 1.0)], seed=0, batch_size=4)
    with pytest.raises(DataError, match="has no manifest"):
        open_mixture([(tmp_path / "nothing", 1.0)], **fits)
    with pytest.raises(DataError, match="is a folder of the stage 'tokenizer'"):
        open_mixture([(tokenizer_folder, 1.0)], **fits)
    with pytest.raises(DataError, match="no data folder"):
        open_mixture([], **fits)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "packed/train.array_record").unlink(), "train.array_record: cannot be read"),
        (lambda folder: _cut(folder / "packed/train.array_record"), "train.array_record: cannot be read"),
        (lambda folder: (folder / "documents/train.parquet").unlink(), "train.parquet: cannot be read"),
        (lambda folder: _cut(folder / "documents/train.parquet"), "train.parquet: cannot be read"),
        (lambda folder: _edit(folder, rows=1), r"has \d+ rows, but its manifest says 1;"),
        (lambda folder: _edit(folder, documents=1), r"has \d+ documents, but its manifest says 1;"),
        (lambda folder: _edit(folder, vocab_size=3), "its first row is of another build, or corrupt"),
    ],
)
def test_first_and_last_row_are_checked_when_a_split_is_opened(folders, tmp_path, damage, sentence):
    copy = tmp_path / "data"
    shutil.copytree(folders[0], copy)
    damage(copy)
    with pytest.raises(DataError, match=f"{sentence}.* run `maxlm data build` again"):
        open_mixture([(copy, 1.0)], seed=0, batch_size=4)


def test_a_data_folder_may_have_any_name(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": make_text(n)} for n in range(6)])
    folder = str(tmp_path / "a*b[0:1]\\\n#?%: é" / "train.array_record[0:1]")
    config = {"kind": "data", "sources": ({"uri": source},), "tokenizer": tokenizer_folder, "row_length": 16}
    build_data(DataConfig(output=folder, valid_fraction=0.2, workers=1, **config))
    assert open_mixture([(folder, 1.0)], seed=0, batch_size=4).documents(0)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in values.items():
        (manifest["metrics"] if name == "vocab_size" else manifest["metrics"]["splits"]["train"])[name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("shard", "num_shards", "sentence"),
    [
        (0, 3, r"batch_size \(8\) must be a multiple"),
        (2, 2, "shard 2 is not among 2"),
        (-1, 2, "shard -1 is not among"),
    ],
)
def test_shards_that_do_not_divide_a_batch_are_rejected(folders, shard, num_shards, sentence):
    with pytest.raises(DataError, match=sentence):
        mixture(folders).batch(0, shard=shard, num_shards=num_shards)
    with pytest.raises(DataError, match=sentence):
        next(mixture(folders).iterate(shard=shard, num_shards=num_shards))
