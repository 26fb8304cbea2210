"""Learning-rate schedules."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from maxlm.config.optim import ScheduleConfig


def schedule_factor(config: ScheduleConfig, num_steps: int, step: ArrayLike) -> jax.Array:
    """Factor on the learning rate at `step` (0-based): warm-up from 1/warmup_steps to 1, then decay."""
    step = jnp.asarray(step, jnp.float32)
    warmup_steps = config.warmup(num_steps)
    warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if config.kind == "constant":
        return warmup
    if config.kind == "inverse_sqrt":
        # 1 where the warm-up ends (arXiv:1706.03762, section 5.3).
        return warmup * jnp.sqrt(max(warmup_steps, 1) / jnp.maximum(step + 1, warmup_steps))
    start = num_steps - round(config.decay_fraction * num_steps) if config.kind == "wsd" else warmup_steps
    done = jnp.clip((step - start) / max(num_steps - start, 1), 0.0, 1.0)
    if config.kind == "cosine_restarts":
        done = _cycle_done(done, config.cycles, config.cycle_growth)
    shape = 0.5 * (1 + jnp.cos(jnp.pi * done)) if config.kind.startswith("cosine") else 1 - done
    return warmup * (config.final_factor + (1 - config.final_factor) * shape)


def _cycle_done(done: jax.Array, cycles: int, growth: float) -> jax.Array:
    """Fraction done of the current cycle, given the fraction done of all cycles, whose lengths grow by a factor
    (arXiv:1608.03983)."""
    lengths = [growth**cycle for cycle in range(cycles)]
    ends = [sum(lengths[: cycle + 1]) / sum(lengths) for cycle in range(cycles)]
    starts = jnp.array([0.0, *ends[:-1]])
    # The final step ends the last cycle.
    cycle = jnp.sum(done[..., None] >= starts, axis=-1) - 1
    return jnp.clip((done - starts[cycle]) * sum(lengths) / jnp.array(lengths)[cycle], 0.0, 1.0)
