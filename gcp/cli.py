"""`maxlm submit`: train on a Cloud TPU."""

import argparse
import dataclasses
import json
from pathlib import Path

from maxlm_gcp.job import GENERATIONS, Capacity, Tpu, TpuJob

from maxlm.errors import ConfigError
from maxlm.runtime.arguments import count, count_or_zero

DESCRIPTION = """\
Train on a Cloud TPU: create it, send the last commit of this folder, install it, and start
`maxlm train CONFIG` on all workers. Needs gcloud, logged in, with the TPU API enabled.

Check first what would run, then run it:
  maxlm submit configs/quickstart/pretrain.yaml steps=2000 --dry-run \\
      --name=tiny-1 --project=my-project --zone=us-west4-a --accelerator=v5litepod-16 --bucket=gs://my-bucket/runs \\
      --input=runs/quickstart/data=gs://my-bucket/data --input=runs/quickstart/tokenizer=gs://my-bucket/tokenizer
  maxlm submit configs/quickstart/pretrain.yaml steps=2000 --spot --delete-after \\
      --name=tiny-1 --project=my-project --zone=us-west4-a --accelerator=v5litepod-16 --bucket=gs://my-bucket/runs \\
      --input=runs/quickstart/data=gs://my-bucket/data --input=runs/quickstart/tokenizer=gs://my-bucket/tokenizer

Submitting again resumes where it stopped. Then, with the same name, project and zone:
  maxlm submit --action=status --name=tiny-1 --project=my-project --zone=us-west4-a
  maxlm submit --action=logs   --name=tiny-1 --project=my-project --zone=us-west4-a
  maxlm submit --action=delete --name=tiny-1 --project=my-project --zone=us-west4-a
"""

ACTIONS = {
    "all": "create the TPU and start training (the default)",
    "create": "only create the TPU and wait for it",
    "status": "state of the TPU and of training on each worker",
    "logs": "follow a worker's log until training ends",
    "delete": "delete the TPU",
}


def register(subparsers) -> None:
    """Add the subcommand `maxlm submit`."""
    parser = subparsers.add_parser(
        "submit", help="train on a Cloud TPU: create it, send the code, start, monitor, delete"
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `maxlm submit`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="training configuration, inside the code folder, or a recipe's name"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of the configuration")
    actions = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    parser.add_argument("--action", choices=ACTIONS, default="all", metavar="ACTION", help=actions)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the shell commands, one per line, and run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")

    where = parser.add_argument_group("TPU")
    where.add_argument("--name", required=True, help="name of the TPU and of the run folder in the bucket")
    where.add_argument("--project", required=True, help="Google Cloud project")
    where.add_argument("--zone", required=True, help="such as us-west4-a")
    where.add_argument("--internal-ips", action="store_true", help="no external IPs; connect from the same network")

    what = parser.add_argument_group("what to create and run")
    known = ", ".join(f"{name}-N" for name in GENERATIONS)
    what.add_argument("--accelerator", metavar="TYPE", help=f"{known}; such as v5litepod-16, v5p-128 or v6e-8")
    what.add_argument("--bucket", metavar="gs://...", help="runs are written to <bucket>/<name>")
    what.add_argument("--runtime-version", metavar="IMAGE", help="default: the image for the TPU generation")
    capacity = what.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, but may be preempted at any time")
    capacity.add_argument("--reserved", action="store_true", help="use your reservation")
    what.add_argument("--service-account", metavar="EMAIL", help="identity of the workers; needs access to the bucket")
    what.add_argument("--network", help="default: the project's default network")
    what.add_argument("--subnetwork")
    what.add_argument("--code", type=Path, default=Path("."), help="git folder or .tar.gz to send (default: .)")
    what.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="PATH=gs://...",
        help="copy a bucket folder to PATH on each worker first, such as data/packed=gs://my-bucket/packed",
    )
    what.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of training; repeatable"
    )
    what.add_argument(
        "--restarts",
        type=count_or_zero,
        default=10,
        metavar="N",
        help="restart training when it dies, at most N times (10)",
    )
    what.add_argument("--delete-after", action="store_true", help="wait until training has ended, then delete the TPU")

    logs = parser.add_argument_group("for --action=logs")
    logs.add_argument("--worker", type=count_or_zero, default=0, help="which worker (default: 0)")
    logs.add_argument("--tail", type=count, metavar="LINES", help="start with the last lines only (default: all)")


