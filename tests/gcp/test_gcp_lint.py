"""gcloud's own parser accepts every command that is built, and rejects invalid ones."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from maxlm_gcp import commands
from maxlm_gcp.job import Capacity

pytestmark = pytest.mark.skipif(
    shutil.which("gcloud") is None, reason="needs the Google Cloud CLI, which pip does not install"
)

EVERY_GENERATION = ("v4-32", "v5litepod-16", "v5p-128", "v6e-8")


def lint(argvs, tmp_path) -> list[dict]:
    """Results of `gcloud meta lint-gcloud-commands`, one per command, from a single gcloud process."""
    # It drops text after a "#" and gives one result for equal commands, so neither may occur.
    strings = [commands.shell_line(argv) for argv in argvs]
    assert not any("#" in string for string in strings)
    assert len(set(strings)) == len(strings)
    path = tmp_path / "commands.json"
    path.write_text(json.dumps([{"command_string": string} for string in strings]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={path}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path / "gcloud")},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(argvs)
    return answers


def every_command(make_job) -> list[commands.Argv]:
    jobs = [make_job(accelerator_type=accelerator_type) for accelerator_type in EVERY_GENERATION]
    jobs += [make_job(capacity=capacity) for capacity in Capacity if capacity is not Capacity.ON_DEMAND]
    jobs += [
        make_job(service_account="trainer@my-project.iam.gserviceaccount.com"),
        make_job(network="training", subnetwork="training-west"),
        make_job(runtime_version="my-image"),
        make_job(tpu=replace(make_job().tpu, internal_ips=True), overrides=('note=it\'s "here"',)),
    ]
    argvs = [commands.create(job) for job in jobs]
    for job in (jobs[0], jobs[-1]):
        argvs += [build(job) for build in (commands.copy_code, commands.install, commands.start)]
        argvs += [commands.status(job.tpu), commands.logs(job.tpu), commands.logs(job.tpu, worker=3, tail=10)]
    tpu = jobs[0].tpu
    argvs += [commands.describe(tpu), commands.describe(tpu, output="value(state.state)"), commands.delete(tpu)]
    # These two run on the workers, inside the scripts.
    return [*argvs, commands.fetch_input("gs://my-bucket/x", "x"), [*commands.upload_log("gs://my-bucket/x"), "w.log"]]


def test_gcloud_accepts_every_command_and_rejects_invalid_ones(make_job, tmp_path):
    good = every_command(make_job)
    job = make_job()
    wrong = [
        [*commands.create(job), "--no-such-flag"],
        [argument for argument in commands.create(job) if not argument.startswith("--runtime-version")],
        ["gcloud", "compute", "tpus", "queued-resources", "destroy", "tiny-1"],
        [argument.replace("--worker=", "--workers=") for argument in commands.start(job)],
    ]
    answers = lint([*good, *wrong], tmp_path)
    refused = [
        (answer["command_string"], answer["error_message"]) for answer in answers[: len(good)] if not answer["success"]
    ]
    assert not refused, refused
    assert [answer["success"] for answer in answers[len(good) :]] == [False] * len(wrong)
    assert "--no-such-flag" in answers[len(good)]["error_message"]
