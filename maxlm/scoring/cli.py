"""`maxlm score`."""

import argparse
import json

SCORE_EPILOG = """\
examples:
  maxlm score runs/reward answers.jsonl                     a JSON line for each record; the summary on standard error
  maxlm score runs/reward pairs.jsonl --output scores.jsonl     the lines in a file; mean, accuracy, margin are printed

a record is one JSON object a line:
  {"prompt": "2 + 2 =", "completion": " 4"}
  {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]}
  {"prompt": [{"role": "user", "content": "Capital of France?"}], "chosen": "Paris", "rejected": "Lyon"}
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    score = subparsers.add_parser(
        "score",
        help="the scores that a trained reward model gives to answers",
        description="Score the answers of a JSONL file with a reward model (objective.kind=reward).",
        epilog=SCORE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("model", metavar="MODEL", help="a run folder or checkpoint of a reward model")
    score.add_argument(
        "file", metavar="FILE", help="JSONL, also .gz or .zst: prompts with answers, or with pairs of them"
    )
    score.add_argument("--output", metavar="FILE", help="write the lines here instead of to standard output")
    score.add_argument("--json", action="store_true", help="print one JSON object instead: the summary, and the lines")
    score.set_defaults(func=run_score)


def run_score(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maxlm.errors import DataError
    from maxlm.runtime.progress import console
    from maxlm.scoring.score import score_file, summarize

    if args.output:
        # A mistake in it must not cost the wait for the scores.
        output = Path(args.output)
        if output.is_dir() or not output.parent.is_dir():
            raise DataError(f"--output {output}: must be a file in a folder that exists")
        if output.exists() and output.samefile(args.file):
            raise DataError(f"--output {output}: is the file that is scored; name another one")
    scored = score_file(args.model, args.file)
    summary = {"model": args.model, "file": args.file, **summarize(scored)}
    lines = [json.dumps(item.to_dict(), ensure_ascii=False) + "\n" for item in scored]
    if args.output:
        output.write_text("".join(lines), encoding="utf-8")
    if args.json:
        print(json.dumps(summary if args.output else {**summary, "scores": [item.to_dict() for item in scored]}))
        return 0
    if not args.output:
        print("".join(lines), end="")
    told = [f"{summary['records']} records, mean score {_interval(summary['mean'])}"]
    if "pairs" in summary:
        told.append(f"{summary['pairs']} pairs: chosen ahead in {summary['accuracy']['value']:.1%}")
        told.append(f"margin {_interval(summary['margin'])}")
    console.print(", ".join(told), markup=False, highlight=False)
    return 0


def _interval(value: dict) -> str:
    from maxlm.core.interval import Interval

    return Interval(**value).format(4)
