"""Environment setup before JAX is imported. Imports nothing heavy itself."""

import os
from glob import glob
from importlib.util import find_spec
from pathlib import Path

# Linux device files of TPUs (the first two), and of NVIDIA and AMD GPUs.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def prepare_platform() -> None:
    """Set environment variables that JAX reads, unless the user has set them.

    If libtpu is installed without a TPU or GPU, JAX is set to use the CPU: libtpu would print alarming messages while
    looking for a TPU, or hang. Compiled programs are cached on disk, so that a second start is quick.
    """
    if "JAX_PLATFORMS" not in os.environ and find_spec("libtpu") and not _has_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"
    home = os.path.expanduser("~")  # "~" itself if unknown
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and home != "~":
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(home) / ".cache" / "maxlm" / "compilation")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def use_virtual_devices(count: int) -> None:
    """Make JAX see this many virtual CPU devices; no effect once JAX is initialized."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = "--xla_force_host_platform_device_count"
    others = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(flag)]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{flag}={count}"])
    # XLA's threads, as many as processors or devices if unset. Each device of a collective occupies one, so that with
    # as many threads as devices anything else that occupies one can stop all of them forever.
    os.environ.setdefault("NPROC", str(4 * count))


def _has_accelerator() -> bool:
    return any(glob(pattern) for pattern in _ACCELERATORS)
