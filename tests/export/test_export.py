"""`maxlm export --format int8`: bundles, receipts and errors."""

import json
import shutil
from dataclasses import asdict

import jax
import numpy as np
import pytest

from maxlm.cli import main
from maxlm.config.adapters import LoraConfig
from maxlm.core.interval import ratio_interval
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.data.loader import open_in_order
from maxlm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from maxlm.export.export import ReceiptOutOfBounds, check_receipt, export_model
from maxlm.export.held_out import find_held_out, read_held_out
from maxlm.export.receipt import Receipt
from maxlm.generate.model import load
from maxlm.interop.int8 import load_bundle
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.quantized import quantize_model
from maxlm.runtime.manifest import manifest_chain, read_manifest
from tests.export.conftest import make_data, make_tokenizer, save_pretraining, save_run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundles") / "int8 [1]\\*?#:"
    return output, export_model(run.path, output, data=run.data)


@jax.jit
def whole_logits(model, tokens, positions, segments):
    return model.logits(model(tokens, positions_BL=positions, segment_ids_BL=segments).hidden_BLD)


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_receipt_matches_full_logits_in_float64(run, exported):
    """Every held-out row (there are fewer than would be sampled), all logits at once, means by loss weight."""
    _, receipt = exported
    quantized = quantize_model(run.model)
    rows = open_in_order([run.data], batch_size=1)
    batches = [rows.batch(step) for step in range(rows.num_steps)]
    tokens, targets, weights, segments, positions = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    )
    # The document of each token, by its position in the stream: a document that spans rows is one document.
    firsts = [rows.documents(step)[0].ordinal for step in range(rows.num_steps)]
    documents = np.array(firsts)[:, None] + segments - 1
    assert segments.max() > 1
    assert (weights == 0).any()
    log_p, log_q = (
        log_softmax(np.asarray(whole_logits(model, tokens, positions, segments), np.float64))
        for model in (run.model, quantized)
    )
    counted = weights > 0
    nats = [-np.take_along_axis(x, targets[..., None], axis=-1)[..., 0][counted] for x in (log_p, log_q)]
    losses = [x.mean() for x in nats]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[counted]
    agree = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1))[counted]

    assert receipt.kind == "documents"
    assert receipt.num_tokens == counted.sum()
    assert receipt.num_units == len(np.unique(documents[counted]))
    assert receipt.perplexity_float == pytest.approx(np.exp(losses[0]), rel=1e-5)
    # An activation halfway between two int8 values rounds by the compiler's summation order: this moves a token's loss
    # by 0.01 nats, the mean of these thousands by some 1e-6.
    assert receipt.perplexity_int8 == pytest.approx(np.exp(losses[1]), rel=5e-5)
    assert receipt.perplexity_change == pytest.approx(np.exp(losses[1]) / np.exp(losses[0]) - 1, abs=5e-5)
    assert receipt.perplexity_change == pytest.approx(receipt.perplexity_int8 / receipt.perplexity_float - 1, abs=1e-12)
    assert abs(receipt.perplexity_change) > 5e-4
    assert receipt.mean_kl == pytest.approx(kl.mean(), rel=1e-2)
    assert receipt.max_kl == pytest.approx(kl.max(), rel=1e-2)
    assert receipt.top1_agreement == pytest.approx(agree.mean(), abs=1e-3)
    assert 0 < receipt.mean_kl < receipt.max_kl

    sizes = np.bincount(documents[counted])
    for got, of_target, tolerance in (
        (receipt.change.map(np.log1p), nats[1] - nats[0], 5e-5),
        (receipt.kl, kl, 1e-2 * kl.mean()),
    ):
        wanted = ratio_interval(np.bincount(documents[counted], of_target), sizes)
        assert got.low < got.value < got.high
        assert got.bounds == pytest.approx(wanted.bounds, abs=tolerance)


def test_receipt_does_not_depend_on_batches_and_chunks(run, monkeypatch):
    from maxlm.export import held_out, receipt

    quantized = quantize_model(run.model)
    found = read_held_out([run.data], run.tokenizer, max_length=64, max_tokens=10_000)

    def measure():
        return asdict(Receipt.measure(run.model, quantized, found.batches(), kind="documents"))

    whole = measure()
    monkeypatch.setattr(receipt, "CHUNK_TOKENS", 36)  # 12 tokens of 3 rows at a time; a row has 32
    monkeypatch.setattr(held_out, "BATCH_TOKENS", 100)
    jax.clear_caches()
    cut = measure()
    for name in ("kind", "num_tokens", "num_units", "dtypes"):
        assert cut.pop(name) == whole.pop(name)
    # Values that differ in the last bit may round to another int8 in the layers, so the receipts are only close.
    assert cut == pytest.approx(whole, rel=5e-3, abs=1e-4)


