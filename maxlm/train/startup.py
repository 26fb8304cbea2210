"""Check at startup that all processes have the same configuration, code, data and tokenizer."""

import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from maxlm.config.train import TrainConfig
from maxlm.errors import ConfigError
from maxlm.runtime.manifest import content_hash
from maxlm.runtime.peers import Peers

# Packages whose versions must match for all processes to compile the same program.
_PACKAGES = ("maxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_MAX_SHOWN = 3
_PACKAGE = Path(__file__).parents[1]


def check_start(peers: Peers, config: TrainConfig, hashes: dict[str, Any], *, timeout: float) -> None:
    """Compare this process with process 0; all exit with one error if any differs.

    Args:
      peers: the processes of the run.
      config: as it was loaded.
      hashes: hashes of the run's inputs, by name.
      timeout: seconds to wait for all processes.

    Raises:
      ConfigError: on process 0, if any process differs; names each process and its differences.
    """
    peers.compare(start_record(config, hashes), reject_differences, timeout=timeout)


def start_record(config: TrainConfig, hashes: dict[str, Any]) -> dict[str, Any]:
    """The values to compare, by name, and the host."""
    versions = {f"package {name}": version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    code = {"code of maxlm": source_hash()}
    settings = {f"config {name}": value for name, value in _settings(config.model_dump(mode="json")).items()}
    return {"host": socket.gethostname(), "same": settings | versions | code | hashes}


def data_hashes(config: TrainConfig) -> dict[str, str]:
    """Hashes of the data that a configuration names; for a folder, of its manifest.

    Raises:
      DataError: there is no such file or folder.
    """
    paths = [each.path for each in config.objective.inputs if each.content != "weights"]
    return {f"data {path}": content_hash(path) for path in paths}


def source_hash(folder: Path = _PACKAGE) -> str:
    """Hash of all Python files of this package: a version alone does not distinguish two working copies."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def reject_differences(records: list[dict[str, Any]]) -> None:
    """Raise ConfigError with one line for each process whose record differs from that of process 0."""
    first = records[0]
    problems = []
    for process, record in enumerate(records):
        names = [name for name in first["same"] | record["same"] if _of(first, name) != _of(record, name)]
        if names:
            shown = [f"{name} ({_of(record, name)}, not {_of(first, name)})" for name in names[:_MAX_SHOWN]]
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            problems.append(
                f"process {process} ({record['host']}) differs from process 0 ({first['host']}) in"
                f" {', '.join(shown)}{more}"
            )
    if problems:
        raise ConfigError([*problems, "give all processes the same configuration, code and data, and restart them"])


def _of(record: dict[str, Any], name: str) -> Any:
    return record["same"].get(name, "nothing")


def _settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration's values by dotted path."""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {path: value for name, part in items for path, value in _settings(part, name).items()}
