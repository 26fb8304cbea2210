"""Order of the steps, resubmission, and error messages, with a recording runner."""

import json
import subprocess

import pytest
from maxlm_gcp import commands
from maxlm_gcp.runner import Result, run_command
from maxlm_gcp.submit import POLL_SECONDS, Worker, delete, follow_logs, status, submit

from maxlm.errors import RequestError

NOT_THERE = Result(1, "", "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource\n")
OK = Result(0, "", "")


def resource(state: str, *, accelerator_type: str = "v5litepod-16", reason: str | None = None) -> Result:
    body = {
        "state": {"state": state} | ({"failedData": {"error": {"message": reason}}} if reason else {}),
        "tpu": {"nodeSpec": [{"node": {"acceleratorType": accelerator_type}}]},
    }
    return Result(0, json.dumps(body), "")


def workers(*states: str) -> Result:
    lines = [f"{commands.STATUS_MARK}\tw-{index}\t{state}\tstep 7" for index, state in enumerate(states)]
    return Result(0, "\n".join(["Welcome to a banner", *reversed(lines)]), "")


class Recorder:
    """Returns results for each kind of command from its own list (the last one repeats), and records the commands."""

    def __init__(self, **answers):
        self.answers = {kind: list(values) for kind, values in answers.items()}
        self.kinds = []

    def __call__(self, argv, *, capture):
        kind = self.kind(argv)
        self.kinds.append(kind)
        answers = self.answers.get(kind, [OK])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @staticmethod
    def kind(argv):
        if argv[0] == "git":
            return argv[3]
        if argv[4] != "ssh":
            return argv[4]
        script = argv[-1]
        return next(kind for kind, word in SCRIPTS.items() if word in script)


SCRIPTS = {"start": "maxlm train", "status": commands.STATUS_MARK, "logs": "tail -n", "install": "tar -xzf"}


def run(job, recorder, **options) -> list[float]:
    slept = []
    submit(job, runner=recorder, sleep=slept.append, **options)
    return slept


def test_new_job_is_created_awaited_copied_installed_and_started(make_job, capsys):
    recorder = Recorder(
        describe=[NOT_THERE, resource("WAITING_FOR_RESOURCES"), resource("PROVISIONING"), resource("ACTIVE")]
    )
    slept = run(make_job(), recorder)
    assert recorder.kinds == [
        *("describe", "create", "describe", "describe", "describe"),
        *("scp", "install", "start"),
    ]
    assert slept == [POLL_SECONDS] * 2
    said = capsys.readouterr().err
    for part in ("[1/6]", "[6/6]", "WAITING_FOR_RESOURCES", "gs://my-bucket/runs/tiny-1", "queued-resources delete"):
        assert part in said


def test_existing_resource_is_reused(make_job):
    recorder = Recorder(describe=[resource("ACTIVE")])
    run(make_job(), recorder)
    assert "create" not in recorder.kinds
    assert recorder.kinds[-1] == "start"


def test_resource_of_another_size_raises(make_job):
    recorder = Recorder(describe=[resource("ACTIVE", accelerator_type="v6e-8")])
    with pytest.raises(RequestError, match="as v6e-8 and not v5litepod-16"):
        run(make_job(), recorder)
    assert recorder.kinds == ["describe"]


