"""What XLA is told in tests: how many devices there are, and to compile quickly."""

import os
import re
import subprocess
import sys

# Programs of tests are small and run a few times: what they cost is their compilation. Nothing is gained by optimising
# them, nor by cutting them into parts that are compiled side by side.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
# Of two ways to generate code for fused operations the older is the quicker one, and the one that will go.
QUICKEST = f"{QUICK} --xla_cpu_use_fusion_emitters=false"


def flags_of(devices: int) -> str:
    """XLA_FLAGS for so many virtual devices. Takes a quarter of a second: a version that lacks a flag ends the process
    that names it, and so is asked in one of its own."""
    ask = [sys.executable, "-c", "from jaxlib._jax import CompileOptions; CompileOptions()"]
    is_known = subprocess.run(ask, env={**os.environ, "XLA_FLAGS": QUICKEST}, capture_output=True).returncode == 0
    return f"--xla_force_host_platform_device_count={devices} {QUICKEST if is_known else QUICK}"


def one_device() -> str:
    """XLA_FLAGS of a child process with one device, otherwise as this one."""
    return re.sub(r"(?<=device_count=)\d+", "1", os.environ["XLA_FLAGS"])
