"""Jobs to build commands from, and a fake worker: a home folder with stubs for the programs of a TPU image."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from maxlm_gcp.job import Tpu, TpuJob

# Stub for `python3 -m pip`, `-m uv venv` and `-m uv pip`: makes an environment whose maxlm records its calls.
PYTHON_STUB = f"""#!{sys.executable}
import os, sys
with open(os.path.join(os.environ["HOME"], "python.calls"), "a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[1:4] == ["-m", "uv", "venv"]:
    os.makedirs(".venv/bin", exist_ok=True)
    with open(".venv/bin/maxlm", "w") as program:
        program.write('''#!{sys.executable}
import json, os, sys, time
call = {{"argv": sys.argv[1:], "NOTE": os.environ.get("NOTE"), "files": sorted(os.listdir("."))}}
print(json.dumps(call), flush=True)
while "WAIT_FOR" in os.environ and not os.path.exists(os.environ["WAIT_FOR"]):
    time.sleep(0.05)
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
''')
    os.chmod(".venv/bin/maxlm", 0o755)
"""
GCLOUD_STUB = f"""#!{sys.executable}
import os, sys
with open(os.path.join(os.environ["HOME"], "gcloud.calls"), "a") as calls:
    print(*sys.argv[1:], file=calls)
"""


@pytest.fixture
def tpu() -> Tpu:
    return Tpu(name="tiny-1", project="my-project", zone="us-west4-a")


@pytest.fixture
def make_job(tpu, tmp_path):
    """Make a job with any fields; its code is an archive, so that no git folder is needed."""
    archive = tmp_path / "code.tar.gz"
    (tmp_path / "train.yaml").write_text("kind: train\n")
    subprocess.run(["tar", "-czf", archive, "-C", tmp_path, "train.yaml"], check=True)

    def make(**fields) -> TpuJob:
        defaults = {
            "tpu": tpu,
            "accelerator_type": "v5litepod-16",
            "bucket": "gs://my-bucket/runs",
            "config": "train.yaml",
            "code": archive,
        }
        return TpuJob(**(defaults | fields))

    return make


@dataclass(frozen=True)
class StubWorker:
    """A folder used as the home of one worker."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home), "PATH": f"{self.home / 'bin'}:/usr/bin:/bin"}

    def run(self, script: str) -> subprocess.CompletedProcess:
        """Run a script as sshd would: the login shell reads one string."""
        return subprocess.run(
            ["bash", "-c", script], cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=60
        )


def _make_worker(home: Path) -> StubWorker:
    (home / "bin").mkdir(parents=True)
    hostname = f"#!/bin/sh\necho {home.name}\n"
    for name, text in (("python3", PYTHON_STUB), ("gcloud", GCLOUD_STUB), ("hostname", hostname)):
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    return StubWorker(home)


@pytest.fixture
def make_worker():
    return _make_worker


@pytest.fixture
def worker(make_worker, tmp_path) -> StubWorker:
    return make_worker(tmp_path / "worker-0")
