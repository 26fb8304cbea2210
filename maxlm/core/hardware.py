"""Accelerator detection and capabilities."""

import functools
import os
import re
from pathlib import Path

import jax

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device; None if unknown, as for CPUs."""
    matches = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def multiplies_fp8(device: jax.Device) -> bool:
    """Whether a device has matrix units for 8-bit floats: NVIDIA from compute capability 8.9 on, and TPU7x."""
    if device.platform == "gpu" and "NVIDIA" in device.device_kind:
        return tuple(map(int, device.compute_capability.split("."))) >= (8, 9)
    return device.device_kind.startswith("TPU7x")


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 matrix products are fast on the platform that is being traced for.

    A CPU without AVX512-BF16 or AMX converts the operands first: a training step then takes a third more time.
    """
    return traced_platform() != "cpu" or _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    limit = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if limit and limit[1].upper() not in ("AVX512_BF16", "AMX", "AMX_FP16"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def traced_platform() -> str:
    """The platform being traced for (cpu, tpu, cuda, rocm): that of the mesh, which may differ from this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform == "gpu":
        return "rocm" if "AMD" in device.device_kind else "cuda"
    return device.platform
