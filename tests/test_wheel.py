"""The wheel, installed outside the checkout: recipes by name, a small training run, its report and a server."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import httpx
import pytest
from xla_flags import one_device

ROOT = Path(__file__).parents[1]
SMALL = [
    *("model.layers.repeat=1", "model.embed_dim=16", "model.layers.mlp.dim=32", "model.layers.mixer.head_dim=8"),
    "execution.max_length=64",
    *("optim.kind=adamw", "steps=2", "row_length=64", "batch_size=4", "eval_every=0", "eval_batches=1"),
]


@pytest.fixture(scope="module")
def maxlm(tmp_path_factory):
    """Run the installed `maxlm` in an empty folder; returns its output."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("maxlm", "gcp", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", str(source), "--wheel-dir", str(folder), *options], check=True, timeout=300)
    shutil.rmtree(source)
    [wheel] = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", *options[:2], str(wheel)], check=True, timeout=300)
    # Dependencies come from the environment of the tests, without the checkout that is installed there.
    [packages] = (environment / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "work"
    work.mkdir()

    def start(*command: str, **settings) -> subprocess.Popen:
        surroundings = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "XLA_FLAGS": one_device(), "JAX_PLATFORMS": "cpu"}
        program = [str(environment / "bin" / "maxlm"), *command]
        return subprocess.Popen(program, cwd=work, env=surroundings, stdout=subprocess.PIPE, text=True, **settings)

    def run(*command: str) -> str:
        with start(*command, stderr=subprocess.PIPE) as process:
            printed, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            return printed

    run.start, run.work, run.environment = start, work, environment
    return run


@pytest.mark.exhaustive
def test_installed_package_trains_reports_and_serves(maxlm):
    assert "post/sft" in maxlm("config", "list")
    [packages] = (maxlm.environment / "lib").glob("*/site-packages")
    assert (packages / "maxlm" / "py.typed").exists()
    assert list(packages.glob("maxlm-*/licenses/LICENSE"))
    (maxlm.work / "text.txt").write_text("\n\n".join(f"Number {n} is followed by number {n + 1}." for n in range(400)))
    maxlm("tokenizer", "train", "quickstart/tokenizer", "input=text.txt", "output=tokenizer", "vocab_size=320")
    source = ["sources.0.uri=text.txt", "sources.0.split_on_blank_lines=400", "clean.min_characters=1"]
    maxlm("data", "build", "quickstart/data", "output=rows", "tokenizer=tokenizer", "row_length=64", *source)
    maxlm("train", "quickstart/pretrain", "output=run", "objective.sources.0.path=rows", *SMALL)
    maxlm("report", "run")
    page = (maxlm.work / "run" / "report.html").read_text()
    assert "<svg" in page
    with maxlm.start("serve", "run", "--port", "0", "--slots", "1") as server:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert "<title>" in httpx.get(address).text
        reply = httpx.post(f"{address}/v1/completions", json={"prompt": "Number", "max_tokens": 4}, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] <= 4
        server.terminate()
