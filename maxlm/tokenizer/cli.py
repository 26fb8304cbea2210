"""`maxlm tokenizer`."""

import argparse
import json
from typing import Any

from maxlm.runtime.arguments import add_config, text_or_stdin

_EPILOG = """\
examples:
  maxlm tokenizer train configs/tokenizer/embedded.yaml vocab_size=4096
  maxlm tokenizer show runs/embedded/tokenizer --text "def main():"
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer; show how it splits text",
        description="Train a SentencePiece tokenizer with chat tokens, and show how it splits text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    train = actions.add_parser(
        "train",
        help="train on documents of `maxlm data build` or on a text file",
        description="Train a tokenizer. Retrained only if the text or the configuration has changed.",
        epilog="example: maxlm tokenizer train configs/tokenizer/embedded.yaml vocab_size=4096 algorithm=unigram",
    )
    add_config(train, "tokenizer")
    train.add_argument("--json", action="store_true", help="print the manifest as JSON")
    train.set_defaults(func=run_train)

    show = actions.add_parser(
        "show",
        help="its size and tokens, and how it splits a text",
        description="Print a tokenizer's size and control tokens, or how it splits a text.",
        epilog="example: maxlm tokenizer show runs/embedded/tokenizer --text 'def main():'",
    )
    show.add_argument("folder", metavar="FOLDER", help="a folder of `maxlm tokenizer train`")
    show.add_argument("--text", metavar="TEXT", help="the text to split; - reads standard input")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(func=run_show)


def run_train(args: argparse.Namespace) -> int:
    """Train, then print a summary."""
    from maxlm.config import load_config
    from maxlm.runtime.manifest import read_manifest
    from maxlm.tokenizer.train import train_tokenizer

    config = load_config(args.config, args.overrides, kind="tokenizer")
    train_tokenizer(config)
    manifest = read_manifest(config.output)
    if args.json:
        print(json.dumps(manifest, ensure_ascii=False))
        return 0
    metrics = manifest["metrics"]
    print(
        f"{config.output}: {metrics['vocab_size']:,} tokens from {metrics['trained_on_characters']:,} characters"
        f" in {metrics['seconds']} s; {metrics['characters_per_token']} characters per token;"
        f" fingerprint {metrics['fingerprint'][:12]}"
    )
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print the tokenizer, or a text's tokens."""
    from maxlm.tokenizer.codec import Tokenizer

    tokenizer = Tokenizer.load(args.folder)
    text = None if args.text is None else text_or_stdin(args.text)
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "control_tokens": tokenizer.control_tokens,
    }
    if text is not None:
        ids = tokenizer.encode(text)
        facts = {
            "tokens": [tokenizer.token_text(id_) for id_ in ids],
            "ids": ids,
            "characters_per_token": round(len(text) / max(1, len(ids)), 3),
        }
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    elif text is not None:
        print(" ".join(repr(token)[1:-1].replace(" ", "·") for token in facts["tokens"]))
        print(f"{len(text)} characters, {len(ids)} tokens, {facts['characters_per_token']} characters per token")
    else:
        print(f"{args.folder}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")
        print("control tokens: " + ", ".join(f"{name} {id_}" for name, id_ in tokenizer.control_tokens.items()))
    return 0
