"""`maxlm export`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from maxlm.runtime.arguments import at_least_zero, count

if TYPE_CHECKING:
    from maxlm.core.interval import Interval
    from maxlm.export.receipt import Receipt

DESCRIPTION = """\
Quantize a trained model to int8: weights have one scale per output channel; activations are quantized dynamically to
two 8-bit digits. The bundle takes about a quarter of the memory, decodes faster, and is used like a run folder.

Both models are first compared on held-out documents, or on the assistant tokens of held-out chats. The quality loss is
printed with its 95% interval and saved in the bundle as its receipt. If a whole interval is out of bounds, the
vocabulary tables are kept in 16 bits; if that is not enough, nothing is written and the exit code is 1.
"""

EPILOG = """\
examples:
  maxlm export runs/small bundles/small --data data/small
  maxlm export runs/chat bundles/chat --data chats/valid.jsonl
  maxlm chat bundles/chat
  maxlm export runs/small exports/small --format hf
  maxlm export runs/small-lora exports/small-lora --format peft
"""


def register(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="quantize a model to an int8 bundle",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run folder or a checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder of the bundle; an older bundle there is replaced")
    parser.add_argument("--ema", action="store_true", help="export the run's EMA weights (optim.ema_decay)")
    parser.add_argument(
        "--format",
        default="int8",
        metavar="NAME",
        help="int8; hf: float weights as Hugging Face's transformers reads them; or peft: the run's adapters alone, as"
        " Hugging Face's peft reads them (int8)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="data to compare on: a folder of `maxlm data build`, for its held-out documents, or a .jsonl file of chats"
        " (the validation data of the run, or of the run it started from)",
    )
    parser.add_argument(
        "--max-perplexity-change",
        type=at_least_zero,
        metavar="X",
        help="bound on the relative change of perplexity, up or down (0.005)",
    )
    parser.add_argument(
        "--max-mean-kl",
        type=at_least_zero,
        metavar="X",
        help="bound on the mean KL divergence from the float model, in nats per token (0.01)",
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help="limit on held-out tokens to compare on, in evenly spread rows (65536)",
    )
    parser.add_argument("--json", action="store_true", help="print the receipt as one JSON object")
    parser.set_defaults(func=run_export)


def run_export(args: argparse.Namespace) -> int:
    from maxlm.export.adapters import export_adapters
    from maxlm.export.export import ReceiptOutOfBounds, export_model

    if args.format == "peft":
        export_adapters(args.model, args.output, ema=args.ema)
        print(json.dumps({"output": args.output}) if args.json else args.output)
        return 0

    given = {
        name: value
        for name in ("max_perplexity_change", "max_mean_kl", "max_tokens")
        if (value := getattr(args, name)) is not None
    }
    try:
        receipt = export_model(args.model, args.output, format=args.format, data=args.data, ema=args.ema, **given)
    except ReceiptOutOfBounds as error:
        # Handled here because the caller knows nothing of receipts.
        _print_receipt(error.receipt, args, error=str(error))
        print(f"maxlm: {error}", file=sys.stderr)
        return error.exit_code
    if receipt is not None:
        _print_receipt(receipt, args)
    else:
        print(json.dumps({"output": args.output}) if args.json else args.output)
    return 0


def _print_receipt(receipt: "Receipt", args: argparse.Namespace, **more: str) -> None:
    from dataclasses import asdict

    if args.json:
        print(json.dumps({**asdict(receipt), **more}))
        return
    from rich.console import Console
    from rich.table import Table

    where = f"{receipt.num_tokens:,} held-out tokens of {receipt.num_units:,} {receipt.kind}"
    table = Table("", "float", "int8", "change", "95 % interval")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "perplexity",
        f"{receipt.perplexity_float:.4f}",
        f"{receipt.perplexity_int8:.4f}",
        f"{receipt.perplexity_change:+.3%}",
        _interval(receipt.change, "+.3%"),
    )
    size_change = receipt.bytes_int8 / receipt.bytes_float - 1
    table.add_row(
        "weights, MB", f"{receipt.bytes_float / 1e6:.2f}", f"{receipt.bytes_int8 / 1e6:.2f}", f"{size_change:+.1%}", ""
    )
    table.add_row("KL, mean", "", "", f"{receipt.mean_kl:.5f} nats", _interval(receipt.kl, ".5f"))
    table.add_row("KL, largest", "", "", f"{receipt.max_kl:.5f} nats", "")
    table.add_row("same top-1 token", "", "", f"{receipt.top1_agreement:.2%}", "")
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(f"{args.model} on {where}")
    console.print(table)
    for dtype, names in _weights_by_dtype(receipt.dtypes).items():
        console.print(f"{dtype}: {', '.join(names)}")


def _weights_by_dtype(dtypes: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, dtype in sorted(dtypes.items(), key=lambda item: item[1] != "int8"):
        found.setdefault(dtype, []).append(path)
    return found


def _interval(interval: "Interval", style: str) -> str:
    return "" if interval.low is None else f"[{interval.low:{style}}, {interval.high:{style}}]"
