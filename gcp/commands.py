"""Build command lines as argument lists, without running anything.

On a worker, all files of a job are in `~/maxlm-<name>`:
  .venv       the Python environment
  train.log   output of all attempts, appended
  train.pid   process id of the last attempt
  train.exit  its exit code; absent while it runs
"""

import shlex
import tempfile
from pathlib import Path

from maxlm_gcp.job import Capacity, Tpu, TpuJob

Argv = list[str]

# A worker's reply to `status_script` starts with this word, which distinguishes it from login banners.
STATUS_MARK = "maxlm-worker"


def pack_code(job: TpuJob) -> Argv | None:
    """Archive the last commit of the code folder; None if the code is already an archive."""
    if job.code.is_file():
        return None
    return ["git", "-C", str(job.code), "archive", "--format=tar.gz", f"--output={archive_path(job)}", "HEAD"]


def create(job: TpuJob) -> Argv:
    """Request the TPU as a queued resource, which waits for capacity."""
    argv = [
        *_queued_resources("create", job.tpu),
        f"--node-id={job.tpu.name}",
        f"--accelerator-type={job.accelerator_type}",
        f"--runtime-version={job.runtime_version or job.generation.runtime_version}",
    ]
    if job.capacity is Capacity.SPOT:
        argv.append("--spot")
    if job.capacity is Capacity.RESERVED:
        argv.append("--reserved")
    if job.service_account is not None:
        argv.append(f"--service-account={job.service_account}")
    if job.network is not None:
        argv.append(f"--network={job.network}")
    if job.subnetwork is not None:
        argv.append(f"--subnetwork={job.subnetwork}")
    if job.tpu.internal_ips:
        argv.append("--internal-ips")
    return argv


def describe(tpu: Tpu, *, output: str = "json") -> Argv:
    """Describe the queued resource; `output` is a gcloud --format."""
    return [*_queued_resources("describe", tpu), f"--format={output}"]


def delete(tpu: Tpu) -> Argv:
    """Delete the queued resource and its node."""
    return [*_queued_resources("delete", tpu), "--force"]


def copy_code(job: TpuJob) -> Argv:
    """Copy the archive to the home folder of every worker."""
    destination = f"{job.tpu.name}:{_folder(job.tpu)}.tar.gz"
    scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive_path(job)), destination]
    return [*scp, *_reach(job.tpu, worker="all")]


def install(job: TpuJob) -> Argv:
    """Unpack, install and fetch the inputs, on every worker."""
    return _ssh(job.tpu, install_script(job), worker="all")


def start(job: TpuJob) -> Argv:
    """Start training on every worker; it keeps running after the connection ends."""
    return _ssh(job.tpu, start_script(job), worker="all")


def logs(tpu: Tpu, *, worker: int = 0, tail: int | None = None) -> Argv:
    """Follow one worker's log until training ends; `tail` limits how many earlier lines are shown."""
    return _ssh(tpu, logs_script(tpu, tail=tail), worker=str(worker))


def status(tpu: Tpu) -> Argv:
    """Query the state of training on every worker."""
    return _ssh(tpu, status_script(tpu), worker="all")


def wait_in_shell(tpu: Tpu, *, seconds: int) -> str:
    """A shell line that waits until the TPU is ready, as `submit` does between create and copy."""
    ask = shell_line(describe(tpu, output="value(state.state)"))
    return f'until [ "$({ask})" = ACTIVE ]; do sleep {seconds}; done'


def shell_line(argv: Argv) -> str:
    """A shell-quoted command; of `--flag=value` only the value is quoted, for readability."""
    return " ".join(flag + shlex.quote(value) for flag, value in map(_split_flag, argv))


def archive_path(job: TpuJob) -> Path:
    """The file that is sent."""
    return job.code if job.code.is_file() else Path(tempfile.gettempdir()) / f"{_folder(job.tpu)}.tar.gz"


