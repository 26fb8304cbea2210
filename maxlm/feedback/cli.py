"""`maxlm feedback`."""

import argparse
import json
from collections.abc import Iterator

from maxlm.runtime.arguments import add_config

EPILOG = """\
examples:
  maxlm feedback configs/feedback/prefer.yaml               which answer is better: pairs for DPO and reward models
  maxlm feedback configs/feedback/revise.yaml               critique and revise answers: chats for SFT
  maxlm feedback configs/feedback/rate.yaml                 rate answers from 1 to 10, and keep the good ones
  maxlm feedback configs/feedback/answer.yaml               answers of a teacher: chats for SFT and distillation
  maxlm feedback CONFIG judge.model=gpt-4o-mini limits.max_cost=2     any setting, with key=value

the records, one JSON object per line; the model of the configuration answers those without answers:
  {"prompt": [{"role": "user", "content": "Why is the sky blue?"}]}
  {"prompt": "Why is the sky blue?", "answers": ["Rayleigh scattering.", "Because."]}
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

the output folder:
  preferences.jsonl or chats.jsonl    what objective.kind=preference, reward, sft or distill_chat reads
  aside.jsonl                         what was left out, with line and reason: ties, equal answers, unusable replies
  replies.jsonl                       every reply; the same command asks again only for what is missing
  manifest.json                       inputs, settings, counts, bias for a place, tokens, cost

The API key is read from the environment variable that judge.api_key_variable names.
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    feedback = subparsers.add_parser(
        "feedback",
        help="let a model judge, rate or revise answers: preference data and chats",
        description="Make training data from the feedback of a judge, under the principles of a constitution.\n"
        "The judge is a model of yours or any OpenAI-compatible API (docs/ai-feedback.md).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(feedback, "feedback")
    feedback.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    feedback.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from maxlm.config.load import load_config
    from maxlm.feedback.run import run_feedback
    from maxlm.runtime.progress import console

    config = load_config(args.config, args.overrides, kind="feedback")
    summary = run_feedback(config)
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
        return 0
    for line in _lines(config.output, summary):
        console.print(line, markup=False, highlight=False)
    return 0


def _lines(output: str, summary: dict) -> Iterator[str]:
    """The summary in sentences."""
    aside = ", ".join(f"{count} {reason}" for reason, count in summary["aside"].items())
    counts = f"{output}: {summary['made']} made of {summary['records']} records"
    yield f"{counts}; left out: {aside}" if aside else counts
    if summary.get("votes"):
        first = summary["shown_first_wins"]
        yield (
            f"{summary['votes']} votes, mean confidence {summary['mean_confidence']:.2f}; the two orders disagree in"
            f" {summary['order_disagreements']:.1%}, which are ties"
            + ("" if first is None else f"; the answer shown first wins {first:.1%} of comparisons")
        )
    yield (
        f"{summary['replies']} replies, {summary['replies_from_log']} of them recorded earlier; {summary['retries']}"
        f" retries, {summary['unreadable']} unreadable; {summary['requests_total']} requests in all, cost"
        f" {summary['cost_total']:.6g}"
    )
