"""Compare loss terms and gradients of one computation in two layouts."""

from typing import Any

import jax
import numpy as np

from maxlm.core.tree import flatten

# Terms by name as (sum, weight), and the gradient by path.
Result = tuple[dict[str, tuple[float, float]], dict[str, np.ndarray]]


def on_host(terms: dict[str, Any], gradient: Any) -> Result:
    """Terms and gradient as numbers and host arrays."""
    return {name: (float(term.sum), float(term.weight)) for name, term in terms.items()}, flatten(
        jax.device_get(gradient)
    )


def assert_same(left: Result, right: Result, *, atol: float = 1e-5) -> None:
    """`atol` is relative to the largest entry of a parameter's gradient, which must not be zero."""
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        np.testing.assert_allclose(left[0][name], right[0][name], rtol=1e-5, err_msg=name)
    for path, value in right[1].items():
        scale = np.abs(value).max()
        assert scale > 0, path
        np.testing.assert_allclose(left[1][path], value, rtol=1e-4, atol=atol * scale, err_msg=path)
