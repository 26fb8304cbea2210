"""`maxlm data`."""

import argparse
import json
import sys

from maxlm.runtime.arguments import add_config, count, seed

_EPILOG = """\
examples:
  maxlm data build configs/data/embedded.yaml --stop-after documents   clean text, to train a tokenizer on
  maxlm data build configs/data/embedded.yaml                          packed rows, with a trained tokenizer
  maxlm data show runs/embedded/data --rejects                         rejected records, and why
  maxlm data at-step 120 --run runs/small                              the documents that a run read in step 120
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="turn text into packed rows; inspect them",
        description="Read, clean and deduplicate text, pack it into rows of tokens, and inspect the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    build = actions.add_parser(
        "build",
        help="sources to documents to packed rows",
        description="Build a data folder. Outputs that are up to date are reused.",
        epilog="example: maxlm data build configs/data/embedded.yaml row_length=512 workers=8",
    )
    add_config(build, "data")
    build.add_argument("--stop-after", choices=["documents"], help="stop before tokenization")
    build.add_argument("--json", action="store_true", help="print the manifest as JSON")
    build.set_defaults(func=run_build)

    show = actions.add_parser(
        "show",
        help="documents, packed rows, and rejected records",
        description="Print the first documents of a data folder, its packed rows, or the rejected records.",
        epilog="example: maxlm data show runs/embedded/data --rows --split valid -n 2",
    )
    show.add_argument("folder", metavar="FOLDER", help="a folder of `maxlm data build`")
    what = show.add_mutually_exclusive_group()
    what.add_argument("--rows", action="store_true", help="packed rows instead of documents")
    what.add_argument("--rejects", action="store_true", help="rejected records instead of documents")
    show.add_argument("--split", choices=["train", "valid"], default="train", help="default: %(default)s")
    show.add_argument("-n", type=count, default=5, metavar="N", help="how many; default: %(default)s")
    show.add_argument("--json", action="store_true", help="print one JSON object per line, with full texts")
    show.set_defaults(func=run_show)

    at_step = actions.add_parser(
        "at-step",
        help="the documents that a training step read",
        description="Print the documents whose tokens a training step reads, such as those behind a loss spike.",
        epilog="example: maxlm data at-step 120 --run runs/small",
    )
    at_step.add_argument("step", type=count, metavar="N", help="the step, counted from 1 as in logs")
    source = at_step.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="a run of objective.kind=pretrain")
    source.add_argument("--data", metavar="FOLDER", nargs="+", help="data folders, mixed with equal weights")
    at_step.add_argument("--seed", type=seed, default=0, help="with --data; default: %(default)s")
    at_step.add_argument("--batch-size", type=count, default=16, help="with --data; default: %(default)s")
    at_step.add_argument("--json", action="store_true", help="print one JSON object per line")
    at_step.set_defaults(func=run_at_step)


def run_build(args: argparse.Namespace) -> int:
    """Build, then print a summary."""
    from maxlm.config import load_config
    from maxlm.data.build import build_data

    config = load_config(args.config, args.overrides, kind="data")
    manifest = build_data(config, stop_after=args.stop_after)
    if args.json:
        print(json.dumps(manifest, ensure_ascii=False))
        return 0
    metrics = manifest["metrics"]
    print(f"{config.output}: {metrics['documents']:,} documents of {metrics['records_in']:,} records")
    for split, counts in metrics["splits"].items():
        tokens = f", {counts['tokens']:,} tokens in {counts['rows']:,} rows" if "rows" in counts else ""
        print(f"  {split}: {counts['documents']:,} documents, {counts['characters']:,} characters{tokens}")
    if metrics["rejected"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in metrics["rejected"].items())
        print(f"  rejected: {reasons} (see rejects.jsonl)")
    if "tokens" in metrics:
        print(f"  {metrics['characters_per_token']} characters per token, rows of {metrics['row_length']} tokens")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print documents, rows or rejects."""
    from itertools import islice

    from maxlm.data import show

    if args.rejects:
        items = show.read_rejects(args.folder)
    elif args.rows:
        items = show.read_rows(args.folder, args.split)
    else:
        items = show.read_documents(args.folder, args.split)
    for item in islice(items, args.n):
        if args.json:
            print(json.dumps(item, ensure_ascii=False))
        else:
            print(show.describe_item(item))
    return 0


def run_at_step(args: argparse.Namespace) -> int:
    """Print the documents of a step."""
    from dataclasses import asdict

    from maxlm.data.loader import open_mixture
    from maxlm.data.quarantine import batch_of_step, read_quarantine
    from maxlm.data.show import open_run

    if args.run:
        rows = open_run(args.run)
    else:
        rows = open_mixture([(path, 1.0) for path in args.data], seed=args.seed, batch_size=args.batch_size)
    skipped = [record["batch"] for record in read_quarantine(args.run)] if args.run else []
    documents = rows.documents(batch_of_step(args.step - 1, skipped))
    for document in documents:
        print(json.dumps(asdict(document)) if args.json else f"{document.id}  ({document.source}, {document.folder})")
    if not args.json:
        print(f"step {args.step} reads {rows.batch_size} rows of {len(documents)} documents", file=sys.stderr)
    return 0