def run(args: argparse.Namespace) -> int:
    """Run `maxlm submit`; return the exit code.

    Raises:
      ConfigError: with all invalid values.
      RequestError: a command failed.
    """
    tpu = Tpu(name=args.name, project=args.project, zone=args.zone, internal_ips=args.internal_ips)
    if args.action in ("all", "create"):
        return _submit(args, _job(args, tpu))
    if args.dry_run:
        return _print_command(args, tpu)
    if args.action == "status":
        return _status(args, tpu)
    from maxlm_gcp import submit

    if args.action == "logs":
        submit.follow_logs(tpu, worker=args.worker, tail=args.tail)
        return 0
    deleted = submit.delete(tpu)
    message = "deleted" if deleted else "does not exist"
    print(json.dumps({"name": tpu.name, "deleted": deleted}) if args.json else f"{tpu.name} {message}")
    return 0


def _submit(args: argparse.Namespace, job: TpuJob) -> int:
    from maxlm_gcp import submit

    create_only = args.action == "create"
    if args.dry_run:
        lines = submit.dry_run(job, create_only=create_only, delete_after=args.delete_after)
        print(json.dumps(lines) if args.json else "\n".join(lines))
        return 0
    submit.submit(job, create_only=create_only, delete_after=args.delete_after)
    if args.json:
        print(json.dumps({"name": job.tpu.name, "run_folder": job.run_folder, "deleted": args.delete_after}))
    return 0


def _status(args: argparse.Namespace, tpu: Tpu) -> int:
    from maxlm_gcp import submit

    status = submit.status(tpu)
    if args.json:
        print(json.dumps(dataclasses.asdict(status)))
        return 0
    print(f"{status.name}: {status.state or 'does not exist'}")
    for worker in status.workers:
        print(f"  {worker.host}: {worker.state}  {worker.last_line}")
    return 0


def _print_command(args: argparse.Namespace, tpu: Tpu) -> int:
    from maxlm_gcp import commands

    built = {
        "status": [commands.describe(tpu), commands.status(tpu)],
        "logs": [commands.logs(tpu, worker=args.worker, tail=args.tail)],
        "delete": [commands.delete(tpu)],
    }
    lines = [commands.shell_line(argv) for argv in built[args.action]]
    print(json.dumps(lines) if args.json else "\n".join(lines))
    return 0


def _job(args: argparse.Namespace, tpu: Tpu) -> TpuJob:
    """The job that the arguments describe, with its configuration checked before a TPU costs money."""
    needed = {"CONFIG": args.config, "--accelerator": args.accelerator, "--bucket": args.bucket}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ConfigError([f"maxlm submit needs {name}: see maxlm submit --help" for name in missing])
    config = _inside(args.code, args.config)
    capacity = Capacity.SPOT if args.spot else Capacity.RESERVED if args.reserved else Capacity.ON_DEMAND
    job = TpuJob(
        tpu=tpu,
        accelerator_type=args.accelerator,
        bucket=args.bucket,
        config=config,
        overrides=tuple(args.overrides),
        code=args.code,
        inputs=_pairs("--input", args.input),
        environment=_pairs("--env", args.env),
        capacity=capacity,
        restarts=args.restarts,
        runtime_version=args.runtime_version,
        service_account=args.service_account,
        network=args.network,
        subnetwork=args.subnetwork,
    )
    problems = [job.zone_problem] if job.zone_problem else []
    if args.code.is_dir():
        from maxlm_gcp.preflight import find_problems

        from maxlm.config.load import load_config

        problems += find_problems(job, load_config(args.code / job.config, job.settings, kind="train"))
    if problems:
        raise ConfigError(problems)
    return job


def _inside(code: Path, config: str) -> str:
    """The path of a configuration in the code folder; a recipe may be given by its name, as `post/sft`."""
    recipe = Path("configs", config).with_suffix(".yaml")
    if code.is_dir() and not (code / config).exists() and (code / recipe).is_file():
        return recipe.as_posix()
    return config


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    bad = [f"{option}: {text!r} is not NAME=VALUE" for text in texts if "=" not in text]
    if bad:
        raise ConfigError(bad)
    return dict(text.split("=", 1) for text in texts)
