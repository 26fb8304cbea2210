"""Which accelerator there is, and what it can do."""

import jax

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets.
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
    """Of one device; None where it is not known, as for CPUs."""
    matches = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def multiplies_fp8(device: jax.Device) -> bool:
    """Whether a device has matrix units for 8-bit floats: NVIDIA from compute capability 8.9 on, and TPU7x."""
    if device.platform == "gpu" and "NVIDIA" in device.device_kind:
        return tuple(map(int, device.compute_capability.split("."))) >= (8, 9)
    return device.device_kind.startswith("TPU7x")


def traced_platform() -> str:
    """The platform that is traced for, cpu, tpu, cuda or rocm: that of the mesh, which may be another than this one."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform == "gpu":
        return "rocm" if "AMD" in device.device_kind else "cuda"
    return device.platform
