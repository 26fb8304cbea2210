"""Export to int8: quantise a trained model, measure what that costs, and write a bundle if it is little."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError

from maxlm.core.batch import Batch
from maxlm.core.manifest import write_manifest
from maxlm.core.progress import track
from maxlm.data.loader import open_in_order
from maxlm.errors import CheckFailed, CheckpointError, ConfigError, DataError
from maxlm.export.receipt import Receipt
from maxlm.models.bundle import is_bundle, load_bundle, quantize_model, write_bundle
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.run import load_model

BATCH_SIZE = 8
MAX_PERPLEXITY_CHANGE = 0.005
MAX_MEAN_KL = 0.01
NUM_BATCHES = 16


class ReceiptOutOfBounds(CheckFailed):
    """The int8 model is too far from the float model; `receipt` says how far."""

    def __init__(self, message: str, receipt: Receipt):
        self.receipt = receipt
        super().__init__(message)


def export_int8(
    model_path: str | Path,
    output: str | Path,
    *,
    data_folder: str | Path,
    ema: bool = False,
    max_perplexity_change: float = MAX_PERPLEXITY_CHANGE,
    max_mean_kl: float = MAX_MEAN_KL,
    num_batches: int = NUM_BATCHES,
) -> Receipt:
    """Write an int8 bundle of a trained model to `output`, all at once, or nothing.

    Args:
      model_path: a run folder or a checkpoint.
      output: a new folder, or a bundle to replace once the new one has passed.
      data_folder: a folder of `maxlm data build`, whose held-out rows the two models are compared on.
      ema: export the running mean of the run's weights instead of the weights.
      max_perplexity_change: bound on the relative change of perplexity, up or down.
      max_mean_kl: bound on the mean of KL(float || int8), in nats a token.
      num_batches: at most this many batches of 8 rows are compared, spread evenly over the held-out rows.

    Raises:
      ReceiptOutOfBounds: a bound is exceeded; nothing is written, and a bundle that stood there stays.
      CheckpointError: there is no float model at `model_path`, or the disk does not take the bundle.
      ConfigError: `output` holds something else.
      TokenizerError: the data was made with another tokenizer.
      DataError: the folder holds no held-out rows that the model can read.
    """
    model_path, output, data_folder = Path(model_path), Path(output), Path(data_folder)
    if is_bundle(model_path):
        raise CheckpointError(f"{model_path}: is an int8 bundle already; give the run that it was exported from")
    if output.exists() and not is_bundle(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError([f"{output}: exists and is no int8 bundle; give a new folder"])
    model, tokenizer_folder = load_model(model_path, ema=ema)
    fingerprint = Tokenizer.load(tokenizer_folder).fingerprint
    batches = list(held_out_batches(data_folder, model, fingerprint=fingerprint, num_batches=num_batches))

    quantized = jax.jit(quantize_model)(model)
    receipt = Receipt.measure(model, quantized, track(batches, "comparing int8 with float"))
    check_receipt(receipt, max_perplexity_change=max_perplexity_change, max_mean_kl=max_mean_kl)

    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        write_bundle(
            temporary,
            quantized,
            tokenizer_folder=tokenizer_folder,
            fingerprint=fingerprint,
            receipt=asdict(receipt),
        )
        load_bundle(temporary)
        write_manifest(
            temporary,
            stage="export/int8",
            inputs={"model": model_path, "data": data_folder},
            config={
                "ema": ema,
                "max_perplexity_change": max_perplexity_change,
                "max_mean_kl": max_mean_kl,
                "num_batches": num_batches,
                "model": model.config.model_dump(mode="json"),
            },
            metrics=asdict(receipt),
        )
        _put_in_place(temporary, output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output}: the bundle could not be written: {error}; make room and run again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def held_out_batches(data_folder: Path, model: Decoder, *, fingerprint: str, num_batches: int) -> Iterator[Batch]:
    """At most `num_batches` batches, spread evenly over the held-out rows of all sources."""
    rows = open_in_order([data_folder], batch_size=BATCH_SIZE, expected_fingerprint=fingerprint)
    if rows.row_length > model.config.max_length:
        raise DataError(
            f"{data_folder}: its rows of {rows.row_length} tokens are longer than the model's context of"
            f" {model.config.max_length}; build the data with row_length={model.config.max_length}"
        )
    steps = np.linspace(0, rows.num_steps - 1, min(num_batches, rows.num_steps)).round().astype(int)
    return (Batch.from_rows(rows.batch(int(step))) for step in steps)


def check_receipt(receipt: Receipt, *, max_perplexity_change: float, max_mean_kl: float) -> None:
    """Raise ReceiptOutOfBounds unless both numbers are within bounds; one that is not finite is not."""
    if abs(receipt.perplexity_change) <= max_perplexity_change and receipt.mean_kl <= max_mean_kl:
        return
    raise ReceiptOutOfBounds(
        f"int8 changes perplexity by {receipt.perplexity_change:+.3%} (at most {max_perplexity_change:.3%} is allowed)"
        f" with a mean KL of {receipt.mean_kl:.5f} nats (at most {max_mean_kl:.5f}), so no bundle was written",
        receipt,
    )


def _put_in_place(temporary: Path, output: Path) -> None:
    """Rename, so that a reader sees the old bundle, the new one, or for a moment none; never a part."""
    if not output.exists():
        temporary.rename(output)
        return
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old)