def test_model_has_no_loss_against_itself(run):
    found = read_held_out([run.data], run.tokenizer, max_length=64, max_tokens=128)
    receipt = Receipt.measure(run.model, run.model, found.batches(), kind="documents")
    assert receipt.change.bounds == (0, 0)
    assert receipt.max_kl == 0
    assert receipt.top1_agreement == 1


def test_low_precision_operands_do_not_count_as_int8_loss(run, exported):
    """Neither side includes the float model's own rounding in serving."""
    changes = {"activation_dtype": "bfloat16", "matmul_dtype": "bfloat16"}
    rounded = with_execution(run.model, run.model.execution.model_copy(update=changes))
    found = read_held_out([run.data], run.tokenizer, max_length=64, max_tokens=1 << 16)
    receipt = Receipt.measure(rounded, quantize_model(rounded), found.batches(), kind="documents")
    assert receipt == exported[1]


class TestBundle:
    def test_takes_a_quarter_of_the_memory(self, exported):
        output, receipt = exported
        assert 0.25 < receipt.bytes_int8 / receipt.bytes_float < 0.35
        assert (output / "model.safetensors").stat().st_size < receipt.bytes_int8 + 4096

    def test_has_the_quantized_weights_of_the_run(self, run, exported):
        bundle, _ = load_bundle(exported[0])
        weights = flatten(run.model)
        for path in ("layers/0/0/mixer/query", "layers/0/0/mixer/out", "layers/0/0/mlp/down", "embedding"):
            weight = np.asarray(weights[path], np.float64)
            weight = weight if path == "embedding" else weight.swapaxes(-1, -2)
            scales = np.abs(weight).max(axis=-1) / 127
            flat = flatten(bundle)
            np.testing.assert_allclose(flat[f"{path}/scales"], scales, rtol=1e-6)
            restored = np.asarray(flat[f"{path}/values"]) * scales[..., None]
            assert (np.abs(restored - weight) <= scales[..., None] * 0.5001).all()
        np.testing.assert_array_equal(bundle.final_norm.scale, run.model.final_norm.scale)
        assert bundle.config == run.model.config

    def test_manifest_names_its_inputs(self, run, exported):
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

    def test_new_export_replaces_the_bundle(self, run, tmp_path):
        output = tmp_path / "int8"
        export_model(run.path, output, data=run.data)
        (output / "left-over").write_text("of the old bundle")
        export_model(run.path, output, data=run.data, max_tokens=100)
        assert not (output / "left-over").exists()
        assert read_manifest(output)["config"]["max_tokens"] == 100
        assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def a_receipt(change, kl):
    """A receipt of two intervals, each given as its value and bounds."""
    return Receipt("documents", 10.0, 10.04, *change, *kl, 0.5, 0.99, 1000, 30, 400, 100, {})


BOUNDS = {"max_perplexity_change": 0.005, "max_mean_kl": 0.01}


