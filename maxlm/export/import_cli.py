"""`maxlm import`."""

import argparse
import json

from maxlm.errors import RequestError

_DESCRIPTION = """\
Convert a model of another format into a run folder, whose checkpoint of step 0 has its weights, so that all commands
take it and training can start from it (init_from).
"""

_EPILOG = """\
examples:
  maxlm import hf Qwen3-0.6B runs/qwen3
  maxlm train configs/post/sft.yaml init_from=runs/qwen3 output=runs/qwen3-sft
  maxlm export runs/qwen3-sft Qwen3-0.6B-sft --format hf
  maxlm import peft Qwen3-0.6B-lora runs/qwen3-lora --base runs/qwen3

generate, chat, serve, eval and export also take the Hugging Face folder itself.
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "import",
        help="convert a model of Hugging Face into a run folder, to train on",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "format",
        choices=["hf", "peft"],
        metavar="FORMAT",
        help="hf: a model of Hugging Face's transformers; peft: adapters of Hugging Face's peft",
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="config.json, safetensors files, and its tokenizer if it has one; of adapters adapter_config.json and"
        " adapter_model.safetensors",
    )
    parser.add_argument("output", metavar="OUT", help="the run folder; an earlier import there is replaced")
    parser.add_argument(
        "--base", metavar="RUN", help="peft: the run folder of the model that the adapters were trained on"
    )
    parser.add_argument("--json", action="store_true", help="print what was imported as one JSON object")
    parser.set_defaults(func=run_import)


def run_import(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from maxlm.export.importing import import_huggingface

    if (args.format == "peft") != (args.base is not None):
        raise RequestError("--base RUN names the model of adapters: give it with the format peft, and only then")
    if args.format == "peft":
        return _import_peft(args)
    found = import_huggingface(args.folder, args.output)
    if args.json:
        print(json.dumps({"output": args.output, **asdict(found)}))
        return 0
    if found.tokenizer_size is None:
        tokens = "no tokenizer, so it takes token ids only"
    else:
        tokens = f"a tokenizer of {found.tokenizer_size:,} tokens"
    modules = f" and {found.modules} prediction modules" if found.modules else ""
    print(
        f"{args.output}: {found.family}{modules} with {found.parameters:,} parameters in {found.dtype}, for up to"
        f" {found.max_length:,} tokens; {tokens}"
    )
    return 0


def _import_peft(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from maxlm.export.importing import import_peft

    found = import_peft(args.folder, args.output, args.base)
    if args.json:
        print(json.dumps({"output": args.output, **asdict(found)}))
    else:
        print(f"{args.output}: {found.kind} of {found.matrices} stacked matrices, {found.parameters:,} parameters")
    return 0
