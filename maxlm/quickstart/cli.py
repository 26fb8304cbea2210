"""`maxlm quickstart`."""

import argparse


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="the whole way, from text to a served chat model, in minutes on a CPU",
        description=(
            "Build a small chat model from the text that this Python carries: clean and pack it, train a tokenizer,"
            " pretrain, fine-tune on questions about the standard library, align by reward, evaluate, quantise to int8,"
            " and chat with it over HTTP. Run it again to go on where it stopped."
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
    import sys

    from maxlm.quickstart.checks import ChecksFailed
    from maxlm.quickstart.pipeline import Quickstart
    from maxlm.serve.cli import need_server

    need_server()  # the last stage: told before the minutes of the others
    job = Quickstart(args.output, args.overrides)
    failure = None
    try:
        summary = job.run()
    except ChecksFailed as error:
        summary, failure = error.summary, error
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(job, summary)
    if failure is not None:
        print(f"maxlm: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


def show(job, summary: dict) -> None:
    """What was reached, where it lies, and how to talk to it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="maxlm quickstart", title_justify="left")
    table.add_column("must show")
    table.add_column("measured", overflow="fold")
    table.add_column("")
    for check in summary["checks"]:
        table.add_row(check["name"], check["told"], "[green]yes" if check["passed"] else "[red]NO")
    seconds = summary["seconds"]
    console = Console()
    console.print(table)
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), markup=False)
    console.print(f"total {sum(seconds.values()):.0f} s; pretraining {summary['tokens_per_second']:,.0f} tokens/s")
    console.print(f"chat: {summary['chat']['prompt']} -> {summary['chat']['reply']}", markup=False)
    console.print(f"report: {job.path('report.html')}\nmodel:  {job.path('int8')} (float: {job.path('align')})")
    console.print(f"chat:   maxlm chat {job.path('int8')}   or   maxlm serve {job.path('int8')}")
