"""`maxlm model`."""

import argparse
import json

from maxlm.runtime.arguments import count, seed

_EPILOG = """\
example:
  maxlm model resize runs/english runs/chinese/start --tokenizer runs/chinese/tokenizer
"""

_RESIZE = """\
Give a model rows in its embedding and its output table for the tokens that were added to its tokenizer. OUT is a run
folder, to train from with init_from=OUT. The rows of all earlier tokens stay as they are.
"""

_RESIZE_EPILOG = """\
examples:
  maxlm tokenizer extend runs/english/tokenizer chinese.txt runs/chinese/tokenizer --add 4000 --script Han
  maxlm model resize runs/english runs/chinese/start --tokenizer runs/chinese/tokenizer

It prints the id of the first new token, from which optim.new_rows can train the new rows first.
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "model",
        help="change a model's vocabulary",
        description="Change a model without training it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    resize = actions.add_parser(
        "resize",
        help="add rows for the new tokens of `maxlm tokenizer extend`",
        description=_RESIZE,
        epilog=_RESIZE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    resize.add_argument("model", metavar="MODEL", help="a run, a checkpoint or a Hugging Face folder")
    resize.add_argument("output", metavar="OUT", help="the run folder; an earlier output of resize there is replaced")
    resize.add_argument("--tokenizer", required=True, metavar="FOLDER", help="the model's tokenizer, extended")
    resize.add_argument(
        "--init",
        choices=["mean", "noise", "zero"],
        default="mean",
        help="new rows: the mean of the rows of the tokens that the text had before; noise like the rows of all"
        " tokens; or zero (%(default)s)",
    )
    resize.add_argument(
        "--multiple-of",
        type=count,
        default=128,
        metavar="N",
        help="round the number of rows up to a multiple of this; those beyond the tokens are unused (%(default)s)",
    )
    resize.add_argument("--seed", type=seed, default=0, help="seed of the noise (%(default)s)")
    resize.add_argument("--json", action="store_true", help="print what was resized as one JSON object")
    resize.set_defaults(func=run_resize)


def run_resize(args: argparse.Namespace) -> int:
    """Resize, then print a summary."""
    from dataclasses import asdict

    from maxlm.export.resize import resize_model

    found = resize_model(
        args.model,
        args.output,
        args.tokenizer,
        init=args.init,
        multiple_of=args.multiple_of,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps({"output": args.output, **asdict(found)}))
        return 0
    print(
        f"{args.output}: {found.rows_before:,} -> {found.rows_after:,} rows in {' and '.join(found.tables)}, for"
        f" {found.tokens_added:,} new tokens from id {found.first_new_token} on; to train their rows first:"
        f" optim.new_rows.first={found.first_new_token} optim.new_rows.steps=N"
    )
    return 0
