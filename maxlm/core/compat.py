"""Differences between the supported JAX versions, one function each; no other module checks the version."""

import functools

import jax


@functools.cache
def quick_compiler_options() -> dict[str, int | bool]:
    """`compiler_options` for programs that run once, on a CPU: a third of the compile time, slower code."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    # The older code generator for fused operations compiles faster, and will be removed from XLA.
    quickest = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=quickest).lower().compile()
    except jax.errors.JaxRuntimeError:
        return options
    return quickest
