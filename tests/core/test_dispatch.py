"""Programs are dispatched ahead of the devices, but not further than the runtime can take."""

import os
import subprocess
import sys

import jax.numpy as jnp

from maxlm.core.dispatch import PROGRAMS_IN_FLIGHT, fetched

MANY_REDUCTIONS = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from maxlm.core.dispatch import fetched

x = jax.device_put(jnp.arange(64.0), jax.NamedSharding(jax.make_mesh((8,), ("fsdp",)), P("fsdp")))
total = jax.jit(lambda x, number: jnp.sum(x * number))
for _ in range(3):
    assert list(fetched(total(x, number) for number in range(300))) == [2016 * number for number in range(300)]
"""


def test_hundreds_of_programs_with_collectives_end():
    """With as many threads as devices, which other tests do not have, programs that are dispatched all at once wait for
    one another until XLA ends the process."""
    subprocess.run([sys.executable, "-c", MANY_REDUCTIONS], env={**os.environ, "NPROC": "8"}, check=True, timeout=120)


def test_outputs_are_in_order_and_few_are_under_way():
    dispatched = []

    def outputs():
        for number in range(20):
            dispatched.append(number)
            yield {"number": jnp.asarray(number)}

    for place, output in enumerate(fetched(outputs())):
        assert output == {"number": place}
        assert len(dispatched) <= place + PROGRAMS_IN_FLIGHT + 1
