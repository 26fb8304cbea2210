"""Every command line as a list of arguments, built without running anything.

On a worker all files of a job are in `~/maxlm-<name>`:
  .venv       the Python environment
  train.log   output of all attempts, appended
  train.pid   process of the last attempt
  train.exit  its exit code; absent while it runs
"""

import shlex
import tempfile
from pathlib import Path

from maxlm_gcp.job import Capacity, Tpu, TpuJob

Argv = list[str]

# A worker's answer to `status_script` begins with this word, which tells it from banners of the login.
STATUS_MARK = "maxlm-worker"


def pack_code(job: TpuJob) -> Argv | None:
    """The last commit of the code folder as one file; None where the code already is an archive."""
    if job.code.is_file():
        return None
    return ["git", "-C", str(job.code), "archive", "--format=tar.gz", f"--output={archive_path(job)}", "HEAD"]


def create(job: TpuJob) -> Argv:
    """Request the TPU; it stands in a queue until there is room."""
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
    """All that is known about the queued resource; `output` is a gcloud --format."""
    return [*_queued_resources("describe", tpu), f"--format={output}"]


def delete(tpu: Tpu) -> Argv:
    """Delete the queued resource and its node."""
    return [*_queued_resources("delete", tpu), "--force"]


def copy_code(job: TpuJob) -> Argv:
    """Send the archive into the home folder of every worker."""
    destination = f"{job.tpu.name}:{_folder(job.tpu)}.tar.gz"
    scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive_path(job)), destination]
    return [*scp, *_reach(job.tpu, worker="all")]


def install(job: TpuJob) -> Argv:
    """Unpack, install and fetch the inputs, on every worker."""
    return _ssh(job.tpu, install_script(job), worker="all")


def start(job: TpuJob) -> Argv:
    """Start training on every worker; it goes on when the connection ends."""
    return _ssh(job.tpu, start_script(job), worker="all")


def logs(tpu: Tpu, *, worker: int = 0, tail: int | None = None) -> Argv:
    """Follow one worker's log until training ends; `tail` bounds how many earlier lines come first."""
    return _ssh(tpu, logs_script(tpu, tail=tail), worker=str(worker))


def status(tpu: Tpu) -> Argv:
    """Ask every worker whether training runs."""
    return _ssh(tpu, status_script(tpu), worker="all")


def wait_in_shell(tpu: Tpu, *, seconds: int) -> str:
    """A shell line that returns when the TPU is ready: what `submit` does between create and copy."""
    ask = shell_line(describe(tpu, output="value(state.state)"))
    return f'until [ "$({ask})" = ACTIVE ]; do sleep {seconds}; done'


def shell_line(argv: Argv) -> str:
    """A command as a shell reads it; of `--flag=value` only the value is quoted, which is easier to read."""
    return " ".join(flag + shlex.quote(value) for flag, value in map(_split_flag, argv))


def archive_path(job: TpuJob) -> Path:
    """The file that is sent."""
    return job.code if job.code.is_file() else Path(tempfile.gettempdir()) / f"{_folder(job.tpu)}.tar.gz"


def install_script(job: TpuJob) -> str:
    """What `install` runs on a worker; running it twice does no harm.

    The TPU images bring Python 3.10, so uv installs a newer one into the job's own environment.
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
    """What `start` runs on a worker.

    gcloud repeats a command whose connection broke, so a second start beside a running one must do nothing.
    """
    # The workers of a slice are processes of one run.
    environment = {"MAXLM_DISTRIBUTED": "auto", **job.environment}
    assignments = [f"{name}={value}" for name, value in environment.items()]
    train = shlex.join(["env", *assignments, ".venv/bin/maxlm", *job.train_arguments])
    keep_log = f'{shlex.join(upload_log(job.run_folder))}"$(hostname)".log'
    return (
        f"cd {_folder(job.tpu)} && if {_IS_RUNNING}; then echo training already runs; else "
        f'rm -f train.exit && {{ (trap "" HUP; {train}; echo $? > train.exit; {keep_log}) '
        ">> train.log 2>&1 < /dev/null & echo $! > train.pid; }; fi"
    )


def logs_script(tpu: Tpu, *, tail: int | None) -> str:
    """What `logs` runs on a worker: ends by itself when training has ended."""
    lines = "+1" if tail is None else str(tail)
    return f'cd {_folder(tpu)} && tail -n {lines} -F --pid="$(cat train.pid)" train.log'


def status_script(tpu: Tpu) -> str:
    """What `status` runs on a worker: one line of mark, host, state and last line of the log, tabs between."""
    return (
        f"if ! cd {_folder(tpu)} 2> /dev/null; then state=absent; "
        f"elif {_IS_RUNNING}; then state=running; "
        'elif [ -f train.exit ]; then state="exit $(cat train.exit)"; '
        "elif [ -f train.pid ]; then state=killed; else state=absent; fi; "
        f'printf \'{STATUS_MARK}\\t%s\\t%s\\t%s\\n\' "$(hostname)" "$state" '
        '"$(tail -n 1 train.log 2> /dev/null)"'
    )


def fetch_input(source: str, path: str) -> Argv:
    """Run on a worker: bring one input folder up to date."""
    return ["gcloud", "storage", "rsync", source, path, "--recursive"]


def upload_log(run_folder: str) -> Argv:
    """Run on a worker when training has ended; the last argument wants the worker's name appended."""
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