def test_create_only_stops_when_the_tpu_is_ready(make_job):
    recorder = Recorder(describe=[NOT_THERE, resource("ACTIVE")])
    run(make_job(), recorder, create_only=True)
    assert recorder.kinds == ["describe", "create", "describe"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_lost_resource_raises_with_the_reason_and_the_remedy(make_job, state):
    recorder = Recorder(describe=[NOT_THERE, resource(state, reason="quota of v5e is 0")])
    with pytest.raises(RequestError, match="quota of v5e is 0") as caught:
        run(make_job(), recorder)
    assert f"tiny-1 is {state}" in str(caught.value)
    assert "queued-resources delete tiny-1" in str(caught.value)


@pytest.mark.parametrize("step", ["create", "scp", "install", "start"])
def test_failed_step_error_has_the_step_the_reason_and_the_commands(make_job, step):
    failure = Result(1, "", "warming up\nERROR: (gcloud) it is broken\n\n")
    recorder = Recorder(describe=[NOT_THERE, resource("ACTIVE")], **{step: [failure]})
    with pytest.raises(RequestError) as caught:
        run(make_job(), recorder)
    first, repeat, go_on, how_to_delete = str(caught.value).splitlines()
    assert "of 6" in first
    assert first.endswith("failed: ERROR: (gcloud) it is broken")
    assert repeat.startswith("repeat it with: gcloud compute tpus")
    assert "submit again" in go_on
    assert "queued-resources delete tiny-1" in how_to_delete
    assert recorder.kinds[-1] == step


def test_failed_describe_creates_nothing(make_job):
    recorder = Recorder(describe=[Result(1, "", "ERROR: PERMISSION_DENIED: no\n")])
    with pytest.raises(RequestError, match="PERMISSION_DENIED"):
        run(make_job(), recorder)
    assert recorder.kinds == ["describe"]


def test_interrupt_prints_how_to_delete(make_job, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(make_job(), runner=Recorder(describe=[NOT_THERE, resource("ACCEPTED")]), sleep=interrupt)
    assert "queued-resources delete tiny-1" in capsys.readouterr().err


def test_delete_after_reconnects_and_then_deletes(make_job, capsys):
    recorder = Recorder(
        describe=[NOT_THERE, resource("ACTIVE")],
        logs=[Result(255, "", "broken pipe"), OK],
        status=[workers("running", "running"), workers("exit 0", "exit 0")],
    )
    run(make_job(), recorder, delete_after=True)
    assert recorder.kinds[-6:] == ["logs", "status", "logs", "status", "describe", "delete"]
    assert "costs money" not in capsys.readouterr().err


def test_delete_after_deletes_also_after_a_failure_and_reports_it(make_job):
    recorder = Recorder(describe=[resource("ACTIVE")], status=[workers("exit 0", "exit 1")])
    with pytest.raises(RequestError, match=r"w-1: exit 1.*gs://my-bucket/runs/tiny-1/logs"):
        run(make_job(), recorder, delete_after=True)
    assert recorder.kinds[-1] == "delete"


def test_delete_after_retries_as_long_as_the_tpu_exists(make_job, capsys):
    unreachable = Result(255, "", "no route to host")
    recorder = Recorder(
        describe=[
            resource("ACTIVE"),
            resource("ACTIVE"),
            Result(1, "", "ERROR: INTERNAL: later\n"),
            resource("ACTIVE"),
        ],
        status=[*[unreachable] * 2, workers("exit 0")],
        delete=[Result(1, "", "ERROR: busy\n"), OK],
    )
    slept = run(make_job(), recorder, delete_after=True)
    assert recorder.kinds.count("delete") == 2
    assert slept == [POLL_SECONDS, 2 * POLL_SECONDS, 4 * POLL_SECONDS, POLL_SECONDS]
    said = capsys.readouterr().err
    assert "attempt 3 failed; retrying as long as the TPU exists" in said
    assert "THE TPU STILL COSTS MONEY" in said
    assert said.rstrip().endswith("deleted tiny-1")


@pytest.mark.parametrize("after", [NOT_THERE, resource("SUSPENDED", reason="taken back")])
def test_delete_after_reports_a_preempted_tpu(make_job, after):
    recorder = Recorder(describe=[resource("ACTIVE"), resource("ACTIVE"), after], status=[Result(255, "", "reset")])
    with pytest.raises(RequestError, match=r"will not recover.*the progress so far is in gs://my-bucket"):
        run(make_job(), recorder, delete_after=True)
    assert ("delete" in recorder.kinds) == (after is not NOT_THERE)


def test_failed_describe_in_the_queue_is_retried(make_job):
    later = Result(1, "", "ERROR: UNAVAILABLE: later\n")
    slept = run(make_job(), Recorder(describe=[NOT_THERE, later, later, resource("ACTIVE")]), create_only=True)
    assert slept == [POLL_SECONDS, 2 * POLL_SECONDS]
    with pytest.raises(RequestError, match=r"UNAVAILABLE: later(.|\n)*queued-resources delete tiny-1"):
        run(make_job(), Recorder(describe=[NOT_THERE, later]), create_only=True)


LOGGED_OUT = """\
ERROR: (gcloud.compute.tpus.queued-resources.describe) You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials.

If you have already logged in with a different account, run:

  $ gcloud config set account ACCOUNT

to select an already authenticated account to use.
"""
DISABLED = """\
ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: Cloud TPU API has not been used before.
- '@type': type.googleapis.com/google.rpc.ErrorInfo
  domain: googleapis.com
  reason: SERVICE_DISABLED
"""
NO_ROUTE = """\
Using ssh batch size of 1.
ssh: connect to host 10.0.0.2 port 22: Connection timed out
ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].
"""


@pytest.mark.parametrize(
    ("stderr", "message", "remedy"),
    [
        (LOGGED_OUT, "You do not currently have an active account selected. Please run: $ gcloud auth login", "log in"),
        (DISABLED, "Cloud TPU API has not been used before.\n", "gcloud services enable tpu.googleapis.com"),
        (NO_ROUTE, "code [255]. (ssh: connect to host 10.0.0.2 port 22: Connection timed out)", "port 22"),
        ("ERROR: PERMISSION_DENIED: no\n", "PERMISSION_DENIED: no", "roles/tpu.admin"),
        ("ERROR: Quota limit 'TPUV5' has been exceeded.\n", "has been exceeded.", "request quota"),
    ],
)
def test_error_has_gclouds_whole_message_and_a_remedy(tpu, stderr, message, remedy):
    with pytest.raises(RequestError) as caught:
        status(tpu, runner=Recorder(describe=[Result(1, "", stderr)]))
    error = str(caught.value)
    assert message in error
    assert "'@type'" not in error
    assert remedy in error.partition("remedy: ")[2]


def test_status_of_a_ready_tpu_queries_every_worker(tpu):
    found = status(tpu, runner=Recorder(describe=[resource("ACTIVE")], status=[workers("running", "killed")]))
    assert found.state == "ACTIVE"
    assert found.workers == (Worker("w-0", "running", "step 7"), Worker("w-1", "killed", "step 7"))


def test_status_of_a_waiting_tpu_queries_no_worker(tpu):
    assert status(tpu, runner=Recorder(describe=[NOT_THERE])).state is None
    recorder = Recorder(describe=[resource("WAITING_FOR_RESOURCES")])
    assert status(tpu, runner=recorder).state == "WAITING_FOR_RESOURCES"
    assert recorder.kinds == ["describe"]


def test_delete_returns_whether_the_tpu_existed(tpu):
    assert delete(tpu, runner=Recorder(describe=[resource("ACTIVE")]))
    assert not delete(tpu, runner=Recorder(describe=[NOT_THERE]))
    with pytest.raises(RequestError, match="may still cost money: ERROR: busy"):
        delete(tpu, runner=Recorder(describe=[resource("ACTIVE")], delete=[Result(1, "", "ERROR: busy\n")]))


def test_unreadable_logs_raise(tpu):
    with pytest.raises(RequestError, match="log of worker 2"):
        follow_logs(tpu, worker=2, runner=Recorder(logs=[Result(1, "", "tail: no such file\n")]))


def git(folder, *arguments):
    subprocess.run(["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], check=True)


def test_only_committed_files_are_sent(make_job, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    config = code / "train.yaml"

    def begin():
        def runner(argv, *, capture):
            return run_command(argv, capture=capture) if argv[0] == "git" else resource("ACTIVE")

        submit(make_job(code=code), runner=runner, sleep=lambda seconds: None)

    config.write_text("kind: train\n")
    with pytest.raises(RequestError, match="is neither a git folder nor an archive"):
        begin()
    git(code, "init", "-q")
    git(code, "commit", "-q", "--allow-empty", "-m", "empty")
    with pytest.raises(RequestError, match=r"train\.yaml is not in the last commit"):
        begin()
    git(code, "add", "train.yaml")
    git(code, "commit", "-q", "-m", "configuration")
    begin()
    config.write_text("kind: train\nsteps: 3\n")
    with pytest.raises(RequestError, match=r"uncommitted changes \(train\.yaml\)"):
        begin()


def test_missing_program_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"gcloud is not installed or not on PATH; install it from https://"):
        run_command(["gcloud", "version"], capture=True)


def test_runner_shows_errors_as_they_arrive_and_keeps_the_last_line(capsys):
    result = run_command(["bash", "-c", "echo first >&2; echo last >&2; exit 3"], capture=False)
    assert (result.returncode, result.error_message) == (3, "last")
    assert capsys.readouterr().err == "first\nlast\n"
    assert run_command(["bash", "-c", "echo out; exit 4"], capture=True) == Result(4, "out\n", "")
    assert Result(4, "", "").error_message == "exit code 4, no message"
