"""`maxlm score`."""

import argparse
import json

SCORE_EPILOG = """\
examples:
  maxlm score runs/reward answers.jsonl                     one JSON line per record; the summary on standard error
  maxlm score runs/reward pairs.jsonl --output scores.jsonl     the lines in a file; prints mean, accuracy, margin

a record is one JSON object per line:
  {"prompt": "2 + 2 =", "completion": " 4"}
  {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]}
  {"prompt": [{"role": "user", "content": "Capital of France?"}], "chosen": "Paris", "rejected": "Lyon"}
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    score = subparsers.add_parser(
        "score",
        help="score answers with a trained reward model",
        description="Score the answers of a JSONL file with a reward model (objective.kind=reward).",
        epilog=SCORE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("model", metavar="MODEL", help="a run folder or checkpoint of a reward model")
    score.add_argument("file", metavar="FILE", help="JSONL, also .gz or .zst: prompts with answers or preference pairs")
    score.add_argument("--output", metavar="FILE", help="write the lines to FILE instead of standard output")
    score.add_argument("--json", action="store_true", help="print one JSON object with the summary and the lines")
    score.set_defaults(func=run_score)


def run_score(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maxlm.errors import DataError
    from maxlm.runtime.progress import console
    from maxlm.scoring.score import score_file, summarize

    if args.output:
        # Checked before scoring, so that a bad path does not waste the wait.
        output = Path(args.output)
        if output.is_dir() or not output.parent.is_dir():
            raise DataError(f"--output {output}: must be a file in an existing folder")
        if output.exists() and output.samefile(args.file):
            raise DataError(f"--output {output}: is the file to score; give another path")
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
    parts = [f"{summary['records']} records, mean score {_interval(summary['mean'])}"]
    if "pairs" in summary:
        parts.append(f"{summary['pairs']} pairs: chosen scores higher in {summary['accuracy']['value']:.1%}")
        parts.append(f"margin {_interval(summary['margin'])}")
    console.print(", ".join(parts), markup=False, highlight=False)
    return 0


def _interval(value: dict) -> str:
    from maxlm.core.interval import Interval

    return Interval(**value).format(4)
