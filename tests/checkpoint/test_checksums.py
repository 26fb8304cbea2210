"""Checksums detect every change of an array, and depend only on its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint.checksums import checksums
from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh

DTYPES = ("bfloat16", "float32", "int8", "uint32")


def random_array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape) * 40
    return np.asarray(values if dtype in ("bfloat16", "float32") else np.abs(values), jnp.dtype(dtype))


def checksum(x: np.ndarray) -> int:
    return checksums({"x": jnp.asarray(x)})["x"]


def swapped(x: np.ndarray, one: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
    y = x.copy()
    y[one], y[other] = x[other], x[one]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_values_change_the_checksum(dtype):
    square = random_array((24, 24), dtype)
    stack = random_array((3, 8, 8), dtype)
    moved = {
        "transposed": (square, square.T),
        "transposed in a stack": (stack, stack.mT),
        "rows in another order": (square, square[::-1]),
        "columns in another order": (square, np.roll(square, 1, axis=1)),
        "layers in another order": (stack, stack[[1, 0, 2]]),
    }
    for what, (x, y) in moved.items():
        assert checksum(x) != checksum(y), what


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapping_any_two_entries_changes_the_checksum(dtype):
    x = random_array((4, 4), dtype)
    places = list(np.ndindex(x.shape))
    expected = checksum(x)
    for number, one in enumerate(places):
        for other in places[:number]:
            if x[one] != x[other]:
                assert checksum(swapped(x, one, other)) != expected, (one, other)


def test_swapping_values_that_differ_in_few_bits_changes_the_checksum():
    """Opposite numbers differ only in the highest bit, and powers of two in the exponent: most sums miss those."""
    x = np.ones((8, 8), np.float32)
    x[0, 1], x[3, 2], x[5, 5] = -1, 2, 4
    places = list(np.ndindex(x.shape))
    assert all(checksum(swapped(x, (0, 1), place)) != checksum(x) for place in places if x[place] != -1)
    assert all(checksum(swapped(x, (3, 2), place)) != checksum(x) for place in places if x[place] != 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_checksum(dtype):
    x = random_array((5, 7), dtype)
    found = {checksum(x)}
    for bit in range(8 * x.nbytes):
        content = bytearray(x.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        found.add(checksum(np.frombuffer(bytes(content), x.dtype).reshape(x.shape)))
    assert len(found) == 8 * x.nbytes + 1


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checksum_is_the_same_on_every_mesh(sizes):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    specs = {
        "matrix": ((16, 32), P("fsdp", "tensor")),
        "turned": ((16, 32), P("tensor", "fsdp")),
        "stack": ((3, 16, 8), P(None, ("fsdp", "tensor"), None)),
        "vector": ((16,), P("fsdp")),
        "whole": ((5, 3), P()),
        "number": ((), P()),
    }
    arrays = {f"{name} {dtype}": random_array(shape, dtype) for name, (shape, _) in specs.items() for dtype in DTYPES}
    cut = {name: jax.device_put(x, NamedSharding(mesh, specs[name.split()[0]][1])) for name, x in arrays.items()}
    expected = checksums(jax.tree.map(jnp.asarray, arrays))
    assert checksums(cut) == expected
    with jax.set_mesh(mesh):
        assert checksums(cut) == expected
