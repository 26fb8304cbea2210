"""Worker scripts run correctly in a real shell, and dry runs match the golden files."""

import json
import os
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from maxlm_gcp import commands
from maxlm_gcp.job import Capacity
from maxlm_gcp.submit import dry_run

GOLDEN = Path(__file__).parent / "golden"

# Characters that a shell, gcloud's splitting at spaces, or YAML could corrupt.
AWKWARD = (
    'optim.name=it\'s "quoted"',
    "note=two  blanks",
    "glob=*",
    "dollar=$HOME `id` $(id)",
    "semi=a;b&c|d>e",
    "backslash=a\\b",
    "newline=a\nb",
)


def wait_for(path: Path, *, seconds: float = 20) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def ready(worker, job):
    """A worker with the code copied and installed."""
    (worker.home / "maxlm-tiny-1.tar.gz").write_bytes(commands.archive_path(job).read_bytes())
    done = worker.run(commands.install_script(job))
    assert done.returncode == 0, done.stderr
    return worker.home / "maxlm-tiny-1"


@pytest.mark.parametrize(
    ("name", "fields", "options"),
    [
        ("v5litepod", {"capacity": Capacity.SPOT}, {"delete_after": True}),
        ("v4-create-only", {"accelerator_type": "v4-32"}, {"create_only": True}),
        (
            "v5p-everything",
            {
                "accelerator_type": "v5p-128",
                "capacity": Capacity.RESERVED,
                "service_account": "trainer@my-project.iam.gserviceaccount.com",
                "network": "training",
                "subnetwork": "training-west",
                "overrides": ("steps=2000", "note=it's here"),
                "inputs": {"data/packed": "gs://my-bucket/packed"},
                "environment": {"NOTE": "two words"},
            },
            {},
        ),
        ("v6e-image", {"accelerator_type": "v6e-8", "runtime_version": "my-image"}, {}),
    ],
)
def test_dry_run_matches_the_golden_file(make_job, name, fields, options):
    job = make_job(**fields)
    if name == "v5p-everything":
        job = replace(job, tpu=replace(job.tpu, internal_ips=True))
    lines = [line.replace(str(job.code), "code.tar.gz") for line in dry_run(job, **options)]
    text = "\n".join(lines) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"UPDATE_GOLDEN=1 rewrites {golden.name}; review the diff first"


def test_every_line_of_a_dry_run_is_a_complete_shell_command(make_job):
    for line in dry_run(make_job(overrides=AWKWARD[:-1]), delete_after=True):
        assert "\n" not in line
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0


def test_git_folder_is_packed_from_its_last_commit(make_job, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.yaml").write_text("kind: train\n")
    git = ["git", "-C", code, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "train.yaml"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (code / "untracked").write_text("not sent")
    job = make_job(code=code)
    subprocess.run(commands.pack_code(job), check=True)
    archive = commands.archive_path(job)
    try:
        listed = subprocess.run(["tar", "-tzf", archive], check=True, capture_output=True, text=True)
    finally:
        archive.unlink()
    assert listed.stdout.split() == ["train.yaml"]


def test_install_unpacks_installs_and_fetches_and_is_idempotent(make_job, worker):
    job = make_job(inputs={"data/my rows": "gs://my-bucket/packed"})
    folder = ready(worker, job)
    assert ready(worker, job) == folder
    assert (folder / "train.yaml").exists()
    assert (folder / "data/my rows").is_dir()
    calls = (worker.home / "python.calls").read_text().splitlines()
    assert calls[1:3] == [
        "-m uv venv --quiet --allow-existing --python=3.11 .venv",
        "-m uv pip install --quiet --python=.venv --editable=.[tpu]",
    ]
    assert "storage rsync gs://my-bucket/packed data/my rows --recursive" in (worker.home / "gcloud.calls").read_text()


def test_failed_installation_fails_the_command(make_job, worker):
    (worker.home / "maxlm-tiny-1.tar.gz").write_text("no archive")
    assert worker.run(commands.install_script(make_job())).returncode != 0


def test_training_gets_its_arguments_and_environment_unchanged(make_job, worker):
    job = make_job(overrides=AWKWARD, environment={"NOTE": 'it\'s "two"  words $HOME'})
    folder = ready(worker, job)
    assert worker.run(commands.start_script(job)).returncode == 0
    assert wait_for(folder / "train.exit").strip() == "0"
    called = json.loads((folder / "train.log").read_text().splitlines()[0])
    assert called["argv"] == ["train", "train.yaml", *AWKWARD, "output=gs://my-bucket/runs/tiny-1", "--supervise=10"]
    assert called["NOTE"] == 'it\'s "two"  words $HOME'
    assert "train.yaml" in called["files"]


def test_argument_survives_gclouds_splitting(make_job):
    """gcloud splits --command at single spaces and ssh joins the parts with one space each."""
    script = commands.start_script(make_job(overrides=AWKWARD))
    assert " ".join(script.split(" ")) == script


def test_start_returns_while_training_runs_and_a_second_start_does_nothing(make_job, worker):
    gate = worker.home / "gate"
    job = make_job(environment={"WAIT_FOR": str(gate), "EXIT_CODE": "3"})
    ready(worker, job)
    assert worker.run(commands.start_script(job)).returncode == 0
    assert status_of(worker, job).startswith("running")
    again = worker.run(commands.start_script(job))
    assert (again.returncode, again.stdout.strip()) == (0, "training is already running")
    gate.touch()
    followed = worker.run(commands.logs_script(job.tpu, tail=None))
    assert followed.returncode == 0
    assert followed.stdout.count('"argv"') == 1  # the second start started nothing
    assert status_of(worker, job).startswith("exit 3")
    uploads = (worker.home / "gcloud.calls").read_text()
    assert uploads == "storage cp train.log gs://my-bucket/runs/tiny-1/logs/worker-0.log\n"


def test_ended_training_can_be_restarted_and_keeps_the_old_log(make_job, worker):
    folder = ready(worker, make_job())
    for _ in range(2):
        worker.run(commands.start_script(make_job()))
        worker.run(commands.logs_script(make_job().tpu, tail=None))
    assert (folder / "train.log").read_text().count('"argv"') == 2


def test_status_distinguishes_killed_from_absent(make_job, worker):
    job = make_job()
    assert status_of(worker, job) == "absent\t"
    folder = ready(worker, job)
    assert status_of(worker, job) == "absent\t"
    ended = subprocess.Popen(["true"])
    ended.wait()
    (folder / "train.pid").write_text(str(ended.pid))
    assert status_of(worker, job) == "killed\t"


def status_of(worker, job) -> str:
    mark, host, rest = worker.run(commands.status_script(job.tpu)).stdout.rstrip("\n").split("\t", 2)
    assert (mark, host) == (commands.STATUS_MARK, "worker-0")
    return rest


def test_shell_wait_ends_when_the_tpu_is_ready(make_job, worker):
    (worker.home / "bin" / "gcloud").write_text(
        "#!/bin/sh\necho x >> $HOME/asked\n"
        "if [ $(wc -l < $HOME/asked) -ge 3 ]; then echo ACTIVE; else echo WAITING_FOR_RESOURCES; fi\n"
    )
    assert worker.run(commands.wait_in_shell(make_job().tpu, seconds=0)).returncode == 0
    assert (worker.home / "asked").read_text().count("x") == 3


def test_commands_are_lists_that_need_no_shell(make_job):
    argv = commands.start(make_job(overrides=AWKWARD))
    assert shlex.split(commands.shell_line(argv)) == argv
    assert sum(argument.startswith("--command=") for argument in argv) == 1
