"""Export a trained model to another format; measure the quality loss, and write nothing if it is too large."""

import os
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import xxhash
from safetensors import SafetensorError

from maxlm.errors import CheckFailed, CheckpointError, ConfigError, RequestError
from maxlm.export.held_out import HeldOut, find_held_out, read_held_out
from maxlm.export.receipt import Receipt
from maxlm.interop.formats import Format, find_format, formats
from maxlm.interop.load import load_any_model, load_model
from maxlm.models.decoder import Decoder
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import check_output, replaced_folder, temporary_name
from maxlm.runtime.progress import track

MAX_PERPLEXITY_CHANGE = 0.005
MAX_MEAN_KL = 0.01
MAX_TOKENS = 1 << 16


class ReceiptOutOfBounds(CheckFailed):
    """The quantized model differs too much from the float model; `receipt` has the measurements."""

    def __init__(self, message: str, receipt: Receipt):
        self.receipt = receipt
        super().__init__(message)


def export_model(
    model_path: str | Path,
    output: str | Path,
    *,
    format: str = "int8",
    data: str | Path | None = None,
    ema: bool = False,
    max_perplexity_change: float = MAX_PERPLEXITY_CHANGE,
    max_mean_kl: float = MAX_MEAN_KL,
    max_tokens: int = MAX_TOKENS,
) -> Receipt | None:
    """Write a trained model to `output` in another format, atomically.

    A quantized model is compared with the float model on held-out text. An unquantized one must read back bit-exactly,
    and has no receipt.

    Args:
      model_path: a run folder or a checkpoint.
      output: a new folder, or one of the same format, which is replaced if the export passes.
      format: the name of one of `maxlm.interop.formats.formats`.
      data: data to compare the two models on: a folder of `maxlm data build`, for its held-out documents, or a .jsonl
        file of chats in SFT format. None takes the validation data of the run, or of the run it started from.
      ema: export the run's EMA weights instead of the raw weights.
      max_perplexity_change: bound on the relative change of perplexity, up or down.
      max_mean_kl: bound on the mean of KL(float || quantized), in nats per token.
      max_tokens: at most this many tokens are read, in rows spread evenly over the held-out ones.

    Raises:
      ReceiptOutOfBounds: a whole interval is out of bounds; nothing is written, an existing folder is unchanged.
      CheckpointError: there is no float model at `model_path`, or writing to disk failed.
      ConfigError: `output` contains something else.
      RequestError: there is no such format.
      TokenizerError: the data was made with another tokenizer.
      DataError: there is no data to compare on, or the model cannot read it.
    """
    target = named_format(format)
    model_path = Path(model_path)
    check_output(output, "export", key="OUTPUT", suffix=len(temporary_name("")))
    # `.` has no name from which to derive the temporary folder.
    output = Path(os.path.abspath(output))
    if (exported := find_format(model_path)) is not None and exported.quantize is not None:
        raise CheckpointError(f"{model_path}: is already {exported.title}; give the run that it was exported from")
    if output.exists() and not target.recognizes(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError([f"{output}: exists and is not {target.title}; give a new folder"])

    paths = [] if target.quantize is None else find_held_out(model_path) if data is None else [data]
    load = load_any_model if target.quantize is None else load_model
    model, tokenizer = load(model_path, ema=ema)
    model = target.stored(model)
    bounds = {"max_perplexity_change": max_perplexity_change, "max_mean_kl": max_mean_kl}
    if target.quantize is None:
        written, receipt = model, None
    else:
        if tokenizer is None:
            raise CheckpointError(f"{model_path}: has no tokenizer, which the comparison on text needs; restore it")
        held_out = read_held_out(
            paths,
            tokenizer,
            max_length=model.execution.max_length,
            max_tokens=max_tokens,
            prefixes=model.config.prefix_attention,
        )
        written, receipt = _quantize_within(model, target, held_out, bounds)

    measured = {} if receipt is None else asdict(receipt)
    try:
        with replaced_folder(output) as temporary:
            target.write(temporary, written, tokenizer, measured)
            digests, settings = _digests(written), model.config.model_dump(mode="json")
            # Only one model is in memory.
            del model, written
            if _digests(target.load(temporary)[0]) != digests:
                raise CheckpointError(f"{temporary}: does not read back bit-exactly; this is a bug in the format")
            write_manifest(
                temporary,
                stage=f"export/{target.name}",
                inputs={"model": model_path, **{f"data_{index}": path for index, path in enumerate(paths)}},
                config={
                    "ema": ema,
                    **(bounds | {"max_tokens": max_tokens} if receipt else {}),
                    "model": settings,
                },
                metrics=measured,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output}: could not be written: {error}; free disk space and run again") from error
    return receipt


def named_format(name: str) -> Format:
    """Look up a format by name.

    Raises:
      RequestError: there is no such format.
    """
    found = {each.name: each for each in formats()}
    if name not in found:
        raise RequestError(f"--format {name!r}: there is no such format; the formats are {', '.join(found)} and peft")
    return found[name]


def _quantize_within(
    model: Decoder, target: Format, held_out: HeldOut, bounds: dict[str, float]
) -> tuple[Decoder, Receipt]:
    """The first candidate within bounds.

    Raises:
      ReceiptOutOfBounds: none is; the receipt is that of the last one.
    """
    for candidate in target.quantize(model):
        title = f"comparing with float on {held_out.kind}: {candidate.description}"
        receipt = Receipt.measure(model, candidate.model, track(list(held_out.batches()), title), kind=held_out.kind)
        try:
            check_receipt(receipt, target.name, **bounds)
        except ReceiptOutOfBounds as error:
            refused = error
        else:
            return candidate.model, receipt
    raise refused


def _digests(model: Decoder) -> list[str]:
    """A hash of each array of a model: shape, dtype and bits."""
    arrays = (np.asarray(leaf) for leaf in jax.tree.leaves(model))
    return [f"{x.shape} {x.dtype} {xxhash.xxh3_128_hexdigest(x.ravel().view(np.uint8).data)}" for x in arrays]


def check_receipt(receipt: Receipt, format: str, *, max_perplexity_change: float, max_mean_kl: float) -> None:
    """Raise ReceiptOutOfBounds, naming the format, if a whole interval is out of bounds or a number is not finite.

    An interval that overlaps the bound does not show a violation: other held-out text of that size could well have
    passed. Without an interval, the number itself counts.
    """
    low, high = receipt.change.bounds if receipt.perplexity_change_low is not None else 2 * (receipt.perplexity_change,)
    least_kl = receipt.mean_kl if receipt.mean_kl_low is None else receipt.mean_kl_low
    # Comparisons with NaN are false.
    if low <= max_perplexity_change and high >= -max_perplexity_change and least_kl <= max_mean_kl:
        return
    raise ReceiptOutOfBounds(
        f"{format} changes perplexity by {receipt.format_change()} (at most {max_perplexity_change:.3%} is allowed)"
        f" with a mean KL of {receipt.kl.format(5)} nats (at most {max_mean_kl:.5f}) on {receipt.num_units:,}"
        f" {receipt.kind}, so no bundle was written",
        receipt,
    )