class TestBounds:
    @pytest.mark.parametrize(
        ("change", "kl"),
        [
            ((0.004, 0.003, 0.005), (0.009, 0.008, 0.01)),
            # An interval that overlaps the bound shows no violation, wherever its center is.
            ((0.0058, 0.0048, 0.0068), (0.001, 0.001, 0.001)),
            ((-0.0058, -0.0068, -0.0048), (0.001, 0.001, 0.001)),
            ((0.0, 0.0, 0.0), (0.011, 0.0099, 0.012)),
            # One document gives no interval.
            ((0.005, None, None), (0.01, None, None)),
        ],
    )
    def test_interval_overlapping_the_bounds_passes(self, change, kl):
        check_receipt(a_receipt(change, kl), "int8", **BOUNDS)

    @pytest.mark.parametrize(
        ("change", "kl"),
        [
            ((0.006, 0.0051, 0.007), (0.001, 0.001, 0.001)),
            ((-0.006, -0.007, -0.0051), (0.001, 0.001, 0.001)),
            ((0.0, 0.0, 0.0), (0.011, 0.0101, 0.012)),
            ((0.0051, None, None), (0.001, None, None)),
            ((-0.0051, None, None), (0.001, None, None)),
            ((0.0, None, None), (0.0101, None, None)),
            ((float("nan"),) * 3, (0.001, 0.001, 0.001)),
            ((0.0, 0.0, 0.0), (float("nan"),) * 3),
            ((float("inf"),) * 3, (0.001, 0.001, 0.001)),
        ],
    )
    def test_interval_outside_either_bound_fails(self, change, kl):
        with pytest.raises(ReceiptOutOfBounds, match="no bundle was written") as caught:
            check_receipt(a_receipt(change, kl), "int8", **BOUNDS)
        assert caught.value.exit_code == 1
        assert caught.value.receipt.perplexity_change is change[0]

    def test_error_reports_the_measurements(self):
        with pytest.raises(ReceiptOutOfBounds) as caught:
            check_receipt(a_receipt((0.006, 0.0051, 0.007), (0.001, 0.0009, 0.0011)), "int8", **BOUNDS)
        assert str(caught.value) == (
            "int8 changes perplexity by +0.600% [+0.510%, +0.700%] (at most 0.500% is allowed) with a mean KL of"
            " 0.00100 [0.00090, 0.00110] nats (at most 0.01000) on 30 documents, so no bundle was written"
        )

    def test_tables_fall_back_to_16_bits(self, run, exported, tmp_path):
        """With a bound between the two receipts: 8-bit weights alone lose less than with 8-bit tables."""
        eight = exported[1]
        limit = eight.mean_kl_low * 0.999
        sixteen = export_model(run.path, tmp_path / "int8", data=run.data, max_mean_kl=limit)
        assert sixteen.mean_kl < limit
        assert (eight.dtypes["embedding"], sixteen.dtypes["embedding"]) == ("int8", "float16")
        assert sixteen.dtypes["layers/0/0/mlp/up"] == "int8"
        assert sixteen.dtypes["final_norm/scale"] == "float32"
        size = run.model.embedding.size
        assert sixteen.bytes_int8 - eight.bytes_int8 == size - 4 * run.model.config.vocab_size
        assert load_bundle(tmp_path / "int8")[0].embedding.dtype == np.float16

    def test_failed_export_leaves_nothing_behind(self, run, tmp_path):
        with pytest.raises(ReceiptOutOfBounds):
            export_model(run.path, tmp_path / "int8", data=run.data, max_mean_kl=1e-9)
        assert not list(tmp_path.iterdir())

    def test_failed_export_keeps_an_earlier_bundle(self, run, tmp_path):
        export_model(run.path, tmp_path / "int8", data=run.data)
        before = read_manifest(tmp_path / "int8")
        with pytest.raises(ReceiptOutOfBounds):
            export_model(run.path, tmp_path / "int8", data=run.data, max_mean_kl=1e-9)
        assert read_manifest(tmp_path / "int8") == before
        load_bundle(tmp_path / "int8")


class TestInvalidInputs:
    def test_output_that_is_not_a_bundle(self, run, tmp_path):
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(ConfigError, match="exists and is not an int8 bundle"):
            export_model(run.path, tmp_path, data=run.data)
        assert (tmp_path / "precious.txt").read_text() == "mine"

    def test_bundle_as_model(self, exported, run, tmp_path):
        with pytest.raises(CheckpointError, match="is already an int8 bundle"):
            export_model(exported[0], tmp_path / "again", data=run.data)

    def test_folder_without_a_model(self, run, tmp_path):
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            export_model(run.data, tmp_path / "int8", data=run.data)

    def test_data_of_another_tokenizer(self, run, tmp_path):
        make_tokenizer(tmp_path / "tokenizer", vocab_size=330)
        data = make_data(tmp_path / "data", tmp_path / "tokenizer")
        with pytest.raises(TokenizerError, match="tokenizer"):
            export_model(run.path, tmp_path / "int8", data=data)
        assert not (tmp_path / "int8").exists()

    def test_rows_longer_than_the_context(self, run, tmp_path):
        data = make_data(tmp_path / "data", run.path / "tokenizer", row_length=65)
        with pytest.raises(DataError, match="exceed the model's context of 64"):
            export_model(run.path, tmp_path / "int8", data=data)

    def test_data_without_held_out_rows(self, run, tmp_path):
        data = make_data(tmp_path / "data", run.path / "tokenizer", valid_fraction=0.0)
        with pytest.raises(DataError, match="no rows of the split 'valid'"):
            export_model(run.path, tmp_path / "int8", data=data)


