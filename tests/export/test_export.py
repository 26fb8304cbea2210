"""`maxlm export --format int8`: what it writes, what it measures, and what it refuses."""

import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from maxlm.cli import main
from maxlm.config.train import LoraConfig
from maxlm.core.batch import Batch
from maxlm.core.manifest import manifest_chain, read_manifest
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.data.loader import open_in_order
from maxlm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from maxlm.export.int8 import ReceiptOutOfBounds, check_receipt, export_int8
from maxlm.export.receipt import Receipt
from maxlm.generate.model import load
from maxlm.models.adapters import declare_adapters
from maxlm.models.bundle import load_bundle, quantize_model
from maxlm.models.decoder import Decoder
from tests.export.conftest import make_data, make_tokenizer, save_run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundles") / "int8"
    return output, export_int8(run.path, output, data_folder=run.data)


@jax.jit
def whole_logits(model, tokens, positions, segments):
    return model.logits(model(tokens, positions_BL=positions, segment_ids_BL=segments).hidden_BLD)


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_receipt_is_that_of_whole_logits_in_float64(run, exported):
    """Every held-out row (there are fewer than would be sampled), all logits at once, means by loss weight."""
    _, receipt = exported
    quantized = quantize_model(run.model)
    rows = open_in_order([run.data], batch_size=1)
    assert rows.num_steps <= 16 * 8
    batches = [rows.batch(step) for step in range(rows.num_steps)]
    tokens, targets, weights, segments, positions = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    )
    assert segments.max() > 1
    assert (weights == 0).any()
    log_p, log_q = (
        log_softmax(np.asarray(whole_logits(model, tokens, positions, segments), np.float64))
        for model in (run.model, quantized)
    )
    counted = weights > 0
    losses = [-np.take_along_axis(x, targets[..., None], axis=-1)[..., 0][counted].mean() for x in (log_p, log_q)]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[counted]
    agree = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1))[counted]

    assert receipt.num_tokens == counted.sum()
    assert receipt.perplexity_float == pytest.approx(np.exp(losses[0]), rel=1e-5)
    # An activation half-way between two int8 values rounds as the compiler orders its sums: that moves one token's loss
    # by 0.01 nats, the mean of these thousands by some 1e-6.
    assert receipt.perplexity_int8 == pytest.approx(np.exp(losses[1]), rel=5e-5)
    assert receipt.perplexity_change == pytest.approx(np.exp(losses[1]) / np.exp(losses[0]) - 1, abs=5e-5)
    assert receipt.perplexity_change == pytest.approx(receipt.perplexity_int8 / receipt.perplexity_float - 1, abs=1e-12)
    assert abs(receipt.perplexity_change) > 5e-4
    assert receipt.mean_kl == pytest.approx(kl.mean(), rel=1e-2)
    assert receipt.max_kl == pytest.approx(kl.max(), rel=1e-2)
    assert receipt.top1_agreement == pytest.approx(agree.mean(), abs=1e-3)
    assert 0 < receipt.mean_kl < receipt.max_kl


def test_the_receipt_does_not_depend_on_how_the_rows_are_cut(run, monkeypatch):
    from maxlm.export import receipt

    quantized = quantize_model(run.model)

    def measure(batch_size):
        rows = open_in_order([run.data], batch_size=batch_size)
        return Receipt.measure(run.model, quantized, map(Batch.from_rows, rows.iterate(num_threads=0)))

    whole = measure(8)
    monkeypatch.setattr(receipt, "CHUNK_LENGTH", 12)  # does not divide a row of 32
    jax.clear_caches()
    cut = measure(3)
    # Logits that differ in the last bit may be rounded to another int8 in the layers; hence not equal.
    assert asdict(cut) == pytest.approx(asdict(whole), rel=5e-3, abs=1e-4)
    assert cut.num_tokens == whole.num_tokens


def test_a_model_costs_nothing_against_itself(run):
    rows = open_in_order([run.data], batch_size=4)
    receipt = Receipt.measure(run.model, run.model, [Batch.from_rows(rows.batch(0))])
    assert receipt.perplexity_change == 0
    assert receipt.max_kl == 0
    assert receipt.top1_agreement == 1


