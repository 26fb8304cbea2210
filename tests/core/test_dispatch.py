"""Programs are dispatched ahead of the devices, but not further than the runtime can take."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.config.mesh import MeshConfig
from maxlm.core.dispatch import PROGRAMS_IN_FLIGHT, fetched
from maxlm.core.sharding import make_mesh


def test_hundreds_of_programs_with_collectives_end():
    """Dispatched all at once, they would end the process on CPU: devices that share a reduction wait forever."""
    x = jax.device_put(jnp.arange(64.0), jax.NamedSharding(make_mesh(MeshConfig(fsdp=8)), P("fsdp")))
    total = jax.jit(lambda x, number: jnp.sum(x * number))
    for _ in range(3):
        assert list(fetched(total(x, number) for number in range(300))) == [2016 * number for number in range(300)]


def test_outputs_are_in_order_and_few_are_under_way():
    dispatched = []

    def outputs():
        for number in range(20):
            dispatched.append(number)
            yield {"number": jnp.asarray(number)}

    for place, output in enumerate(fetched(outputs())):
        assert output == {"number": place}
        assert len(dispatched) <= place + PROGRAMS_IN_FLIGHT + 1
