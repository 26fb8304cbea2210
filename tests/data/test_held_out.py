"""Held-out rows of a validation: some of each source, spread evenly, the same ones each time."""

import itertools

import numpy as np
import pyarrow.parquet as parquet
import pytest
from corpora import make_text, write_jsonl

from maxlm.config import DataConfig
from maxlm.data.build import build_data
from maxlm.data.held_out import open_held_out
from maxlm.data.sample import even_sample, spread_order
from maxlm.tokenizer.codec import Tokenizer


@pytest.mark.parametrize("count", [0, 1, 2, 37, 1000])
def test_every_prefix_of_the_order_is_spread_evenly(count):
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for taken in (8, 64, 512):
        parts = np.histogram(order[:taken], bins=8, range=(0, max(count, 1)))[0]
        assert parts.max() - parts.min() <= 3


def test_sample_covers_each_group_and_grows_monotonically():
    groups = [np.arange(1000), np.arange(1000, 1002), np.arange(1001, 1501)]
    limits = [1, 2, 3, 10, 150, 151, 1500, 1501, 2000]
    samples = [even_sample(groups, limit) for limit in limits]
    assert [len(sample) for sample in samples] == [min(limit, 1501) for limit in limits]
    for smaller, larger in itertools.pairwise(samples):
        assert {*smaller} <= {*larger}
        assert (np.diff(larger) > 0).all()
    assert all(np.isin(group, samples[2]).any() for group in groups), "three places, three groups"
    first, second, third = (np.isin(group, samples[4]).sum() for group in groups)
    assert (first, third) == (pytest.approx(100, abs=2), pytest.approx(50, abs=2))
    assert second >= 1
    assert len(even_sample([], 4)) == len(even_sample([np.arange(0)], 4)) == 0


def build(folder, tokenizer_folder, name, **files) -> str:
    """A folder with most documents held out; each file is a source with the given number of documents."""
    number, uris = 0, []
    for file, num_documents in files.items():
        texts = [{"text": make_text(number + n)} for n in range(num_documents)]
        uris.append(write_jsonl(folder / f"{name}-{file}.jsonl", texts))
        number += 1000
    output, sources = str(folder / name), [{"uri": uri} for uri in uris]
    settings = {"tokenizer": tokenizer_folder, "row_length": 16, "valid_fraction": 0.6, "workers": 1}
    build_data(DataConfig(kind="data", output=output, sources=sources, **settings))
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("held_out")
    return {
        "large": build(folder, tokenizer_folder, "large", texts=40),
        "small": build(folder, tokenizer_folder, "small", texts=3),
        "three": build(folder, tokenizer_folder, "three", first=20, second=3, third=10),
    }


def rows_of(held_out) -> dict[bytes, np.ndarray]:
    """Source names of each row read, by its tokens."""
    found = {}
    for step in range(held_out.num_steps):
        batch = held_out.batch(step)
        for tokens, segments, ids in zip(batch["tokens"], batch["segment_ids"], batch["source_ids"]):
            if segments.any():
                found[tokens.tobytes()] = np.array(held_out.sources)[ids[segments > 0]]
    return found


def test_folder_order_and_shards_do_not_change_the_sample(folders):
    paths = [folders["large"], folders["small"], folders["large"]]
    one, other = (open_held_out(p, batch_size=4, num_batches=2) for p in (paths, paths[::-1]))
    assert sorted(one.sources) == sorted(other.sources) == ["large", "small"]
    assert one.num_steps == 2
    for step in range(2):
        left, right = one.batch(step), other.batch(step)
        shards = [one.batch(step, shard=shard, num_shards=2) for shard in range(2)]
        for name in left:
            np.testing.assert_array_equal(left[name], np.concatenate([shard[name] for shard in shards]))
            if name != "source_ids":
                np.testing.assert_array_equal(left[name], right[name])
        assert (np.array(one.sources)[left["source_ids"]] == np.array(other.sources)[right["source_ids"]])[
            left["segment_ids"] > 0
        ].all()
    sources = {name for names in rows_of(one).values() for name in names}
    assert sources == {"large", "small"}
    more = open_held_out(paths, batch_size=4, num_batches=5)
    assert {*rows_of(one)} < {*rows_of(more)}


def test_each_token_has_the_source_of_its_document(folders, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    table = parquet.read_table(f"{folders['three']}/documents/valid.parquet")
    texts = {f"three-{name}.jsonl": "" for name in ("first", "second", "third")}
    for source, text in zip(table["source"].to_pylist(), table["text"].to_pylist()):
        texts[source.rpartition("/")[2]] += f"{text} "
    everything = open_held_out([folders["three"]], batch_size=4, num_batches=1000)
    assert everything.sources == list(texts)
    for batch in map(everything.batch, range(everything.num_steps)):
        for tokens, segments, ids in zip(batch["tokens"], batch["segment_ids"], batch["source_ids"]):
            for segment in range(1, segments.max() + 1):
                [source] = {*ids[segments == segment]}
                piece = tokenizer.decode(tokens[segments == segment].tolist()).strip("\ufffd ")
                assert piece in texts[everything.sources[source]]
    few = open_held_out([folders["three"]], batch_size=3, num_batches=1)
    assert {name for names in rows_of(few).values() for name in names} == {*texts}
    together = open_held_out([folders["three"], folders["small"]], batch_size=4, num_batches=1)
    assert together.sources == [*(f"three:three-{name}.jsonl" for name in ("first", "second", "third")), "small"]
