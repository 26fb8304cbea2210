"""`maxlm prompt`."""

import argparse
import json

from maxlm.runtime.arguments import add_config, count

EPILOG = """\
examples:
  maxlm prompt show configs/prompt/few_shot.yaml --data questions.jsonl       the first prompts, as a model gets them
  maxlm prompt show FILE --data questions.jsonl --tokenizer runs/sft/tokenizer -n 1    with the number of tokens
  maxlm prompt build FILE --data questions.jsonl --output task.jsonl          all of them, for `maxlm eval --task`

a configuration, whose variables are the columns of the data:
  kind: prompt
  question: "{{ question }} {{ format }}"
  answer: "Answer: {{ label }}"
  format: {kind: choices, choices: [yes, no]}
  examples: {file: train.jsonl, count: 4, select: similar}
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    prompt = subparsers.add_parser(
        "prompt",
        help="build prompts from templates and examples",
        description="Build the prompts of a file's records from a template, examples and the form of the answer"
        " (docs/prompts.md).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = prompt.add_subparsers(metavar="ACTION", required=True)
    for name, action, summary in (
        ("show", run_show, "print the first prompts"),
        ("build", run_build, "write all prompts as a task file"),
    ):
        parser = actions.add_parser(
            name,
            help=summary,
            description=f"{summary.capitalize()}.",
            epilog=f"example: maxlm prompt {name} configs/prompt/few_shot.yaml --data questions.jsonl"
            + (" --output task.jsonl" if name == "build" else ""),
        )
        add_config(parser, "prompt")
        parser.add_argument("--data", required=True, metavar="FILE", help="JSON, JSONL or Parquet with the columns")
        parser.add_argument("--without-answers", action="store_true", help="the data has no right answers")
        parser.set_defaults(func=action)
        if name == "show":
            parser.add_argument("-n", type=count, default=3, metavar="N", help="number of prompts (3)")
            parser.add_argument("--tokenizer", metavar="FOLDER", help="count tokens, with its chat template")
            parser.add_argument("--json", action="store_true", help="print one JSON object a line")
        else:
            parser.add_argument("--output", required=True, metavar="FILE", help="a JSONL file to write")


def run_show(args: argparse.Namespace) -> int:
    from itertools import islice

    from maxlm.config.load import load_config
    from maxlm.data.examples.prompts import as_task, build_prompts, open_builder
    from maxlm.tokenizer.codec import Tokenizer

    config = load_config(args.config, args.overrides, kind="prompt")
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    builder = open_builder(config, where=args.config)
    prompts = build_prompts(builder, args.data, with_answers=not args.without_answers)
    for place, built in islice(prompts, args.n):
        tokens = None if tokenizer is None else _num_tokens(tokenizer, built.prompt)
        if args.json:
            shown = {**as_task(config, built, place), "examples": built.examples, "tokens": tokens}
            print(json.dumps(shown, ensure_ascii=False))
            continue
        print(f"===== {place}" + ("" if tokens is None else f", {tokens} tokens"))
        if built.examples:
            print(f"examples: {', '.join(built.examples)}")
        messages = [{"role": "text", "content": built.prompt}] if isinstance(built.prompt, str) else built.prompt
        for message in messages:
            print(f"----- {message['role']}\n{message['content']}")
        if built.answer is not None:
            print(f"----- right answer\n{built.answer}")
    return 0


def run_build(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maxlm.config.load import load_config
    from maxlm.data.examples.prompts import as_task, build_prompts, open_builder
    from maxlm.errors import DataError
    from maxlm.runtime.progress import console

    config = load_config(args.config, args.overrides, kind="prompt")
    output = Path(args.output)
    if output.is_dir() or not output.parent.is_dir():
        raise DataError(f"--output {output}: must be a file in an existing folder")
    if output.exists() and output.samefile(args.data):
        raise DataError(f"--output {output}: is the data; give another path")
    builder = open_builder(config, where=args.config)
    prompts = build_prompts(builder, args.data, with_answers=not args.without_answers)
    records = [as_task(config, built, place) for place, built in prompts]
    temporary = output.with_name(f"{output.name}.tmp")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(output)
    console.print(f"{output}: {len(records)} prompts", markup=False, highlight=False)
    return 0


def _num_tokens(tokenizer, prompt) -> int:
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt, bos=True))
    return len(tokenizer.encode_chat(prompt, generation_prompt=True).ids)
