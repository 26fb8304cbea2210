"""What differs between the versions of JAX that are supported, one function each; nothing else asks for a version."""

import functools

import jax


@functools.cache
def quick_compiler_options() -> dict[str, int | bool]:
    """`compiler_options` for programs that run once, on a CPU: compiled in a third of the time, to slower code."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    # The older of two ways to generate code for fused operations is the quicker one, and the one that will go.
    quickest = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=quickest).lower().compile()
    except jax.errors.JaxRuntimeError:
        return options
    return quickest
