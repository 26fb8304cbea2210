"""`maxlm score`."""

import argparse
import json
from pathlib import Path
from typing import Any

from maxlm.runtime.arguments import at_least_zero

SCORE_EPILOG = """\
examples:
  maxlm score runs/reward answers.jsonl                     one JSON line per record; the summary on standard error
  maxlm score runs/reward pairs.jsonl --output scores.jsonl     the lines in a file; prints mean, accuracy, margin
  maxlm score runs/a runs/b runs/c answers.jsonl --uncertainty 1     mean of three models minus their deviation
  maxlm score runs/process_reward solutions.jsonl           the probability of each step, and the lowest as score

a record is one JSON object per line:
  {"prompt": "2 + 2 =", "completion": " 4"}
  {"prompt": "2 + 2 =", "completions": [" 4", " 5"]}
  {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]}
  {"prompt": [{"role": "user", "content": "Capital of France?"}], "chosen": "Paris", "rejected": "Lyon"}
  {"prompt": "2 + 2 + 2 =", "steps": ["2 + 2 = 4", "4 + 2 = 6"]}          for a process reward model

An interrupted command with --output continues where it stopped when it is run again.
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    score = subparsers.add_parser(
        "score",
        help="score answers with trained reward models",
        description="Score the answers of a JSONL file with reward models (objective.kind=reward or process_reward).",
        epilog=SCORE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("models", metavar="MODEL", nargs="+", help="run folders or checkpoints of reward models")
    score.add_argument("file", metavar="FILE", help="JSONL, also .gz or .zst: prompts with answers or preference pairs")
    score.add_argument("--output", metavar="FILE", help="write the lines to FILE instead of standard output")
    score.add_argument("--json", action="store_true", help="print one JSON object with the summary and the lines")
    score.add_argument(
        "--uncertainty",
        type=at_least_zero,
        default=0.0,
        metavar="K",
        help="the score is the mean of several models minus K standard deviations (default 0)",
    )
    score.add_argument(
        "--step-score",
        choices=("min", "product", "last"),
        default="min",
        help="the score of a solution, of the probabilities of its steps (default min)",
    )
    score.set_defaults(func=run_score)


def run_score(args: argparse.Namespace) -> int:
    from maxlm.runtime.progress import console
    from maxlm.scoring.score import RewardModels, read_answers, score_chunks, summarize

    # Checked before the models are loaded, so that a bad path does not waste the wait.
    output = None if args.output is None else _open_output(args)
    records = read_answers(args.file)
    lines = [] if output is None else _lines_so_far(output, args, len(records))
    num_resumed = len(lines)
    if num_resumed < len(records):
        models = RewardModels(args.models, uncertainty=args.uncertainty, step_score=args.step_score)
        models.check(records)
        if output is not None:
            _begin_output(output, args, lines)
        for scored in score_chunks(models, records[num_resumed:]):
            new = [item.to_dict() for item in scored]
            lines += new
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
    model: Any = args.models[0] if len(args.models) == 1 else args.models
    summary = {"model": model, "file": args.file, **summarize(lines)}
    if args.json:
        print(json.dumps(summary if output is not None else {**summary, "scores": lines}))
        return 0
    if output is None:
        print("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), end="")
    parts = [f"{summary['records']} records, mean score {_interval(summary['mean'])}"]
    if num_resumed:
        parts.insert(0, f"{num_resumed} records were scored before")
    if summary["answers"] > summary["records"] and "pairs" not in summary:
        parts.append(f"{summary['answers']} answers")
    if "pairs" in summary:
        parts.append(f"{summary['pairs']} pairs: chosen scores higher in {summary['accuracy']['value']:.1%}")
        parts.append(f"margin {_interval(summary['margin'])}")
    console.print(", ".join(parts), markup=False, highlight=False)
    return 0


def _open_output(args: argparse.Namespace) -> Path:
    from maxlm.errors import DataError

    output = Path(args.output)
    if output.is_dir() or not output.parent.is_dir():
        raise DataError(f"--output {output}: must be a file in an existing folder")
    if output.exists() and Path(args.file).exists() and output.samefile(args.file):
        raise DataError(f"--output {output}: is the file to score; give another path")
    return output


def _inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What the lines of an output depend on."""
    from maxlm.runtime.manifest import content_hash

    return {
        "models": [content_hash(model) for model in args.models],
        "file": content_hash(args.file),
        "uncertainty": args.uncertainty,
        "step_score": args.step_score,
    }


def _inputs_path(output: Path) -> Path:
    return output.with_name(output.name + ".inputs.json")


def _lines_so_far(output: Path, args: argparse.Namespace, num_records: int) -> list[dict[str, Any]]:
    """The lines that an earlier command has written to the output from the same inputs."""
    from maxlm.errors import DataError
    from maxlm.scoring.score import parse_lines

    if not output.exists():
        return []
    again = "give another path, or remove it to score again"
    try:
        inputs = json.loads(_inputs_path(output).read_text(encoding="utf-8"))
        lines = parse_lines(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"--output {output}: exists and is not of an interrupted `maxlm score`; {again}") from None
    if inputs != _inputs(args) or len(lines) > num_records:
        raise DataError(f"--output {output}: holds scores of other models, records or settings; {again}")
    return lines


def _begin_output(output: Path, args: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """Write what the lines depend on, and the lines so far, without one that was cut off."""
    from maxlm.runtime.manifest import write_json

    output.unlink(missing_ok=True)
    write_json(_inputs_path(output), _inputs(args))
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(output)


def _interval(value: dict) -> str:
    from maxlm.core.interval import Interval

    return Interval(**value).format(4)
