"""Submit a job and monitor it: `submit`, `status`, `follow_logs`, `delete`.

Every step is idempotent, so submitting again resumes a submission that failed or was interrupted.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from maxlm_gcp import commands
from maxlm_gcp.job import Tpu, TpuJob
from maxlm_gcp.runner import Result, Runner, run_command

from maxlm.errors import RequestError
from maxlm.runtime.progress import console

POLL_SECONDS = 30
# Longest delay between retries: doubled from POLL_SECONDS up to this.
MOST_SECONDS = 600
# About an hour of failed retries, after which waiting in the queue is given up.
MOST_TRIES = 10

# States of a queued resource: cloud.google.com/tpu/docs/queued-resources
_READY = "ACTIVE"
_LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")


@dataclass(frozen=True)
class Worker:
    """One worker's training: `running`, `exit N`, `killed` (ended without a code) or `absent` (never started)."""

    host: str
    state: str
    last_line: str


@dataclass(frozen=True)
class Status:
    """State of the queued resource (None: does not exist), and of the workers once it is ACTIVE."""

    name: str
    state: str | None
    workers: tuple[Worker, ...]


def dry_run(job: TpuJob, *, create_only: bool = False, delete_after: bool = False) -> list[str]:
    """The shell lines that `submit` runs, in order, ready to paste."""
    tpu = job.tpu
    wait = commands.wait_in_shell(tpu, seconds=POLL_SECONDS)
    if create_only:
        return [commands.shell_line(commands.create(job)), wait]
    pack = commands.pack_code(job)
    lines = [commands.shell_line(pack)] if pack else []
    lines += [commands.shell_line(commands.create(job)), wait]
    lines += [commands.shell_line(build(job)) for build in (commands.copy_code, commands.install, commands.start)]
    if delete_after:
        lines += [commands.shell_line(commands.logs(tpu)), commands.shell_line(commands.delete(tpu))]
    return lines


