import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from maxlm.config.data import SourceConfig
from maxlm.data.sources import read_source
from maxlm.errors import DataError


class Fables(tfds.core.GeneratorBasedBuilder):
    """Three short texts in two splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples("The fox.", "The grapes, naïve."),
            "test": self._generate_examples("The crow."),
        }

    def _generate_examples(self, *texts):
        for number, text in enumerate(texts):
            yield number, {"text": text, "number": number}


@pytest.fixture(scope="module")
def fables(tmp_path_factory) -> str:
    builder = Fables(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def read(uri, **changes):
    return list(read_source(SourceConfig(uri=uri, **changes)))


def test_tfds_is_read_without_tensorflow(fables):
    documents = read(f"tfds:{fables}")
    assert sorted(d.text for d in documents) == ["The fox.", "The grapes, naïve."]
    assert [d.text for d in read(f"tfds:{fables}:test")] == ["The crow."]
    assert documents == read(f"tfds:{fables}:train"[: -len(":train")])
    assert "tensorflow" not in sys.modules


def test_tfds_errors_are_one_clear_sentence(fables):
    for uri in (f"tfds:{fables}:validation", "tfds:there_is_no_such_dataset"):
        with pytest.raises(DataError) as error:
            read(uri)
        assert uri in str(error.value)
        assert "\n" not in str(error.value)


def test_field_without_text_is_named(fables):
    with pytest.raises(DataError, match="field 'number' is not a string"):
        read(f"tfds:{fables}", text_field="number")


def test_hugging_face_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package `datasets`; install it with: pip install 'maxlm\[hf\]'"):
        read("hf:owner/name:train")


def test_hugging_face_streams_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    documents = read(f"hf:{tmp_path / 'set'}")
    assert [(d.id, d.text) for d in documents] == [
        (f"hf:{tmp_path / 'set'}:{n}", t) for n, t in enumerate(("one", "two"))
    ]
    with pytest.raises(DataError, match="cannot be read"):
        read(f"hf:{tmp_path / 'set'}:absent")