def install_script(job: TpuJob) -> str:
    """The script of `install` on a worker; idempotent.

    The TPU images have Python 3.10, so uv installs a newer one into the job's own environment.
    """
    folder = _folder(job.tpu)
    steps = [
        f"mkdir -p {folder}",
        f"tar -xzf {folder}.tar.gz -C {folder}",
        f"cd {folder}",
        "python3 -m pip install --quiet --user --upgrade uv",
        f"python3 -m uv venv --quiet --allow-existing --python={job.python_version} .venv",
        'python3 -m uv pip install --quiet --python=.venv --editable=".[tpu]"',
    ]
    for path, source in job.inputs.items():
        steps += [f"mkdir -p {shlex.quote(path)}", shlex.join(fetch_input(source, path))]
    return " && ".join(steps)


def start_script(job: TpuJob) -> str:
    """The script of `start` on a worker.

    gcloud retries a command whose connection was lost, so starting again while training runs must do nothing.
    """
    # The workers of a slice are processes of one run.
    environment = {"MAXLM_DISTRIBUTED": "auto", **job.environment}
    assignments = [f"{name}={value}" for name, value in environment.items()]
    train = shlex.join(["env", *assignments, ".venv/bin/maxlm", *job.train_arguments])
    keep_log = f'{shlex.join(upload_log(job.run_folder))}"$(hostname)".log'
    return (
        f"cd {_folder(job.tpu)} && if {_IS_RUNNING}; then echo training is already running; else "
        f'rm -f train.exit && {{ (trap "" HUP; {train}; echo $? > train.exit; {keep_log}) '
        ">> train.log 2>&1 < /dev/null & echo $! > train.pid; }; fi"
    )


def logs_script(tpu: Tpu, *, tail: int | None) -> str:
    """The script of `logs` on a worker; exits when training has ended."""
    lines = "+1" if tail is None else str(tail)
    return f'cd {_folder(tpu)} && tail -n {lines} -F --pid="$(cat train.pid)" train.log'


def status_script(tpu: Tpu) -> str:
    """The script of `status` on a worker: one tab-separated line of mark, host, state and last log line."""
    return (
        f"if ! cd {_folder(tpu)} 2> /dev/null; then state=absent; "
        f"elif {_IS_RUNNING}; then state=running; "
        'elif [ -f train.exit ]; then state="exit $(cat train.exit)"; '
        "elif [ -f train.pid ]; then state=killed; else state=absent; fi; "
        f'printf \'{STATUS_MARK}\\t%s\\t%s\\t%s\\n\' "$(hostname)" "$state" '
        '"$(tail -n 1 train.log 2> /dev/null)"'
    )


def fetch_input(source: str, path: str) -> Argv:
    """Run on a worker: sync one input folder."""
    return ["gcloud", "storage", "rsync", source, path, "--recursive"]


def upload_log(run_folder: str) -> Argv:
    """Run on a worker when training has ended; the caller appends the worker's name to the last argument."""
    return ["gcloud", "storage", "cp", "train.log", f"{run_folder}/logs/"]


_IS_RUNNING = '[ -f train.pid ] && kill -0 "$(cat train.pid)" 2> /dev/null'


def _split_flag(argument: str) -> tuple[str, str]:
    flag, equals, value = argument.partition("=")
    return (flag + equals, value) if flag.startswith("--") and equals and value else ("", argument)


def _folder(tpu: Tpu) -> str:
    return f"maxlm-{tpu.name}"


def _queued_resources(verb: str, tpu: Tpu) -> Argv:
    place = [f"--project={tpu.project}", f"--zone={tpu.zone}", "--quiet"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, tpu.name, *place]


def _ssh(tpu: Tpu, script: str, *, worker: str) -> Argv:
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", tpu.name, *_reach(tpu, worker=worker), f"--command={script}"]


def _reach(tpu: Tpu, *, worker: str) -> Argv:
    argv = [f"--project={tpu.project}", f"--zone={tpu.zone}", f"--worker={worker}", "--quiet"]
    return [*argv, "--internal-ip"] if tpu.internal_ips else argv
