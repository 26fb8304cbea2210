"""`maxlm quickstart`."""

import argparse
import sys


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="run the whole pipeline, from text to a served chat model, in minutes on a CPU",
        description=(
            "Build a small chat model from the text that ships with Python: clean and pack it, train a tokenizer,"
            " pretrain, fine-tune on questions about the standard library, align by reward, evaluate, quantize to int8,"
            " and chat with it over HTTP. Run it again to resume where it stopped."
        ),
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="RECIPE.key=value", help="such as pretrain.steps=800"
    )
    parser.add_argument("--output", default="runs/quickstart", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    import json

    from maxlm.quickstart.checks import ChecksFailed, checks
    from maxlm.quickstart.stages import Quickstart
    from maxlm.serve.cli import need_server

    need_server()  # the last stage: fail before the others have run for minutes
    job = Quickstart(args.output, args.overrides)
    summary = job.run()
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(job, summary)
    failed = [check for check in checks(summary) if not check.passed]
    # If a stage failed, report its error, not the checks that it left unmeasured.
    error = next(iter(job.errors.values()), None) or (ChecksFailed(failed) if failed else None)
    if error is not None:
        print(f"maxlm: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(job, summary: dict) -> None:
    """Print the results, where they are, and how to chat with the model."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if answers := summary.get("chat", {}).get("answers"):
        asked = Table(title="Held-out questions, answered by the running server", title_justify="left")
        for column in ("question", "answer", ""):
            asked.add_column(column, overflow="fold")
        for answer in answers:
            verdict = "[green]correct" if answer["right"] else f"[red]wrong:[/] {escape(answer['answer'])}"
            asked.add_row(escape(answer["prompt"]), escape(answer["reply"]), verdict)
        console.print(asked)
    table = Table(title="maxlm quickstart", title_justify="left")
    table.add_column("check")
    table.add_column("measured", overflow="fold")
    table.add_column("")
    for check in summary["checks"]:
        measured = check["measured"] if check["passed"] else f"{check['measured']}; {check['remedy']}"
        table.add_row(check["name"], escape(measured), "[green]yes" if check["passed"] else "[red]NO")
    console.print(table)
    seconds = summary["seconds"]
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), markup=False)
    rate = summary.get("tokens_per_second")
    console.print(
        f"total {sum(seconds.values()):.0f} s" + (f"; pretraining {rate:,.0f} tokens/s" if rate else ""), markup=False
    )
    console.print(f"report: {job.path('report.html')}", markup=False)
    if "align" not in summary["not_done"]:
        model = job.served()
        console.print(f"model:  {model} (float: {job.path('align')})", markup=False)
        console.print(f"chat:   maxlm chat {model}   or   maxlm serve {model}", markup=False)
