"""`maxlm tokenizer`."""

import argparse
import json
from typing import Any

from maxlm.runtime.arguments import add_config, count, fraction, seed, text_or_stdin

_EPILOG = """\
examples:
  maxlm tokenizer train configs/tokenizer/embedded.yaml vocab_size=4096
  maxlm tokenizer extend runs/embedded/tokenizer chinese.txt runs/chinese/tokenizer --add 4000 --script Han
  maxlm tokenizer show runs/embedded/tokenizer --text "def main():"
"""

_EXTEND = """\
Add pieces to a tokenizer for a script that it splits into bytes, so that a trained model can learn the language with
fewer tokens. The ids of all its tokens and of texts without the script stay the same, which is checked, so the model
keeps what it knows: give it more rows with `maxlm model resize`, then train it on text of both languages.
"""

_EXTEND_EPILOG = """\
examples:
  maxlm tokenizer extend runs/embedded/tokenizer chinese.txt runs/chinese/tokenizer --add 4000 --script Han
  maxlm tokenizer extend Llama-3.2-1B japanese.txt OUT --add 8000 --script Han --script Hiragana --script Katakana

TOKENIZER may also be a folder of Hugging Face: tokenizer.json (BPE, byte-level BPE, Unigram) or tokenizer.model.
New pieces get the ids after all tokens. To round up the number of rows in the model: maxlm model resize --multiple-of.
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer; extend one; show how it splits text",
        description="Train a SentencePiece tokenizer with chat tokens, extend a tokenizer, show how it splits text.",
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

    extend = actions.add_parser(
        "extend",
        help="add pieces for another language to a tokenizer, without changing the ids that it has",
        description=_EXTEND,
        epilog=_EXTEND_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    extend.add_argument("tokenizer", metavar="TOKENIZER", help="the folder of a tokenizer, ours or Hugging Face's")
    extend.add_argument("text", metavar="TEXT", help="a folder of `maxlm data build`, or a text file, to learn from")
    extend.add_argument("output", metavar="OUT", help="the new folder; an earlier tokenizer there is replaced")
    extend.add_argument("--add", type=count, required=True, metavar="N", help="add at most this many pieces")
    extend.add_argument(
        "--script",
        action="append",
        default=[],
        metavar="NAME",
        help="add only pieces of characters of this script, such as Han, Hangul or Cyrillic; repeatable"
        " (any letters, and punctuation that is not ASCII)",
    )
    extend.add_argument(
        "--character-coverage",
        type=fraction,
        default=0.9995,
        metavar="X",
        help="share of characters in the text that get a piece of their own, frequent ones first (%(default)s)",
    )
    extend.add_argument("--seed", type=seed, default=0, help="seed of the sample of a very long text (%(default)s)")
    extend.add_argument("--json", action="store_true", help="print what was added as one JSON object")
    extend.set_defaults(func=run_extend)

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


def run_extend(args: argparse.Namespace) -> int:
    """Extend, then print what changed."""
    from dataclasses import asdict

    from maxlm.tokenizer.extend import extend_tokenizer

    found = extend_tokenizer(
        args.tokenizer,
        args.text,
        args.output,
        add=args.add,
        scripts=args.script,
        character_coverage=args.character_coverage,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps({"output": args.output, **asdict(found)}))
        return 0
    print(
        f"{args.output}: {found.vocab_size:,} tokens, of which {found.pieces_added:,} are new and {found.pieces_used:,}"
        f" of these used in the text; {found.pieces_known:,} more were there already"
    )
    text, english = (found.text_before, found.text_after), (found.english_before, found.english_after)
    print(
        "held-out text: {0.characters_per_token} -> {1.characters_per_token} characters per token,"
        " {0.tokens_per_character} -> {1.tokens_per_character} tokens per character".format(*text)
    )
    print(
        "English: {0.characters_per_token} -> {1.characters_per_token} characters per token,"
        " {0.tokens_per_word} -> {1.tokens_per_word} tokens per word".format(*english)
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