def submit(
    job: TpuJob,
    *,
    create_only: bool = False,
    delete_after: bool = False,
    runner: Runner = run_command,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Create the TPU unless it exists, wait for it, send the code, install it, and start training on all workers.

    Args:
      job: the job and its TPU.
      create_only: stop once the TPU is ready.
      delete_after: wait until training has ended on every worker, then delete the TPU, whatever the outcome.
      runner: runs the commands.
      sleep: waits the given seconds between polls of the queue.

    Raises:
      RequestError: a step failed (with the commands to repeat it and to delete the TPU), or, with `delete_after`,
        training failed on some worker, or its outcome is unknown.
        Once training has started, `delete_after` leaves no TPU behind.
    """
    steps = _Steps(job.tpu, runner, total=2 if create_only else 6)
    if not create_only:
        pack = commands.pack_code(job)
        steps.begin("pack the last commit" if pack else f"send {job.code} as it is")
        if pack:
            _refuse_uncommitted_changes(job, runner)
            steps.run(pack)
    try:
        steps.may_exist = True
        steps.begin(f"create {job.accelerator_type} ({job.capacity.value})")
        _create_unless_there(job, steps)
        steps.begin("wait until it is ready")
        _wait_until_active(job.tpu, steps, sleep)
        if not create_only:
            steps.begin("copy the code to every worker")
            steps.run(commands.copy_code(job))
            steps.begin("install on every worker")
            steps.run(commands.install(job))
            steps.begin("start training on every worker")
            steps.run(commands.start(job))
            _say(f"run folder: {job.run_folder}")
        if delete_after:
            try:
                _follow_to_the_end(job, steps, sleep)
            except RequestError:
                _delete_for_certain(job.tpu, runner, sleep)
                raise
            _delete_for_certain(job.tpu, runner, sleep)
    except KeyboardInterrupt:
        _say(f"interrupted; submit again to resume\n{_how_to_delete(job.tpu)}")
        raise
    if not delete_after:
        _say(_how_to_delete(job.tpu))


def status(tpu: Tpu, *, runner: Runner = run_command) -> Status:
    """The state of the queued resource and, once it is ACTIVE, of training on every worker.

    Raises:
      RequestError: gcloud failed.
    """
    resource = _describe(tpu, runner)
    if resource is None:
        return Status(tpu.name, None, ())
    state = _state(resource)
    if state != _READY:
        return Status(tpu.name, state, ())
    return Status(tpu.name, state, _ask_workers(tpu, runner))


def follow_logs(tpu: Tpu, *, worker: int = 0, tail: int | None = None, runner: Runner = run_command) -> None:
    """Show one worker's log until training ends.

    Raises:
      RequestError: the log could not be read, or the connection was lost.
    """
    argv = commands.logs(tpu, worker=worker, tail=tail)
    result = runner(argv, capture=False)
    if result.returncode:
        raise RequestError(_failure(f"cannot read the log of worker {worker} of {tpu.name}", argv, result))


def delete(tpu: Tpu, *, runner: Runner = run_command) -> bool:
    """Delete the queued resource and its node; False if there was none.

    Raises:
      RequestError: gcloud could not delete it, so that it may still cost money.
    """
    if _describe(tpu, runner) is None:
        return False
    argv = commands.delete(tpu)
    result = runner(argv, capture=False)
    if result.returncode:
        raise RequestError(_failure(f"cannot delete {tpu.name}, which may still cost money", argv, result))
    return True


class _Steps:
    """Prints numbered steps, and turns a failed command into an error that says how to resume."""

    def __init__(self, tpu: Tpu, runner: Runner, *, total: int):
        self.tpu, self.runner, self.total = tpu, runner, total
        self.number, self.title, self.may_exist = 0, "", False

    def begin(self, title: str) -> None:
        self.number, self.title = self.number + 1, title
        _say(f"[{self.number}/{self.total}] {title}")

    def run(self, argv: list[str]) -> None:
        result = self.runner(argv, capture=False)
        if result.returncode:
            raise self.failed(argv, result)

    def failed(self, argv: list[str], result: Result) -> RequestError:
        message = _failure(f"step {self.number} of {self.total} ({self.title}) failed", argv, result)
        return RequestError(f"{message}\nsubmit again to resume from there{self.remains()}")

    def remains(self) -> str:
        return f"\n{_how_to_delete(self.tpu)}" if self.may_exist else ""


def _create_unless_there(job: TpuJob, steps: _Steps) -> None:
    resource = _describe(job.tpu, steps.runner)
    if resource is None:
        steps.run(commands.create(job))
        return
    there = resource["tpu"]["nodeSpec"][0]["node"]["acceleratorType"]
    if there != job.accelerator_type:
        what = f"{job.tpu.name} already exists, as {there} and not {job.accelerator_type}"
        raise RequestError(f"{what}: choose another name or delete it{steps.remains()}")
    _say(f"{job.tpu.name} already exists ({_state(resource)})")


def _wait_until_active(tpu: Tpu, steps: _Steps, sleep: Callable[[float], None]) -> None:
    shown, failures = None, 0
    with console.status(f"waiting for {tpu.name}; after an interrupt it keeps its place in the queue"):
        while True:
            try:
                resource = _describe(tpu, steps.runner)
            except RequestError as error:
                failures += 1
                if failures == MOST_TRIES:
                    raise RequestError(f"{error}{steps.remains()}") from None
                _say(f"{error}; retrying")
                sleep(_pause(failures))
                continue
            failures = 0
            state = "gone" if resource is None else _state(resource)
            if state == _READY:
                return
            if state in (*_LOST, "gone"):
                raise RequestError(_lost(tpu, state, resource) + steps.remains())
            if state != shown:
                shown = state
                _say(f"state: {state}")
            sleep(POLL_SECONDS)


def _follow_to_the_end(job: TpuJob, steps: _Steps, sleep: Callable[[float], None]) -> None:
    """Follow the log, reconnecting as needed, until no worker runs, and report the outcome.

    Failed queries are retried as long as the TPU exists: giving up would leave it running and costing money.
    """
    tail, failures = None, 0
    while True:
        try:
            if failures:
                resource = _describe(job.tpu, steps.runner)
                state = "gone" if resource is None else _state(resource)
                if state in (*_LOST, "gone"):
                    raise _LostError(f"{_lost(job.tpu, state, resource)}; the progress so far is in {job.run_folder}")
            steps.runner(commands.logs(job.tpu, tail=tail), capture=False)
            workers = _ask_workers(job.tpu, steps.runner)
        except _LostError:
            raise
        except RequestError as error:
            failures += 1
            _say(f"{error}\nattempt {failures} failed; retrying as long as the TPU exists. {_how_to_delete(job.tpu)}")
            sleep(_pause(failures))
            continue
        if not any(worker.state == "running" for worker in workers):
            break
        tail, failures = 0, 0
        sleep(POLL_SECONDS)
    failed = [f"{worker.host}: {worker.state}" for worker in workers if worker.state != "exit 0"]
    if failed:
        raise RequestError(f"training failed ({'; '.join(failed)}); its logs are in {job.run_folder}/logs")


class _LostError(RequestError):
    """The TPU disappeared during training."""


def _lost(tpu: Tpu, state: str, resource: dict | None) -> str:
    reason = _reason(resource) if resource else ""
    return (
        f"{tpu.name} is {state}{reason} and will not recover: delete it and submit again; "
        "training then resumes from its last checkpoint"
    )


def _delete_for_certain(tpu: Tpu, runner: Runner, sleep: Callable[[float], None]) -> None:
    """Retry deletion until it succeeds; only Ctrl-C gives up earlier."""
    failures = 0
    while True:
        try:
            existed = delete(tpu, runner=runner)
        except RequestError as error:
            failures += 1
            _say(f"{error}\nTHE TPU STILL COSTS MONEY: attempt {failures} to delete it failed; retrying")
            sleep(_pause(failures))
        else:
            _say(f"deleted {tpu.name}" if existed else f"{tpu.name} is gone")
            return


def _pause(failures: int) -> float:
    """Seconds before the next attempt."""
    return min(POLL_SECONDS * 2 ** min(failures - 1, 10), MOST_SECONDS)


def _refuse_uncommitted_changes(job: TpuJob, runner: Runner) -> None:
    """A commit is sent, so that a run is traceable; uncommitted edits would be silently left out."""
    git = ["git", "-C", str(job.code)]
    result = runner([*git, "status", "--porcelain", "--untracked-files=no", "--", "."], capture=True)
    if result.returncode:
        raise RequestError(f"{job.code} is neither a git folder nor an archive: {result.error_message}")
    if runner([*git, "cat-file", "-e", f"HEAD:./{job.config}"], capture=True).returncode:
        raise RequestError(f"{job.config} is not in the last commit of {job.code}, and only that is sent: commit it")
    changed = [line[3:] for line in result.stdout.splitlines()]
    if changed:
        some = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise RequestError(
            f"{job.code} has uncommitted changes ({some}), but only the last commit is sent: commit them"
        )


def _describe(tpu: Tpu, runner: Runner) -> dict | None:
    """The queued resource as the API returns it, or None if it does not exist."""
    argv = commands.describe(tpu)
    result = runner(argv, capture=True)
    if result.returncode == 0:
        return json.loads(result.stdout)
    if "NOT_FOUND" in result.stderr:
        return None
    raise RequestError(_failure(f"cannot describe {tpu.name}", argv, result))


def _state(resource: dict) -> str:
    return resource.get("state", {}).get("state", "STATE_UNSPECIFIED")


def _reason(resource: dict) -> str:
    message = resource["state"].get("failedData", {}).get("error", {}).get("message")
    return f" ({message})" if message else ""


def _ask_workers(tpu: Tpu, runner: Runner) -> tuple[Worker, ...]:
    argv = commands.status(tpu)
    result = runner(argv, capture=True)
    if result.returncode:
        raise RequestError(_failure(f"cannot query the workers of {tpu.name}", argv, result))
    answers = [line.split("\t", 3) for line in result.stdout.splitlines() if line.startswith(commands.STATUS_MARK)]
    return tuple(sorted((Worker(*answer[1:]) for answer in answers), key=lambda worker: worker.host))


def _failure(what: str, argv: list[str], result: Result) -> str:
    """gcloud's message, a remedy if one is known, and the command to repeat."""
    message = result.error_message
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in message or sign in result.stderr), None)
    explained = f"{message}\nremedy: {remedy}" if remedy else message
    return f"{what}: {explained}\nrepeat it with: {commands.shell_line(argv)}"


# Text in an error message -> remedy; the first match wins.
_REMEDIES = {
    "SERVICE_DISABLED": "enable the API: gcloud services enable tpu.googleapis.com (add --project)",
    "has not been used in project": "enable the API: gcloud services enable tpu.googleapis.com (add --project)",
    "active account": "log in: gcloud auth login",
    "Reauthentication": "log in again: gcloud auth login",
    "Permission denied (publickey": "gcloud compute config-ssh, then ssh-add ~/.ssh/google_compute_engine",
    "PERMISSION_DENIED": "ask for the role TPU Admin (roles/tpu.admin) in the project, or log in as someone who has it",
    "Quota": "request quota for this TPU in this zone (console: IAM & Admin, Quotas), or use another zone or --spot",
    "RESOURCE_EXHAUSTED": "request quota, or use another zone, a smaller accelerator or --spot",
    "no more capacity": "use another zone or --spot, or leave it in the queue",
    "Connection timed out": "allow ssh (port 22) in the network's firewall, or use --internal-ips from inside it",
}


def _how_to_delete(tpu: Tpu) -> str:
    return f"the TPU costs money until it is deleted: {commands.shell_line(commands.delete(tpu))}"


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
