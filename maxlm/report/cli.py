"""`maxlm report`."""

import argparse
import json
import time
from pathlib import Path

from maxlm.runtime.arguments import count

EPILOG = """\
examples:
  maxlm report runs/small                   loss curves, configuration, data provenance: runs/small/report.html
  maxlm report runs/small --watch           while it trains: rewrite the page, and let the browser reload it
  maxlm report runs/small runs/large        overlaid curves of several runs: runs/small/compare.html
  maxlm report runs/quickstart              all stages of a quickstart on one page
"""
_WATCH_SECONDS = 5


def register(subparsers) -> None:
    """Add the subcommand."""
    report = subparsers.add_parser(
        "report",
        help="write an HTML report of a run, several runs, or a quickstart",
        description="Write one self-contained HTML file: curves of a run, a comparison of runs, or all stages of\n"
        "a quickstart. An unfinished run is shown with the records so far.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("folders", metavar="FOLDER", nargs="+", help="a run or a quickstart folder; up to 4 runs")
    report.add_argument(
        "--watch",
        nargs="?",
        type=count,
        const=_WATCH_SECONDS,
        metavar="SECONDS",
        help=f"rewrite the page every SECONDS ({_WATCH_SECONDS}) until the runs have ended; the browser reloads it",
    )
    report.add_argument("--json", action="store_true", help="print the path as JSON")
    report.set_defaults(func=run_report)


def run_report(args: argparse.Namespace) -> int:
    from maxlm.report.report import have_finished, write_comparison, write_report

    def write(refresh_seconds: int) -> Path:
        if len(args.folders) == 1:
            return write_report(args.folders[0], refresh_seconds=refresh_seconds)
        return write_comparison(args.folders, refresh_seconds=refresh_seconds)

    path = write(args.watch or 0)
    print(json.dumps({"report": str(path)}) if args.json else path, flush=True)
    if args.watch is None:
        return 0
    try:
        while not all(have_finished(Path(folder)) for folder in args.folders):
            time.sleep(args.watch)
            write(args.watch)
    except KeyboardInterrupt:
        pass
    # The final page does not reload.
    write(0)
    return 0
