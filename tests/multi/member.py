"""One process of a test's run: `maxlm ARGUMENTS`, with an injected fault and a report.

  member.py [--at STEP ACTION] [--once FILE] [--supervise N] REPORT train CONFIG ...

--at: after that many steps of this process, a signal (SIGTERM, SIGKILL) to itself, or `raise`.
--once: only if FILE does not exist; creates it.
--supervise: as for `maxlm train`, with this script as the child.

The report of a process that ends by itself is JSON: the rows read in each step, the bytes read from checkpoints, how
often initial values were drawn, and the bytes of its part of all arrays.
"""

import argparse
import json
import os
import signal
import sys
import zlib
from pathlib import Path


def act_after(step: int, action: str, once: Path | None) -> None:
    from maxlm.train.metrics import StepWindow

    add, count = StepWindow.add, iter(range(1, 1 << 30))

    def add_then_act(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if next(count) == step and not (once and once.exists()):
            if once:
                once.touch()
            if action == "raise":
                raise KeyError("planted")
            os.kill(os.getpid(), getattr(signal, action))

    StepWindow.add = add_then_act


def watch() -> dict:
    """Installs counters; returns the counts."""
    from maxlm.core import parameters
    from maxlm.data.loader import PackedRows
    from maxlm.train import trained_model

    seen = {"rows": {}, "initialized": 0}
    batch, initialize = PackedRows.batch, parameters.initialize

    def recorded_batch(self, step, *, shard=0, num_shards=1):
        rows = batch(self, step, shard=shard, num_shards=num_shards)
        if self.num_steps is None:
            seen["rows"][step] = [shard, num_shards, [zlib.crc32(row.tobytes()) for row in rows["tokens"]]]
        return rows

    def counted_initialize(*args, **kwargs):
        seen["initialized"] += 1
        return initialize(*args, **kwargs)

    PackedRows.batch, trained_model.initialize = recorded_batch, counted_initialize
    return seen


def report(path: str, seen: dict) -> None:
    import tensorstore

    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    seen["bytes_read"] = sum(value["value"] for metric in metrics for value in metric["values"])
    Path(path).write_text(json.dumps(seen), encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("report")
    parser.add_argument("--at", nargs=2, metavar=("STEP", "ACTION"))
    parser.add_argument("--once", type=Path)
    parser.add_argument("--supervise", type=int)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    if args.supervise is not None:
        from maxlm.config.load import load_config
        from maxlm.runtime.supervise import supervise

        config = load_config(args.arguments[1], [], kind="train")
        place = arguments.index("--supervise")
        command = [sys.executable, __file__, *arguments[:place], *arguments[place + 2 :]]
        return supervise(command, config, restarts=args.supervise)

    from maxlm.cli import main as maxlm

    if args.at:
        act_after(int(args.at[0]), args.at[1], args.once)
    seen = watch()
    code = maxlm(args.arguments)
    report(args.report, seen)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
