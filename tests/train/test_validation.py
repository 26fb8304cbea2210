"""Validation of pretraining: values by source that add up to the mean, for any order and number of processes."""

import math

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

from maxlm.config import DataConfig
from maxlm.core.parameters import initialize
from maxlm.core.sharding import RowShard, make_mesh
from maxlm.core.term import Term
from maxlm.data.build import build_data
from maxlm.models.decoder import Decoder
from maxlm.objectives.packed_rows import PackedRowsData
from maxlm.objectives.validation import values_by_source
from maxlm.report.curves import Run, view_run
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.metrics import MetricsLog
from maxlm.train.objective import RunContext
from maxlm.train.setup import resolve_model


@pytest.fixture(scope="module")
def digits(tmp_path_factory, tiny_tokenizer_folder) -> str:
    """A few rows of text that differs from that of the other folder."""
    folder = tmp_path_factory.mktemp("digits")
    lines = [" ".join(str(7919 * (n + k) % 10007) for k in range(12)) for n in range(4)]
    (folder / "digits.txt").write_text("\n".join(lines), encoding="utf-8")
    clean = {"min_letter_fraction": 0.0}
    source = {"uri": str(folder / "digits.txt"), "document_per_line": True}
    config = {"kind": "data", "output": str(folder / "digits"), "tokenizer": tiny_tokenizer_folder, "row_length": 32}
    build_data(DataConfig(**config, sources=[source], clean=clean, valid_fraction=0.5, workers=1))
    return config["output"]


def test_values_by_source_do_not_depend_on_order_or_processes(
    tmp_path, tiny_data_folder, digits, tiny_tokenizer_folder
):
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)

    def objective(*paths):
        sources = {"kind": "pretrain", "sources": [{"path": path} for path in paths]}
        config = tiny_config(tmp_path / "run", "", objective=sources, batch_size=4, eval_batches=3)
        config = resolve_model(config, tokenizer)
        return PackedRowsData(RunContext(config, tokenizer, make_mesh(config.mesh), lambda: None))

    def part_of_one(*paths, index=0, count=1):
        part = objective(*paths)
        vars(part._context)["rows"] = RowShard(index, count)
        vars(part)["_evaluator"] = one._evaluator  # already compiled
        return part

    one = objective(tiny_data_folder, digits)
    mesh = one._context.mesh
    with jax.set_mesh(mesh):
        model = initialize(Decoder(one._context.config.model, one._context.config.execution), jax.random.key(0), mesh)
        values = one.validate(model)
        assert values.keys() == {"loss", "perplexity", "bits_per_byte", "bits_per_byte/out", "bits_per_byte/digits"}
        assert part_of_one(digits, tiny_data_folder).validate(model) == values
        shares = one._valid_bytes / one._valid_bytes.sum()
        assert min(shares) > 0
        by_source = [values["bits_per_byte/out"], values["bits_per_byte/digits"]]
        assert values["bits_per_byte"] == pytest.approx(np.dot(shares, by_source), rel=1e-12)

        parts = []
        for index in range(2):
            part = part_of_one(tiny_data_folder, digits, index=index, count=2)
            np.testing.assert_array_equal(part._valid_bytes, one._valid_bytes)
            parts.append(part._evaluator.sums(model, part._valid_batches))
        both = jax.tree.map(lambda a, b: a + b, *parts)
        assert values_by_source(both, one._held_out.sources, one._valid_bytes) == pytest.approx(values, rel=1e-6)


def test_values_do_not_depend_on_the_order_of_sources():
    terms = [Term(0.1, 3.0), Term(1e6, 1e6), Term(-1e-9, 7.0)]
    sizes = np.array([3, 10, 0])
    values = [
        values_by_source({str(n): terms[k] for n, k in enumerate(order)}, [f"s{k}" for k in order], sizes[order])
        for order in ([0, 1, 2], [2, 1, 0])
    ]
    assert values[0] == values[1]
    assert values[0]["bits_per_byte/s0"] == pytest.approx(0.1 / math.log(2) / 3)
    assert "bits_per_byte/s2" not in values[0], "none of its targets is text"
    alone = values_by_source({"0": terms[0]}, ["s0"], sizes[:1])
    assert alone.keys() == {"loss", "perplexity", "bits_per_byte"}


def test_values_by_source_are_abbreviated_in_progress_line(tmp_path, capsys):
    values = {"loss": 2.0, "bits_per_byte": 1.5, **{f"bits_per_byte/s{n}": float(n) for n in range(8)}}
    with MetricsLog(tmp_path, start_step=0, total_steps=4) as log:
        log.valid(4, values)
    output = capsys.readouterr().err
    assert (
        "loss 2.0000  bits_per_byte 1.5000 (s0 0.0000, s1 1.0000, s2 2.0000, s3 3.0000, s4 4.0000, s5 5.0000, 2 more)"
        in output
    )
    records = [{"step": 4, **{f"valid_{name}": value for name, value in values.items()}}]
    view = view_run(Run("run", records, {}))
    assert ("s7", "bits per byte", "7") in view.by_source.rows
    assert len(view.curves) == 2, "no chart for each source"
