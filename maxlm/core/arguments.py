"""What the commands' arguments have in common. Imports nothing heavy: `maxlm --help` reads all of them."""

import argparse


def add_config(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add `config`, a file of this kind, and `overrides` for `load_config`."""
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file with kind: {kind}")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that differ from the file's"
    )


def count(text: str) -> int:
    """For `type=`: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