class TestCommandLine:
    def command(self, run, output, *more):
        return ["export", str(run.path), str(output), "--format", "int8", "--data", str(run.data), *more]

    def test_prints_the_receipt(self, run, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        assert main(self.command(run, tmp_path / "int8")) == 0
        printed = capsys.readouterr().out
        receipt = read_manifest(tmp_path / "int8")["metrics"]
        change = f"[{receipt['perplexity_change_low']:+.3%}, {receipt['perplexity_change_high']:+.3%}]"
        for part in (
            "perplexity",
            "KL, mean",
            "nats",
            "same top-1 token",
            f"{receipt['num_units']} documents",
            change,
        ):
            assert part in printed
        assert "int8: embedding, layers/0/0/mixer/key, layers/0/0/mixer/out, " in printed
        assert "float32: final_norm/scale, layers/0/0/mixer_norm/scale, layers/0/0/mlp_norm/scale" in printed
        load_bundle(tmp_path / "int8")

    def test_json_is_one_object(self, run, tmp_path, capsys):
        assert main(self.command(run, tmp_path / "int8", "--json")) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == read_manifest(tmp_path / "int8")["metrics"]

    def test_out_of_bounds_prints_the_receipt_and_exits_with_1(self, run, tmp_path, capsys):
        assert main(self.command(run, tmp_path / "int8", "--max-mean-kl", "0", "--json")) == 1
        captured = capsys.readouterr()
        printed = json.loads(captured.out)
        assert printed["mean_kl"] > 0
        assert printed["error"] in captured.err
        assert "no bundle was written" in printed["error"]
        assert len(captured.err.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())

    def test_mistake_is_one_sentence_and_exit_code_2(self, run, tmp_path, capsys):
        assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out"), "--data", str(run.data)]) == 2
        assert "there is no such folder" in capsys.readouterr().err

    @pytest.mark.parametrize("wrong", [("--max-tokens", "0"), ("--max-mean-kl", "-1"), ("--max-mean-kl", "nan")])
    def test_setting_out_of_range(self, run, tmp_path, capsys, wrong):
        with pytest.raises(SystemExit) as caught:
            main(self.command(run, tmp_path / "int8", *wrong))
        assert caught.value.code == 2
        assert "must be" in capsys.readouterr().err


def test_adapters_are_merged_on_export(run, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))
    adapters = initialize(declare_adapters(Decoder(run.model.config), lora), jax.random.key(5))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    adapted = save_pretraining(
        tmp_path / "run",
        run.model,
        tokenizer_folder=run.path / "tokenizer",
        data=run.data,
        adapter_weights=adapters,
        init_from=str(run.path),
        adapters=lora.model_dump(mode="json"),
    )
    export_model(adapted, tmp_path / "int8", data=run.data)
    bundle, _ = load_bundle(tmp_path / "int8")
    base = np.asarray(run.model.layers[0][0].mixer.query, np.float64)
    adapter = adapters["layers/0/0/mixer/query"]
    merged = base + 2.0 * np.asarray(adapter["down"], np.float64) @ np.asarray(adapter["up"], np.float64)
    got = np.asarray(bundle.layers[0][0].mixer.query.dequantize()).swapaxes(-1, -2)
    step = np.abs(merged).max(axis=-2, keepdims=True) / 127
    assert (np.abs(got - merged) <= 0.5001 * step).all()
    assert (np.abs(got - base) > 2 * step).any()


