"""The job to run and its TPU, validated before any command is built."""

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.errors import ConfigError

# Slices of v5e and v6e, in chips. (The number of a v4 or v5p slice counts TensorCores, two per chip.)
_CHIP_COUNTS = (1, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class TpuGeneration:
    """One TPU generation: its software image, and how its slices are numbered.

    Runtime versions: cloud.google.com/tpu/docs/runtimes (images for JAX). Zones of North America, including those for
    single tenants: cloud.google.com/tpu/docs/regions-zones.
    """

    prefix: str
    runtime_version: str
    zones: tuple[str, ...]
    cores_per_chip: int = 1  # as counted in slice names; JAX sees a chip as one device
    sizes: tuple[int, ...] | None = None  # None: any multiple of eight TensorCores (one host)

    def problem(self, size: int) -> str | None:
        """Why no slice of this size exists, or None."""
        if self.sizes is not None and size not in self.sizes:
            return f"has {size} chips; {self.prefix} has sizes {', '.join(map(str, self.sizes))}"
        if self.sizes is None and (size % 8 or size == 0):
            return f"has {size} TensorCores; {self.prefix} needs a multiple of 8"
        return None


GENERATIONS = {
    generation.prefix: generation
    for generation in (
        TpuGeneration(prefix="v4", runtime_version="tpu-ubuntu2204-base", zones=("us-central2-b",), cores_per_chip=2),
        TpuGeneration(
            prefix="v5litepod",
            runtime_version="v2-alpha-tpuv5-lite",
            zones=(
                *("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "us-west4-b"),
                *("us-east5-a", "us-east5-b", "us-east5-c"),
            ),
            sizes=_CHIP_COUNTS,
        ),
        TpuGeneration(
            prefix="v5p",
            runtime_version="v2-alpha-tpuv5",
            zones=("us-central1-a", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a"),
            cores_per_chip=2,
        ),
        TpuGeneration(
            prefix="v6e",
            runtime_version="v2-alpha-tpuv6e",
            zones=(
                *("us-central1-b", "us-east1-d", "us-east4-a", "us-east4-b", "us-west1-c"),
                *("us-east5-a", "us-east5-b", "us-east5-c"),
            ),
            sizes=_CHIP_COUNTS,
        ),
    )
}


class Capacity(enum.Enum):
    """How the TPU is provisioned; only `spot` may be preempted."""

    ON_DEMAND = "on-demand"
    SPOT = "spot"
    RESERVED = "reserved"


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """Identifies a TPU: the queued resource and its single node both have this name.

    Raises:
      ConfigError: with one line for each bad value.
    """

    name: str
    project: str
    zone: str
    internal_ips: bool = False  # no external IPs: ssh then works only from the same network

    def __post_init__(self):
        problems = []
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", self.name):
            problems.append(
                f"name: {self.name!r} must be lower-case letters, digits and hyphens, starting with a letter"
            )
        if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", self.project):
            problems.append(
                f"project: {self.project!r} is not a project ID (6 to 30 lower-case letters, digits, hyphens)"
            )
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", self.zone):
            problems.append(f"zone: {self.zone!r} is not a zone such as us-west4-a")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class TpuJob:
    """One `maxlm train` on every worker of one TPU slice.

    Attributes:
      tpu: the TPU to create, or an existing one.
      accelerator_type: generation and size, such as v5litepod-16, v5p-128, v6e-8.
      bucket: `gs://bucket[/folder]`; the run folder is `<bucket>/<name>`.
      config: the training configuration, relative to the code folder.
      overrides: `dotted.key=value` strings for the configuration.
      code: a git folder, whose last commit is sent, or a .tar.gz.
      inputs: a path in the code folder on each worker -> the `gs://` folder to copy there first.
      environment: environment variables of the training process.
      restarts: how often a worker restarts training when it dies; 0 disables restarts.
      runtime_version: None takes the image of the generation.
      python_version: Python to install, because that of the images is too old.

    Raises:
      ConfigError: with one line for each bad value.
    """

    tpu: Tpu
    accelerator_type: str
    bucket: str
    config: str
    overrides: tuple[str, ...] = ()
    code: Path = Path(".")
    inputs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    capacity: Capacity = Capacity.ON_DEMAND
    restarts: int = 10
    runtime_version: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    python_version: str = "3.11"

    def __post_init__(self):
        problems = [problem for problem in (_accelerator_problem(self.accelerator_type),) if problem]
        if not _is_bucket_path(self.bucket):
            problems.append(f"bucket: {self.bucket!r} is not a gs:// path such as gs://my-bucket/runs")
        if self.config.startswith(("/", "-")) or ".." in Path(self.config).parts or not self.config:
            problems.append(f"config: {self.config!r} must be a path inside the code folder")
        for override in self.overrides:
            if not re.match(r"[A-Za-z_][\w.]*=", override):
                problems.append(f"override: {override!r} is not key=value")
            elif override.startswith("output="):
                problems.append(
                    f"override: {override!r}: the run folder is <bucket>/<name>; set bucket and name instead"
                )
        for path, source in self.inputs.items():
            if not path or path.startswith(("/", "-")) or ".." in Path(path).parts:
                problems.append(f"input: {path!r} must be a path inside the code folder")
            if not _is_bucket_path(source):
                problems.append(f"input: {source!r} is not a gs:// path")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                problems.append(f"environment: {name!r} is not a valid variable name")
        if self.service_account is not None and "@" not in self.service_account:
            problems.append(f"service_account: {self.service_account!r} is not an e-mail address")
        if self.restarts < 0:
            problems.append(f"restarts: {self.restarts} must be 0 or more")
        if not re.fullmatch(r"3\.\d+", self.python_version):
            problems.append(f"python_version: {self.python_version!r} is not a version such as 3.11")
        if problems:
            raise ConfigError(problems)

    @property
    def generation(self) -> TpuGeneration:
        return GENERATIONS[self.accelerator_type.rpartition("-")[0]]

    @property
    def zone_problem(self) -> str | None:
        """Why the zone does not offer the accelerator; an unlisted zone may be new, so gcloud decides."""
        zone, wanted = self.tpu.zone, self.generation
        there = [generation.prefix for generation in GENERATIONS.values() if zone in generation.zones]
        if not there or wanted.prefix in there:
            return None
        return f"zone: {zone} has {' and '.join(there)}, not {wanted.prefix}; use {', '.join(wanted.zones)}"

    @property
    def num_chips(self) -> int:
        """Chips of the slice; each is one JAX device."""
        return int(self.accelerator_type.rpartition("-")[2]) // self.generation.cores_per_chip

    @property
    def run_folder(self) -> str:
        return f"{self.bucket.rstrip('/')}/{self.tpu.name}"

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings that override the configuration file."""
        return (*self.overrides, f"output={self.run_folder}")

    @property
    def train_arguments(self) -> tuple[str, ...]:
        """Arguments of `maxlm` on each worker."""
        supervise = (f"--supervise={self.restarts}",) if self.restarts else ()
        return ("train", self.config, *self.settings, *supervise)


def _is_bucket_path(text: str) -> bool:
    return re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/[^\s#]*)?", text) is not None


def _accelerator_problem(accelerator_type: str) -> str | None:
    prefix, _, size = accelerator_type.rpartition("-")
    if prefix in ("tpu7x", "v7x", "v7"):
        return (
            f"accelerator_type: {accelerator_type!r}: TPU7x is not available as a queued resource; "
            "Google Cloud offers it only through GKE"
        )
    if prefix in ("v5e", "v5lite"):
        return f"accelerator_type: {accelerator_type!r} is called v5litepod-{size} here"
    if prefix not in GENERATIONS or not re.fullmatch(r"[1-9]\d*", size, re.ASCII):
        known = ", ".join(f"{name}-N" for name in GENERATIONS)
        return f"accelerator_type: {accelerator_type!r} is unknown; use one of {known}, such as v5litepod-16"
    problem = GENERATIONS[prefix].problem(int(size))
    return f"accelerator_type: {accelerator_type!r} {problem}" if problem else None
