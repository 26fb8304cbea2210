"""The command line: one subcommand for each stage. Stages are imported when they run, so that `--help` is instant."""

import argparse
import errno
import importlib
import json
import sys

from maxlm.core.platform import prepare_platform
from maxlm.errors import MaxlmError

# Modules with a `register(subparsers)`; they import nothing heavy at their top.
COMMANDS = (
    "maxlm.config.cli",
    "maxlm.data.cli",
    "maxlm.tokenizer.cli",
    "maxlm.post.cli",
    "maxlm.verify.cli",
    "maxlm.eval.cli",
    "maxlm.export.cli",
    "maxlm.generate.cli",
    "maxlm.serve.cli",
    "maxlm.quickstart.cli",
    "maxlm.sweep.cli",
    "gcp.cli",
)

EPILOG = """\
examples:
  maxlm quickstart                                    text to a served chat model, in minutes, on a CPU
  maxlm train configs/quickstart/pretrain.yaml        one stage; run it again to resume
  maxlm train FILE optim.learning_rate=3e-4           with one setting changed
  maxlm chat runs/quickstart/align                    talk to a model
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command; settings (`key=value`) may follow its options too."""
    parser = argparse.ArgumentParser(
        prog="maxlm",
        description="Build large language models end to end: data, tokenizer, training, alignment, int8, serving.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).register(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        # argparse takes settings that follow an option for something else.
        args.overrides, rest = [*args.overrides, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one sentence and exit code 2."""
    args = parse(argv)
    prepare_platform()
    try:
        return args.func(args) or 0
    except MaxlmError as error:
        if getattr(args, "json", False):
            print(json.dumps({"error": str(error)}))
        print(f"maxlm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except OSError as error:
        # A folder that may not be written, a file in its place, a full disk are the user's to mend.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"maxlm: {where}{(error.strerror or str(error)).lower()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maxlm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