@pytest.fixture(scope="module")
def chats(run, tmp_path_factory):
    """Training and validation files of chats, and run folders as written by SFT and GRPO."""
    folder = tmp_path_factory.mktemp("chats")
    words = ["fox", "dog", "wizard", "judge"]
    lines = [
        {
            "messages": [
                {"role": "user", "content": words[i % 4]},
                {"role": "assistant", "content": "the quick " * (i % 3 + 1)},
            ]
        }
        for i in range(30)
    ]
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def save(name, start, objective):
        return save_run(
            folder / name,
            run.model,
            tokenizer_folder=run.path / "tokenizer",
            objective=objective,
            inputs={"init_from": start, "train_file": folder / "train.jsonl"},
            init_from=str(start),
        )

    files = {"train_file": str(folder / "train.jsonl"), "valid_file": str(folder / "valid.jsonl")}
    sft = save("sft", run.path, {"kind": "sft", **files})
    align = save("align", sft, {"kind": "policy", "train_file": files["train_file"], "max_new_tokens": 4})
    save("unchecked", run.path, {"kind": "sft", "train_file": files["train_file"]})
    save("direct", run.path, {"kind": "policy", "train_file": files["train_file"], "max_new_tokens": 4})
    assert sft.parent == align.parent == folder
    return folder


class TestHeldOut:
    def test_chats_are_compared_on_assistant_tokens(self, chats, run, tmp_path):
        receipt = export_model(chats / "sft", tmp_path / "int8", data=chats / "valid.jsonl", max_perplexity_change=1.0)
        encoded = [
            run.tokenizer.encode_chat(json.loads(line)["messages"])
            for line in (chats / "valid.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert receipt.kind == "chats"
        assert receipt.num_units == 30
        assert receipt.num_tokens == sum(sum(chat.loss_weights) for chat in encoded)
        assert receipt.perplexity_change_low < receipt.perplexity_change < receipt.perplexity_change_high

    def test_document_in_many_rows_is_one_unit(self, run):
        found = read_held_out([run.data], run.tokenizer, max_length=64, max_tokens=1 << 16)
        rows = open_in_order([run.data], batch_size=1)
        ordinals = {item.ordinal for step in range(rows.num_steps) for item in rows.documents(step)}
        inside = found.rows.segment_ids > 0
        assert set(np.unique(found.units[inside])) == set(range(len(ordinals)))
        # Tokens of one unit carry positions of one document: each position once.
        for unit in range(len(ordinals)):
            last = found.rows.positions[inside & (found.units == unit)]
            assert len(last) >= last.max()

    def test_max_tokens_limits_the_rows(self, chats, run):
        for path, length in ((run.data, 32), (chats / "valid.jsonl", 64)):
            for num_rows in (1, 3):
                found = read_held_out([path], run.tokenizer, max_length=64, max_tokens=num_rows * length + 1)
                assert found.rows.tokens.shape == found.units.shape == (num_rows, length)
        assert len(read_held_out([run.data], run.tokenizer, max_length=64, max_tokens=1).units) == 1

    def test_default_data_is_the_validation_data_of_the_run(self, chats, run):
        assert [path.resolve() for path in find_held_out(run.path)] == [run.data]
        for name in ("sft", "align"):
            assert [path.resolve() for path in find_held_out(chats / name)] == [chats / "valid.jsonl"]

    def test_validation_data_is_found_after_a_move(self, chats, run, tmp_path):
        shutil.copytree(chats, tmp_path / "moved", symlinks=True)
        (found,) = find_held_out(tmp_path / "moved" / "align")
        assert found.resolve() == tmp_path / "moved" / "valid.jsonl"

    @pytest.mark.parametrize("name", ["unchecked", "direct"])
    def test_chat_model_is_not_compared_on_documents(self, chats, tmp_path, name):
        with pytest.raises(DataError, match=r"names no file of held-out chats; give held-out .* with --data"):
            export_model(chats / name, tmp_path / "int8")

    def test_missing_validation_data_is_named(self, chats, tmp_path):
        shutil.copytree(chats, tmp_path / "moved", symlinks=True)
        (tmp_path / "moved" / "valid.jsonl").unlink()
        with pytest.raises(DataError, match=r"valid\.jsonl: does not exist, but .* was validated on it"):
            find_held_out(tmp_path / "moved" / "align")
        (tmp_path / "moved" / "align" / "manifest.json").unlink()
        with pytest.raises(DataError, match=r"has no manifest\.json that names its validation data"):
            find_held_out(tmp_path / "moved" / "align")

    def test_file_without_chats(self, run, tmp_path):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
        with pytest.raises(DataError, match=r"prompts\.jsonl:1: lacks 'messages'"):
            export_model(run.path, tmp_path / "int8", data=tmp_path / "prompts.jsonl")
        with pytest.raises(DataError, match="there is no such file; did you mean"):
            export_model(run.path, tmp_path / "int8", data=tmp_path / "prompt.jsonl")
