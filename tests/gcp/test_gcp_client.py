"""The real gcloud against a local fake of Google's API, with folders as workers.

Everything between `submit` and the network is real: gcloud parses, sends requests, waits, and starts ssh and scp; only
the servers, ssh and scp are fakes.
"""

import http.server
import json
import shutil
import threading
from dataclasses import dataclass, field

import pytest
from maxlm_gcp.submit import delete, status, submit

from maxlm.errors import RequestError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs the Google Cloud CLI, which pip does not install"),
]

WORKERS = ("10.0.0.1", "10.0.0.2")
PLACE = "/v2/projects/my-project/locations/us-west4-a"

SSH_STUB = """#!/bin/bash
# The host follows the user's name, the command follows "--".
while [ $# -gt 0 ]; do
  case "$1" in --) shift; break ;; *@*) host=${1#*@} ;; esac
  shift
done
cd "$WORKERS/$host" && exec env HOME="$PWD" PATH="$PWD/bin:/usr/bin:/bin" bash -c "$*"
"""
SCP_STUB = """#!/bin/bash
for last; do :; done
source=${@:$#-1:1}
target=${last#*@}
cp "$source" "$WORKERS/${target%%:*}/${target#*:}"
"""


@dataclass
class StandIn:
    """State of the fake API: at most one queued resource, and the requests it got."""

    address: str = ""
    resource: dict | None = None
    looks: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, body: dict) -> dict | None:
        """The JSON to send back; None is 404."""
        self.asked.append((method, path))
        operation = {"name": f"{PLACE[4:]}/operations/o", "done": True, "response": {"@type": "x"}}
        if path == "/compute/v1/projects/my-project":
            return {"name": "my-project", "commonInstanceMetadata": {"items": []}}
        if path == f"{PLACE}/operations/o":
            return operation | ({"response": {"@type": "x", "name": self.resource["name"]}} if self.resource else {})
        if method == "POST" and path == f"{PLACE}/queuedResources":
            self.resource = body | {"name": f"{PLACE[4:]}/queuedResources/tiny-1"}
            return operation
        if path == f"{PLACE}/queuedResources/tiny-1" and self.resource:
            if method == "DELETE":
                self.resource = None
                return operation
            self.looks += 1
            return self.resource | {"state": {"state": "ACTIVE" if self.looks > 2 else "WAITING_FOR_RESOURCES"}}
        if path == f"{PLACE}/nodes/tiny-1" and self.resource:
            if method == "PATCH":
                return operation
            endpoints = [{"ipAddress": address, "accessConfig": {"externalIp": address}} for address in WORKERS]
            return {"name": path[4:], "state": "READY", "apiVersion": "V2", "networkEndpoints": endpoints}
        return None


@pytest.fixture
def stand_in():
    state = StandIn()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = state.answer(self.command, self.path.partition("?")[0], json.loads(body) if body else {})
            missing = {"error": {"code": 404, "message": "no such thing", "status": "NOT_FOUND"}}
            reply = json.dumps(missing if found is None else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_DELETE = do_PATCH = answer

        def log_message(self, *ignored):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}/"
    yield state
    server.shutdown()
    thread.join()


@pytest.fixture
def workers(stand_in, make_worker, tmp_path, monkeypatch):
    """Two workers, and an environment in which gcloud reaches only this machine."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("ssh", SSH_STUB), ("scp", SCP_STUB)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name, value in {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": stand_in.address,
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{stand_in.address}compute/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        "HOME": str(tmp_path),
        "PATH": f"{programs}:/usr/bin:/bin",
        "WORKERS": str(tmp_path / "workers"),
    }.items():
        monkeypatch.setenv(name, value)
    return [make_worker(tmp_path / "workers" / address) for address in WORKERS]


@pytest.mark.exhaustive
def test_job_resumes_after_a_failure_runs_on_all_workers_and_is_deleted(make_job, stand_in, workers):
    job = make_job(overrides=('note=it\'s  "here" $HOME',))
    python = workers[1].home / "bin" / "python3"
    python.rename(python.with_name("hidden"))
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    with pytest.raises(RequestError, match=r"install on every worker\) failed: .*worker 1 failed with exit status 7"):
        submit(job, delete_after=True, sleep=lambda seconds: None)
    assert stand_in.resource is not None
    python.with_name("hidden").rename(python)
    submit(job, delete_after=True, sleep=lambda seconds: None)
    assert stand_in.asked.count(("POST", f"{PLACE}/queuedResources")) == 1
    for worker in workers:
        first_line = (worker.home / "maxlm-tiny-1" / "train.log").read_text().splitlines()[0]
        assert json.loads(first_line)["argv"] == list(job.train_arguments)
        assert (worker.home / "maxlm-tiny-1" / "train.exit").read_text().strip() == "0"
    assert stand_in.resource is None
    assert ("DELETE", f"{PLACE}/queuedResources/tiny-1") in stand_in.asked


@pytest.mark.exhaustive
def test_request_reaches_the_api_and_its_state_is_reported(make_job, tpu, stand_in, workers):
    job = make_job(accelerator_type="v6e-8", service_account="trainer@my-project.iam.gserviceaccount.com")
    assert status(tpu).state is None
    assert not delete(tpu)
    submit(job, create_only=True, sleep=lambda seconds: None)
    node = stand_in.resource["tpu"]["nodeSpec"][0]
    assert node["nodeId"] == "tiny-1"
    assert node["node"]["acceleratorType"] == "v6e-8"
    assert node["node"]["runtimeVersion"] == "v2-alpha-tpuv6e"
    assert node["node"]["serviceAccount"] == {"email": "trainer@my-project.iam.gserviceaccount.com"}
    found = status(tpu)
    assert (found.state, [(worker.host, worker.state) for worker in found.workers]) == (
        "ACTIVE",
        [(address, "absent") for address in WORKERS],
    )
    assert delete(tpu)
    assert stand_in.resource is None
