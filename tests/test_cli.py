"""The command line as a whole: fast start-up, and user errors in one sentence."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from maxlm import cli

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "numpy", "grain", "flax", "orbax", "tensorstore", "pyarrow", "rich", "fastapi", "etils")
COMMANDS = (
    "config",
    "data",
    "tokenizer",
    "train",
    "preview",
    "eval",
    "export",
    "generate",
    "chat",
    "serve",
    "quickstart",
    "sweep",
    "feedback",
    "prompt",
    "verify",
)


def python(script: str, **variables) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def test_help_imports_nothing_heavy():
    done = python(
        "import sys\nfrom maxlm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        f"print(code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    assert done.stderr.strip() == "0 []"
    for command in (*COMMANDS, "submit"):
        assert command in done.stdout


@pytest.mark.parametrize("command", [*COMMANDS, "submit"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"maxlm {command}" in capsys.readouterr().out


def test_config_show_output_can_be_loaded_again(tmp_path, capsys):
    assert cli.main(["config", "show", "configs/quickstart/pretrain.yaml", "optim.learning_rate=1e-3"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    assert cli.main(["config", "show", str(tmp_path / "shown.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optim"]["learning_rate"] == 1e-3
    # Settings may follow an option.
    assert cli.main(["config", "show", str(tmp_path / "shown.yaml"), "--json", "steps=7"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7
    with pytest.raises(SystemExit, match="2"):
        cli.main(["config", "show", str(tmp_path / "shown.yaml"), "--jsn", "steps=7"])
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err
    assert cli.main(["config", "schema"]) == 0
    assert "TrainConfig" in json.loads(capsys.readouterr().out)["$defs"]


def test_user_errors_are_sentences_with_exit_code_2(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    objective = "objective: {kind: pretrain, sources: [{path: a}]}\n"
    bad.write_text(f"kind: train\noutput: x\nmodel: {{layers: {{repeet: 2}}}}\n{objective}")
    assert cli.main(["train", str(bad), "optim.lr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == f"maxlm: {bad}: model.layers.repeet: unknown key; did you mean repeat?"
    assert lines[1].startswith(f"{bad}: optim.lr: unknown key")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", "configs/data/embedded.yaml"], "kind is 'data', but this command needs kind: train"),
        (["train", "configs/quickstart/pretrain.yaml", "objective.sources.0.path={tmp}/none"], "none"),
        (["train", "configs/post/sft.yaml", "init_from={tmp}/none"], "none"),
        (["data", "build", "configs/data/embedded.yaml", "tokenizer={tmp}/none"], "none"),
        (["eval", "{tmp}/none"], "none"),
        (["generate", "{tmp}/none", "Hello"], "none"),
    ],
)
def test_missing_inputs_are_reported_in_one_sentence(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if arguments[0] in ("train", "data"):
        arguments.append(f"output={tmp_path}/out")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_folder_that_cannot_be_created_is_reported_in_one_sentence(tmp_path, tiny_data_folder, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["train", "configs/quickstart/pretrain.yaml", f"objective.sources.0.path={tiny_data_folder}"]
    code = cli.main([*arguments, f"output={tmp_path}/file/run", "row_length=32", "steps=1", "accumulate=1"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert f"{tmp_path}/file" in error
    assert "Traceback" not in error


@pytest.fixture
def run_that(monkeypatch, tmp_path):
    """Runs `maxlm config schema` with its function replaced."""

    def run(function) -> int:
        monkeypatch.setattr("maxlm.config.json_schema", function)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return cli.main(["config", "schema"])

    return run


def raising(error: Exception):
    def fail():
        raise error

    return fail


def test_bug_is_reported_in_one_sentence_with_a_traceback_file(run_that, capsys, monkeypatch):
    assert run_that(raising(ZeroDivisionError("one\ntwo"))) == 70
    said = capsys.readouterr().err
    assert said.startswith("maxlm: this is a bug in maxlm: ZeroDivisionError: one two; please report it with ")
    assert said.count("\n") == 1
    trace = Path(said.partition("with ")[2].partition(" (")[0]).read_text(encoding="utf-8")
    assert "Traceback" in trace
    assert "in fail" in trace
    monkeypatch.setenv("MAXLM_TRACEBACK", "1")
    assert run_that(raising(ZeroDivisionError())) == 70
    assert "in fail" in capsys.readouterr().err


class JaxRuntimeError(RuntimeError):
    """Has the name of JAX's exception for XLA errors."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError("Unable to allocate 931. GiB"), 2, "out of memory (Unable to allocate 931. GiB); use a smaller"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory"), 2, "out of memory (RESOURCE_EXHAUSTED: Out of memory)"),
        (JaxRuntimeError("INTERNAL"), 70, "this is a bug in maxlm: JaxRuntimeError: INTERNAL"),
        (OSError(28, "No space left on device"), 2, "no space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: permission denied"),
        (OSError("what"), 70, "this is a bug in maxlm: OSError: what"),
        (BrokenPipeError(32, "Broken pipe"), 70, "this is a bug in maxlm: BrokenPipeError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exceptions_are_reported_by_kind(error, code, said, run_that, capsys):
    assert run_that(raising(error)) == code
    reported = capsys.readouterr().err
    assert reported.startswith(f"maxlm: {said}")
    assert reported.count("\n") == 1


def test_ascii_terminal_and_closed_pipe():
    """Characters that the terminal lacks are escaped as in JSON; a closed pipe ends a command silently."""
    text = "é → 🙂"
    script = (
        "import sys, json\nfrom rich.console import Console\nfrom maxlm import cli, config\n"
        f"config.json_schema = lambda: print({text!r}) or Console().print('┃', {text!r}) or {{}}\n"
        "sys.exit(cli.main(['config', 'schema']))"
    )
    done = python(script, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(f'"{done.stdout.splitlines()[0]}"') == text
    command = [sys.executable, "-m", "maxlm.cli", "config", "show", "configs/quickstart/pretrain.yaml", "\udcff=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not UTF-8 text; rename the file" in done.stderr
    command = f"{sys.executable} -m maxlm.cli config schema | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data", "show", "x", "-n", "-1"], "argument -n: '-1' must be a whole number from 1 to 2147483647"),
        (["data", "at-step", "0", "--run", "x"], "argument N: '0' must be"),
        (["data", "at-step", "9" * 5000, "--run", "x"], "argument N: '999"),
        (["preview", "x", "-n", "²"], "argument -n: '²' must be"),
        (["generate", "x", "y", "--seed", "-1"], "argument --seed: '-1' must be a whole number from 0 to 4294967295"),
        (["generate", "x", "y", "--seed", str(2**70)], "argument --seed"),
        (
            ["generate", "x", "y", "--temperature", "nan"],
            "argument --temperature: 'nan' must be a number of at least 0",
        ),
        (["eval", "x", "--min-accuracy", "inf"], "argument --min-accuracy: 'inf' must be"),
        (["serve", "x", "--port", "65536"], "argument --port: '65536' must be a whole number from 0 to 65535"),
        (["serve", "x", "--slots", "0"], "argument --slots: '0' must be"),
    ],
)
def test_numeric_arguments_are_bounded(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert len(last) < 200


def test_libtpu_without_a_tpu_is_not_used():
    """Compiled programs are cached, unless the user sets the cache folder."""
    script = (
        "import os, sys\nfrom maxlm.runtime import platform\n"
        "for name in ('JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR'):\n"
        "    os.environ.pop(name, None)\n"
        "platform.find_spec = lambda name: {libtpu}\nplatform._ACCELERATORS = ({device!r},)\n"
        "platform.prepare_platform()\n"
        "print(os.environ.get('JAX_PLATFORMS'), os.environ['JAX_COMPILATION_CACHE_DIR'], 'jax' in sys.modules)"
    )
    cache = str(Path.home() / ".cache" / "maxlm" / "compilation")
    for libtpu, device, platform in [
        (True, "/nowhere/*", "cpu"),
        (True, "/dev/nul*", None),
        (None, "/nowhere/*", None),
    ]:
        done = python(script.format(libtpu=libtpu, device=device))
        assert done.stdout.split() == [str(platform), cache, "False"], done.stderr


def test_user_environment_variables_are_kept():
    script = (
        "import os\nfrom maxlm.runtime.platform import prepare_platform\nprepare_platform()\n"
        "print(os.environ['JAX_PLATFORMS'], os.environ['JAX_COMPILATION_CACHE_DIR'])"
    )
    done = python(script, JAX_PLATFORMS="cuda", JAX_COMPILATION_CACHE_DIR="/elsewhere")
    assert done.stdout.split() == ["cuda", "/elsewhere"]
