"""The command line: one subcommand per stage. Stages are imported when they run, so that `--help` is instant."""

import argparse
import errno
import functools
import importlib
import json
import os
import select
import sys
from typing import NoReturn

from maxlm.errors import BUG_EXIT_CODE, MaxlmError, RequestError
from maxlm.runtime.bug import out_of_memory, report_bug
from maxlm.runtime.platform import prepare_platform
from maxlm.runtime.streams import prepare_streams

# Modules with a `register(subparsers)`; they import nothing heavy at module level.
COMMANDS = (
    "maxlm.train.config_cli",
    "maxlm.train.models_cli",
    "maxlm.data.cli",
    "maxlm.data.prompts_cli",
    "maxlm.tokenizer.cli",
    "maxlm.train.cli",
    "maxlm.scoring.cli",
    "maxlm.feedback.cli",
    "maxlm.verify.cli",
    "maxlm.eval.cli",
    "maxlm.report.cli",
    "maxlm.export.cli",
    "maxlm.export.import_cli",
    "maxlm.export.model_cli",
    "maxlm.generate.cli",
    "maxlm.serve.cli",
    "maxlm.quickstart.cli",
    "maxlm.sweep.cli",
    "maxlm_gcp.cli",
)

# Maximum characters of a usage error, which may quote a long argument.
_MAX_USAGE_ERROR = 300

EPILOG = """\
examples:
  maxlm quickstart                                    text to a served chat model, in minutes, on a CPU
  maxlm train configs/quickstart/pretrain.yaml        one stage; run it again to resume
  maxlm train FILE optim.learning_rate=3e-4           with one setting changed
  maxlm chat runs/quickstart/align                    talk to a model
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(message if len(message) <= _MAX_USAGE_ERROR else f"{message[: _MAX_USAGE_ERROR - 3]}...")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="maxlm",
        description="Build large language models end to end: data, tokenizer, training, alignment, int8, serving.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).register(subparsers)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command; settings (`key=value`) may also follow its options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        # argparse does not recognize settings that follow an option.
        args.overrides, rest = [*args.overrides, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse and run; a user error becomes one sentence and exit code 2, a bug one sentence and exit code 70."""
    prepare_streams()
    args = argparse.Namespace()
    try:
        check_encoding(sys.argv[1:] if argv is None else argv)
        args = parse(argv)
        prepare_platform()
        code = args.func(args) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # while a closed pipe can still be told apart from a bug
        return code
    except MaxlmError as error:
        return _end(args, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _end(args, "interrupted", 130)
    except Exception as error:
        if _is_reader_gone(error):
            return 0
        if sentence := _system_error(error) or out_of_memory(error):
            return _end(args, sentence, MaxlmError.exit_code)
        return _end(args, report_bug(error), BUG_EXIT_CODE)


def check_encoding(argv: list[str]) -> None:
    """Raise RequestError for an argument that is not valid UTF-8: our files could not store it."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"argument {word!a}: is not UTF-8 text; rename the file, or use a locale whose encoding is UTF-8"
            ) from None


def _end(args: argparse.Namespace, message: str, code: int) -> int:
    """Print why a command ended; returns the exit code."""
    if getattr(args, "json", False):
        print(json.dumps({"error": message}))
    print(f"maxlm: {_shortened(message)}", file=sys.stderr)
    return code


def _shortened(message: str) -> str:
    """A message whose lines fit a terminal, though it may name a file of thousands of characters."""
    lines = message.split("\n")
    return "\n".join(line if len(line) <= 900 else f"{line[:400]}...{line[-400:]}" for line in lines)


def _is_reader_gone(error: Exception) -> bool:
    """Whether the reader of our output, such as `head`, has exited, so that the rest of the output is not needed."""
    if not isinstance(error, BrokenPipeError) or sys.__stdout__ is None:
        return False
    output = sys.__stdout__.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not poll.poll(0):
        return False
    # Python flushes once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _system_error(error: Exception) -> str | None:
    """The sentence for an OS error: a folder without write permission, a file in its place, a full disk."""
    of_machine = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in of_machine):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{(error.strerror or str(error)).lower()}"


if __name__ == "__main__":
    sys.exit(main())
