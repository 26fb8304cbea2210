"""What must be settled before JAX is imported. Imports nothing heavy itself."""

import os
from glob import glob
from importlib.util import find_spec
from pathlib import Path

# Where Linux shows TPUs (the first two), and NVIDIA's and AMD's GPUs.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def prepare_platform() -> None:
    """Set what JAX reads from the environment, where the user has not.

    Where libtpu is installed and there is no TPU or GPU, JAX is told to use the CPU: libtpu would look for a TPU with
    alarming messages, or for ever. Compiled programs are kept on disk, so that a second start is quick.
    """
    if "JAX_PLATFORMS" not in os.environ and find_spec("libtpu") and not _has_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"
    home = os.path.expanduser("~")  # "~" again where nobody knows
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and home != "~":
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(home) / ".cache" / "maxlm" / "compilation")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def use_virtual_devices(count: int) -> None:
    """Let JAX see this many devices, all of them this machine's CPU; without effect once JAX is in use."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = "--xla_force_host_platform_device_count"
    others = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(flag)]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{flag}={count}"])


def _has_accelerator() -> bool:
    return any(glob(pattern) for pattern in _ACCELERATORS)
