"""XLA flags of tests: number of devices, and fast compilation."""

import os
import re
import subprocess
import sys

# Programs of tests are small and run a few times, so compilation dominates their cost. Neither optimizing them nor
# splitting them for parallel compilation helps.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
# The older code generator for fused operations compiles faster, and will be removed from XLA.
QUICKEST = f"{QUICK} --xla_cpu_use_fusion_emitters=false"


def flags_of(devices: int) -> str:
    """XLA_FLAGS for this many virtual devices. Takes a quarter second: a version that lacks a flag ends the process
    that sets it, so it is tested in a separate one."""
    ask = [sys.executable, "-c", "from jaxlib._jax import CompileOptions; CompileOptions()"]
    is_known = subprocess.run(ask, env={**os.environ, "XLA_FLAGS": QUICKEST}, capture_output=True).returncode == 0
    return f"--xla_force_host_platform_device_count={devices} {QUICKEST if is_known else QUICK}"


def one_device() -> str:
    """XLA_FLAGS of a child process with one device, otherwise like this process."""
    return re.sub(r"(?<=device_count=)\d+", "1", os.environ["XLA_FLAGS"])
