"""What the backward pass recomputes under each policy, counted in its program."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, documents, pack, text_loss, tiny_config

from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import put_batch
from maxlm.core.parameters import initialize
from maxlm.core.sharding import make_mesh
from maxlm.models.decoder import Decoder

MOE = {"num_experts": 4, "experts_per_token": 2, "dim": 8}
TEXT = pack(documents(), rows=4, length=32, per_row=3)


def gradient_of(remat, mesh=None, dtype="float32", **changes):
    """The gradient function of (model, text), and a model and a text to call it with."""
    execution = EXECUTION.model_copy(update={"remat": remat, "activation_dtype": dtype, "matmul_dtype": dtype})
    model = initialize(Decoder(tiny_config(**changes), execution), jax.random.key(0), mesh)

    def loss(model, text):
        return sum(term.mean() for term in text_loss(model, text).terms.values())

    return jax.grad(loss), model, TEXT if mesh is None else put_batch(TEXT, mesh)


def count(jaxpr, name) -> int:
    """Equations of a primitive in a program and all programs within it, each counted once."""
    inner = jax.core.jaxprs_in_params
    return sum(
        (equation.primitive.name == name) + sum(count(each, name) for each in inner(equation.params))
        for equation in jaxpr.eqns
    )


def products(remat, **changes) -> int:
    gradient, *arguments = gradient_of(remat, **changes)
    return count(jax.make_jaxpr(gradient)(*arguments).jaxpr, "dot_general")


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "dtype": "bfloat16"}, {"moe": MOE}])
def test_dots_recomputes_no_product(changes):
    """Nor attention: its output and the logarithm of its sum are saved too."""
    none, dots, full = (products(remat, **changes) for remat in ("none", "dots", "full"))
    assert none == dots
    # Queries, keys, values, the output; gate and up; attention's two products for its blocks.
    assert full >= none + 8


@pytest.mark.parametrize(("fast", "chosen"), [(True, "full"), (False, "dots")])
def test_auto_recomputes_products_where_they_are_fast(fast, chosen, monkeypatch):
    monkeypatch.setattr("maxlm.core.remat.multiplies_bfloat16", lambda: fast)
    assert products("auto") == products(chosen)


def test_products_are_saved_in_the_dtype_of_activations():
    gradient, *arguments = gradient_of("dots", dtype="bfloat16")
    scans = [each for each in jax.make_jaxpr(gradient)(*arguments).jaxpr.eqns if each.primitive.name == "scan"]
    stacked = [variable.aval for variable in scans[0].outvars[scans[0].params["num_carry"] :]]
    # All arrays with more than a number for each token and head, which the logarithm of attention's sum has.
    layers, (rows, length), heads = 2, TEXT.tokens.shape, 4
    wide = [aval for aval in stacked if aval.size > layers * rows * length * heads]
    assert len(wide) == 8  # the input; query, key, value, attention, its output product; gate and up
    assert {aval.dtype for aval in wide} == {jnp.dtype("bfloat16")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, context=2, tensor=2)])
@pytest.mark.parametrize("changes", [{}, {"moe": MOE}])
def test_policies_have_equal_gradients(mesh, changes):
    mesh = mesh and make_mesh(mesh)

    def gradient(remat):
        function, *arguments = gradient_of(remat, mesh, **changes)
        return jax.tree.leaves(jax.jit(function)(*arguments))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        results = [gradient(remat) for remat in ("none", "dots", "full")]
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), results[0], other)