class TestBundle:
    def test_takes_a_quarter_of_the_memory(self, exported):
        output, receipt = exported
        assert 0.25 < receipt.bytes_int8 / receipt.bytes_float < 0.35
        assert (output / "model.safetensors").stat().st_size < receipt.bytes_int8 + 4096

    def test_holds_the_quantised_weights_of_the_run(self, run, exported):
        bundle, _ = load_bundle(exported[0])
        weights = flatten(run.model)
        for path in ("layers/attention/query", "layers/attention/out", "layers/mlp/down", "embedding"):
            weight = np.asarray(weights[path], np.float64)
            weight = weight if path == "embedding" else weight.swapaxes(-1, -2)
            scales = np.abs(weight).max(axis=-1) / 127
            flat = flatten(bundle)
            np.testing.assert_allclose(flat[f"{path}/scales"], scales, rtol=1e-6)
            restored = np.asarray(flat[f"{path}/values"]) * scales[..., None]
            assert (np.abs(restored - weight) <= scales[..., None] * 0.5001).all()
        np.testing.assert_array_equal(bundle.final_norm, run.model.final_norm)
        assert bundle.config == run.model.config

    def test_says_what_it_was_made_of(self, run, exported):
        output, receipt = exported
        manifest = read_manifest(output)
        assert manifest["stage"] == "export/int8"
        assert manifest["metrics"] == asdict(receipt)
        stages = [item["stage"] for item in manifest_chain(output)]
        assert {"data/documents", "data", "train/pretrain", "export/int8"} <= set(stages)
        assert stages[-1] == "export/int8"
        assert json.loads((output / "bundle.json").read_text())["receipt"] == asdict(receipt)

    def test_generates_text(self, exported, run):
        model = load(exported[0])
        assert model.tokenizer.fingerprint == run.tokenizer.fingerprint
        first, again = (model.generate("the quick", max_new_tokens=8) for _ in range(2))
        assert first == again
        assert len(model.encode(first[0])) > 1

    def test_a_better_export_replaces_it_whole(self, run, tmp_path):
        output = tmp_path / "int8"
        export_int8(run.path, output, data_folder=run.data)
        (output / "left-over").write_text("of the old bundle")
        export_int8(run.path, output, data_folder=run.data, num_batches=1)
        assert not (output / "left-over").exists()
        assert read_manifest(output)["config"]["num_batches"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["int8"]


class TestBounds:
    RECEIPT = Receipt(10.0, 10.04, 0.004, 0.009, 0.5, 0.99, 1000, 400, 100)

    def test_within_bounds_passes(self):
        check_receipt(self.RECEIPT, max_perplexity_change=0.004, max_mean_kl=0.009)

    @pytest.mark.parametrize(
        "bounds",
        [
            {"max_perplexity_change": 0.0039, "max_mean_kl": 0.009},
            {"max_perplexity_change": 0.004, "max_mean_kl": 0.0089},
        ],
    )
    def test_either_number_fails_it(self, bounds):
        with pytest.raises(ReceiptOutOfBounds, match=r"\+0.400%.*0.00900") as caught:
            check_receipt(self.RECEIPT, **bounds)
        assert caught.value.exit_code == 1
        assert caught.value.receipt == self.RECEIPT

    @pytest.mark.parametrize("change", [-0.1, float("nan"), float("inf")])
    def test_a_drop_or_no_number_fails_it_too(self, change):
        with pytest.raises(ReceiptOutOfBounds):
            check_receipt(replace(self.RECEIPT, perplexity_change=change), max_perplexity_change=0.005, max_mean_kl=1)

    def test_nothing_is_left_behind(self, run, tmp_path):
        with pytest.raises(ReceiptOutOfBounds):
            export_int8(run.path, tmp_path / "int8", data_folder=run.data, max_mean_kl=1e-9)
        assert not list(tmp_path.iterdir())

    def test_an_earlier_bundle_stays(self, run, tmp_path):
        export_int8(run.path, tmp_path / "int8", data_folder=run.data)
        before = read_manifest(tmp_path / "int8")
        with pytest.raises(ReceiptOutOfBounds):
            export_int8(run.path, tmp_path / "int8", data_folder=run.data, max_mean_kl=1e-9)
        assert read_manifest(tmp_path / "int8") == before
        load_bundle(tmp_path / "int8")


class TestRefuses:
    def test_a_folder_that_is_no_bundle(self, run, tmp_path):
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(ConfigError, match="exists and is no int8 bundle"):
            export_int8(run.path, tmp_path, data_folder=run.data)
        assert (tmp_path / "precious.txt").read_text() == "mine"

    def test_a_bundle_as_model(self, exported, run, tmp_path):
        with pytest.raises(CheckpointError, match="is an int8 bundle already"):
            export_int8(exported[0], tmp_path / "again", data_folder=run.data)

    def test_a_folder_without_a_model(self, run, tmp_path):
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            export_int8(run.data, tmp_path / "int8", data_folder=run.data)

    def test_data_of_another_tokenizer(self, run, tmp_path):
        make_tokenizer(tmp_path / "tokenizer", vocab_size=330)
        data = make_data(tmp_path / "data", tmp_path / "tokenizer")
        with pytest.raises(TokenizerError, match="tokenizer"):
            export_int8(run.path, tmp_path / "int8", data_folder=data)
        assert not (tmp_path / "int8").exists()

    def test_rows_longer_than_the_context(self, run, tmp_path):
        data = make_data(tmp_path / "data", run.path / "tokenizer", row_length=65)
        with pytest.raises(DataError, match="longer than the model's context of 64"):
            export_int8(run.path, tmp_path / "int8", data_folder=data)

    def test_data_without_held_out_rows(self, run, tmp_path):
        data = make_data(tmp_path / "data", run.path / "tokenizer", valid_fraction=0.0)
        with pytest.raises(DataError, match="no rows of the split 'valid'"):
            export_int8(run.path, tmp_path / "int8", data_folder=data)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _only_this_command(self, monkeypatch):
        monkeypatch.setattr("maxlm.cli.COMMANDS", ("maxlm.export.cli",))

    def command(self, run, output, *more):
        return ["export", str(run.path), str(output), "--format", "int8", "--data", str(run.data), *more]

    def test_prints_the_receipt(self, run, tmp_path, capsys):
        assert main(self.command(run, tmp_path / "int8")) == 0
        printed = capsys.readouterr().out
        for part in ("perplexity", "KL, mean", "nats", "same likeliest token"):
            assert part in printed
        load_bundle(tmp_path / "int8")

    def test_json_is_one_object(self, run, tmp_path, capsys):
        assert main(self.command(run, tmp_path / "int8", "--json")) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == read_manifest(tmp_path / "int8")["metrics"]

    def test_out_of_bounds_prints_the_receipt_and_fails_with_1(self, run, tmp_path, capsys):
        assert main(self.command(run, tmp_path / "int8", "--max-mean-kl", "0", "--json")) == 1
        captured = capsys.readouterr()
        printed = json.loads(captured.out)
        assert printed["mean_kl"] > 0
        assert printed["error"] in captured.err
        assert "no bundle was written" in printed["error"]
        assert len(captured.err.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())

    def test_a_mistake_is_one_sentence_and_2(self, run, tmp_path, capsys):
        assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out"), "--data", str(run.data)]) == 2
        assert "there is no such folder" in capsys.readouterr().err

    @pytest.mark.parametrize("wrong", [("--num-batches", "0"), ("--max-mean-kl", "-1"), ("--max-mean-kl", "nan")])
    def test_a_setting_out_of_range(self, run, tmp_path, capsys, wrong):
        with pytest.raises(SystemExit) as caught:
            main(self.command(run, tmp_path / "int8", *wrong))
        assert caught.value.code == 2
        assert "must be" in capsys.readouterr().err


def test_an_adapted_run_is_exported_with_its_adapters_merged(run, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))
    adapters = initialize(declare_adapters(Decoder(run.model.config), lora), jax.random.key(5))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    adapted = save_run(
        tmp_path / "run",
        run.model,
        tokenizer_folder=run.path / "tokenizer",
        data=run.data,
        adapters=adapters,
        init_from=str(run.path),
        lora=lora.model_dump(mode="json"),
    )
    export_int8(adapted, tmp_path / "int8", data_folder=run.data)
    bundle, _ = load_bundle(tmp_path / "int8")
    base = np.asarray(run.model.layers.attention.query, np.float64)
    adapter = adapters["layers/attention/query"]
    merged = base + 2.0 * np.asarray(adapter["down"], np.float64) @ np.asarray(adapter["up"], np.float64)
    got = np.asarray(bundle.layers.attention.query.dequantize()).swapaxes(-1, -2)
    step = np.abs(merged).max(axis=-2, keepdims=True) / 127
    assert (np.abs(got - merged) <= 0.5001 * step).all()
    assert (np.abs(got - base) > 2 * step).any()
