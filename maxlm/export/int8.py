"""Export to int8: quantise a trained model, measure what that costs, and write a bundle if it is little."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import jax
from safetensors import SafetensorError

from maxlm.errors import CheckFailed, CheckpointError, ConfigError
from maxlm.export.held_out import HeldOut, find_held_out, read_held_out
from maxlm.export.receipt import Receipt
from maxlm.interop.int8 import is_bundle, load_bundle, write_bundle
from maxlm.interop.load import load_model
from maxlm.models.decoder import Decoder
from maxlm.models.quantized import Tables, quantize_model
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.progress import track

MAX_PERPLEXITY_CHANGE = 0.005
MAX_MEAN_KL = 0.01
MAX_TOKENS = 1 << 16


class ReceiptOutOfBounds(CheckFailed):
    """The int8 model is too far from the float model; `receipt` says how far."""

    def __init__(self, message: str, receipt: Receipt):
        self.receipt = receipt
        super().__init__(message)


def export_int8(
    model_path: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    ema: bool = False,
    max_perplexity_change: float = MAX_PERPLEXITY_CHANGE,
    max_mean_kl: float = MAX_MEAN_KL,
    max_tokens: int = MAX_TOKENS,
) -> Receipt:
    """Write an int8 bundle of a trained model to `output`, all at once, or nothing.

    Args:
      model_path: a run folder or a checkpoint.
      output: a new folder, or a bundle to replace once the new one has passed.
      data: what the two models are compared on: a folder of `maxlm data build`, for its held-out documents, or a .jsonl
        file of chats, as SFT reads it. None takes what the run was validated on, or the run that it started from.
      ema: export the running mean of the run's weights instead of the weights.
      max_perplexity_change: bound on the relative change of perplexity, up or down.
      max_mean_kl: bound on the mean of KL(float || int8), in nats a token.
      max_tokens: at most so many tokens are read, in rows that are spread evenly over the held-out ones.

    Raises:
      ReceiptOutOfBounds: a whole interval lies beyond its bound; nothing is written, an older bundle stays as it was.
      CheckpointError: there is no float model at `model_path`, or the disk does not take the bundle.
      ConfigError: `output` holds something else.
      TokenizerError: the data was made with another tokenizer.
      DataError: there is nothing to compare on, or nothing that the model can read.
    """
    model_path = Path(model_path)
    check_output(output, "export", key="OUTPUT", suffix=len(_beside("")))
    # `.` has no name to write another beside.
    output = Path(os.path.abspath(output))
    if is_bundle(model_path):
        raise CheckpointError(f"{model_path}: is an int8 bundle already; give the run that it was exported from")
    if output.exists() and not is_bundle(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError([f"{output}: exists and is no int8 bundle; give a new folder"])
    paths = find_held_out(model_path) if data is None else [data]
    model, tokenizer = load_model(model_path, ema=ema)
    if tokenizer is None:
        raise CheckpointError(f"{model_path}: has no tokenizer, which the comparison on text needs; put it back")
    held_out = read_held_out(paths, tokenizer, max_length=model.config.max_length, max_tokens=max_tokens)

    bounds = {"max_perplexity_change": max_perplexity_change, "max_mean_kl": max_mean_kl}
    quantized, receipt = _quantize_within(model, held_out, bounds)

    temporary = output.with_name(_beside(output.name))
    try:
        temporary.mkdir(parents=True)
        write_bundle(temporary, quantized, tokenizer, receipt=asdict(receipt))
        load_bundle(temporary)
        write_manifest(
            temporary,
            stage="export/int8",
            inputs={"model": model_path, **{f"data_{index}": path for index, path in enumerate(paths)}},
            config={
                "ema": ema,
                **bounds,
                "max_tokens": max_tokens,
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


def _quantize_within(model: Decoder, held_out: HeldOut, bounds: dict[str, float]) -> tuple[Decoder, Receipt]:
    """The first that lies within bounds: all matrices of 8 bits, or the tables of the vocabulary of 16.

    Raises:
      ReceiptOutOfBounds: neither does; the receipt is that of the latter.
    """
    for tables in get_args(Tables):
        quantized = jax.jit(quantize_model, static_argnames="tables")(model, tables=tables)
        title = f"comparing int8 with float on {held_out.kind}, tables of {tables}"
        receipt = Receipt.measure(model, quantized, track(list(held_out.batches()), title), kind=held_out.kind)
        try:
            check_receipt(receipt, **bounds)
        except ReceiptOutOfBounds as error:
            refused = error
        else:
            return quantized, receipt
    raise refused


def check_receipt(receipt: Receipt, *, max_perplexity_change: float, max_mean_kl: float) -> None:
    """Raise ReceiptOutOfBounds if an interval lies wholly beyond its bound, or a number is not finite.

    An interval that reaches within the bound does not show that the model breaks it: other held-out text of that size
    could well have said the opposite. Where there is none, the number itself counts.
    """
    low, high = receipt.change.bounds if receipt.perplexity_change_low is not None else 2 * (receipt.perplexity_change,)
    least_kl = receipt.mean_kl if receipt.mean_kl_low is None else receipt.mean_kl_low
    # Comparisons with what is no number are false.
    if low <= max_perplexity_change and high >= -max_perplexity_change and least_kl <= max_mean_kl:
        return
    raise ReceiptOutOfBounds(
        f"int8 changes perplexity by {receipt.format_change()} (at most {max_perplexity_change:.3%} is allowed) with a"
        f" mean KL of {receipt.kl.format(5)} nats (at most {max_mean_kl:.5f}) on {receipt.num_units:,} {receipt.kind},"
        " so no bundle was written",
        receipt,
    )


def _beside(name: str) -> str:
    """What a bundle is called until it is whole."""
    return f".{name}.{os.getpid()}.partial"


def _put_in_place(temporary: Path, output: Path) -> None:
    """Rename, so that a reader sees the old bundle, the new one, or for a moment none; never a part."""
    if not output.exists():
        temporary.rename(output)
        return
    old = temporary.with_suffix(".old")
    output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old)
