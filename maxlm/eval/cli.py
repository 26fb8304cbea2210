"""`maxlm eval`."""

import argparse
import json
from pathlib import Path

from maxlm.runtime.arguments import at_least_zero, count, seed

_EVAL_EPILOG = """\
examples:
  maxlm eval runs/small                                    bits per byte on its held-out data
  maxlm eval runs/small --data my-text.txt                 ... on your own text
  maxlm eval runs/sft --task questions.jsonl               accuracy, with a 95% interval
  maxlm eval runs/sft --task questions.jsonl --compare runs/align       and the difference of another model
  maxlm eval runs/small --max-bits-per-byte 2.2            exit code 1 if it is worse: for scripts

A task file has one JSON object per line:
  {"prompt": "2 + 2 =", "answer": "4"}
  {"messages": [{"role": "user", "content": "Capital of France?"}], "answer": "Paris", "kind": "capitals"}
  {"prompt": "The sky is", "choices": [" blue", " loud"], "answer": 0}
  {"prompt": "Is 7 prime? Answer: yes or no", "answer": "yes", "format": {"kind": "choices", "choices": ["yes", "no"]}}
With format, the answer is read from what is generated (docs/prompts.md).
With choices, the model takes the one with the highest log-probability after the prompt. Choices are appended to the
prompt verbatim, so include the leading space.
"""


def register(subparsers) -> None:
    """Add the subcommand."""
    evaluation = subparsers.add_parser(
        "eval",
        help="measure bits per byte, perplexity and accuracy, with intervals and baselines",
        description="Measure a model on held-out text and on task files, against n-gram models and xz.\n"
        "Intervals are 95% bootstrap intervals over documents or examples.",
        epilog=_EVAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_argument(
        "model", metavar="MODEL", help="folder of a run, checkpoint, int8 bundle or Hugging Face model"
    )
    evaluation.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of `maxlm data build` (its held-out split) or a .txt, .md, .jsonl or .parquet file;"
        " default without --task: the data that the model was trained on",
    )
    evaluation.add_argument("--task", action="append", default=[], metavar="FILE", help="a task file; repeatable")
    evaluation.add_argument("--compare", metavar="MODEL", help="another model; print its results minus the first's")
    evaluation.add_argument("--no-baselines", action="store_true", help="skip the n-gram models and xz")
    evaluation.add_argument("--max-documents", type=count, metavar="N", help="held-out documents, sampled evenly (all)")
    evaluation.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="per answer (%(default)s)")
    evaluation.add_argument("--temperature", type=at_least_zero, default=0.0, metavar="T", help="%(default)s: greedy")
    evaluation.add_argument(
        "--ignore-keys", nargs="+", default=[], metavar="KEY", help="unknown keys of task files to ignore"
    )
    evaluation.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; repeatable")
    evaluation.add_argument("--seed", type=seed, default=0, help="seed of intervals and sampled answers (%(default)s)")
    evaluation.add_argument("--max-bits-per-byte", type=at_least_zero, metavar="X", help="exit code 1 above this")
    evaluation.add_argument(
        "--min-accuracy", type=at_least_zero, metavar="X", help="exit code 1 below this, on any task"
    )
    evaluation.add_argument("--output", metavar="FILE", help="write all results as JSON, including each example")
    evaluation.add_argument("--json", action="store_true", help="print JSON instead of tables")
    evaluation.set_defaults(func=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    from maxlm.errors import CheckFailed, DataError
    from maxlm.eval.run import evaluate
    from maxlm.eval.tables import print_evaluation
    from maxlm.runtime.manifest import write_json

    if args.output and Path(args.output).is_dir():
        raise DataError(f"--output {args.output}: is a folder; give a file path")
    evaluation = evaluate(
        args.model,
        data=args.data,
        task_files=args.task,
        compare=args.compare,
        with_baselines=not args.no_baselines,
        max_documents=args.max_documents,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop=args.stop,
        ignore_keys=args.ignore_keys,
        seed=args.seed,
    )
    result = evaluation.to_dict()
    if args.output:
        try:
            write_json(Path(args.output), result)
        except OSError as error:
            raise DataError(f"--output {args.output}: cannot be written: {error.strerror}") from None
    failed = _failed_checks(result, args)
    if args.json:
        print(json.dumps({**result, "failed": failed}, ensure_ascii=False))
    else:
        print_evaluation(evaluation)
    if failed and not args.json:
        raise CheckFailed("; ".join(failed))
    return 1 if failed else 0


def _failed_checks(result: dict, args: argparse.Namespace) -> list[str]:
    failed = []
    if args.max_bits_per_byte is not None and result["text"]:
        value = result["text"]["bits_per_byte"]["value"]
        if not value <= args.max_bits_per_byte:
            failed.append(f"{value:.4f} bits per byte exceed {args.max_bits_per_byte}")
    if args.min_accuracy is not None:
        for task in result["tasks"]:
            value = task["accuracy"]["value"]
            if not value >= args.min_accuracy:
                failed.append(f"{task['task']}: accuracy {value:.4f} is below {args.min_accuracy}")
    return failed
