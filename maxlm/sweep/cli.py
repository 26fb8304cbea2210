"""`maxlm sweep`."""

import argparse

from maxlm.runtime.arguments import add_config

EPILOG = """\
examples:
  maxlm sweep configs/sweep/learning_rate.yaml --dry-run    list the trials and their cost
  maxlm sweep configs/sweep/learning_rate.yaml              run them; the same command resumes
  maxlm sweep FILE method.trials=16 overrides.steps=200     override any setting of the sweep
  maxlm train runs/sweep/learning_rate/best.yaml            train with the best setting
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="search hyperparameters, and predict a larger model by a scaling law",
        description="Run many trials of one training configuration: grid search, random search or successive halving."
        " Over a ladder of sizes, fit a scaling law and the best setting at each size, and predict a larger one."
        " The output folder has index.html, trials.jsonl, best.yaml and manifest.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, "sweep")
    parser.add_argument("--dry-run", action="store_true", help="list the trials, their steps and cost; run nothing")
    parser.add_argument("--json", action="store_true", help="print the summary, or with --dry-run the list, as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    import json
    import os
    import sys

    from maxlm.config.load import load_config
    from maxlm.errors import CheckFailed

    config = load_config(args.config, args.overrides, kind="sweep")
    environment = dict(os.environ)
    # The trials need the accelerator: this process must not claim it.
    os.environ["JAX_PLATFORMS"] = "cpu"

    from maxlm.sweep.run import run_sweep
    from maxlm.sweep.tables import print_plan, print_summary

    if args.dry_run:
        from maxlm.sweep.forecast import forecast

        found = forecast(config)
        print(json.dumps(found, indent=2)) if args.json else print_plan(found)
        return 0
    summary = run_sweep(config, environment=environment)
    print(json.dumps(summary, indent=2)) if args.json else print_summary(config, summary)
    if failed := summary["trials"].get("failed", 0):
        log = f"{config.output}/trials/*.log"
        print(f"maxlm: {failed} trials failed (see {log}); the same command runs them again", file=sys.stderr)
        return CheckFailed.exit_code
    return 0
