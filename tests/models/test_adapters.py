"""Adapters: what they change, and what stays frozen; merged weights compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, VOCAB_SIZE, drawn_model, tiny_config

from maxlm.config.adapters import BitfitConfig, Ia3Config, LayersConfig, LoraConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.apply import apply_adapters, merge_adapters, unmerge_adapters
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.decoder import Decoder


def with_biases(repeats: tuple[int, ...] = (2,)):
    """Two layers with biases, in groups of these repeats."""
    [group] = tiny_config().layers
    [layer] = group.pattern
    layer = layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"bias": True})})
    groups = tuple(group.model_copy(update={"repeat": repeat, "pattern": (layer,)}) for repeat in repeats)
    return tiny_config().model_copy(update={"layers": groups})


CONFIG = with_biases()
PLAN = Decoder(CONFIG, EXECUTION)
LORA = LoraConfig(rank=3, alpha=6.0)
KINDS = {
    "lora": LORA,
    "rslora": LoraConfig(rank=3, scaling="rank_stabilized"),
    "dora": LoraConfig(rank=3, alpha=6.0, decomposed=True),
    "lora of a layer": LoraConfig(rank=2, targets=("layers/1/*",), decomposed=True),
    "ia3": Ia3Config(),
    "bitfit": BitfitConfig(),
    "layers": LayersConfig(targets=("role:norm", "layers/1/mlp/*")),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return drawn_model(CONFIG)


def drawn(config, model):
    """Adapters that change the model."""
    random = np.random.default_rng(1)
    fresh = create_adapters(PLAN, config, model, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32), fresh)


@jax.jit
def logits(model):
    return model.logits(model(TOKENS).hidden_BLD)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_adapted_model_starts_as_the_base(model, config):
    fresh = create_adapters(PLAN, config, model, jax.random.key(1))
    np.testing.assert_allclose(logits(apply_adapters(model, fresh, config)), logits(model), atol=3e-5)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_merged_weights_compute_the_same(model, config):
    adapters = drawn(config, model)
    merged = merge_adapters(model, adapters, config)
    assert np.abs(logits(merged) - logits(model)).max() > 0.1
    np.testing.assert_allclose(logits(apply_adapters(model, adapters, config)), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3"])
def test_unmerged_weights_are_those_of_the_base(model, kind):
    adapters = drawn(KINDS[kind], model)
    merged = merge_adapters(model, adapters, KINDS[kind])
    unmerged = flatten(unmerge_adapters(merged, adapters, KINDS[kind]))
    for path, leaf in flatten(model).items():
        np.testing.assert_allclose(unmerged[path], leaf, rtol=1e-5, atol=3e-6, err_msg=path)


@pytest.mark.parametrize(("kind", "lost"), [("dora", "the lengths of weights"), ("bitfit", "whole weights")])
def test_what_is_replaced_cannot_be_unmerged(model, kind, lost):
    with pytest.raises(ValueError, match=f"replaces {lost}, which the merged weights no longer tell; load the base"):
        unmerge_adapters(model, drawn(KINDS[kind], model), KINDS[kind])


def test_merged_weights_are_those_of_the_equations(model):
    """In float64, for two of the matrices of each kind."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model).items()}
    product = lambda each: np.asarray(each["down"], np.float64) @ np.asarray(each["up"], np.float64)  # noqa: E731

    def merged(kind):
        adapters = drawn(KINDS[kind], model)
        return adapters, flatten(merge_adapters(model, adapters, KINDS[kind]))

    key, down = "layers/0/0/mixer/key", "layers/0/0/mlp/down"
    for path in (key, down):
        adapters, found = merged("lora")
        np.testing.assert_allclose(found[path], flat[path] + 6 / 3 * product(adapters[path]), atol=1e-5)
        adapters, found = merged("rslora")
        np.testing.assert_allclose(found[path], flat[path] + 16 / 3**0.5 * product(adapters[path]), atol=1e-5)
        adapters, found = merged("dora")
        whole = flat[path] + 6 / 3 * product(adapters[path])
        lengths = np.sqrt((whole**2).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found[path], adapters[path]["magnitude"][:, None] * whole / lengths, atol=1e-5)
    adapters, found = merged("ia3")
    factor = np.asarray(adapters[key]["output_scale"], np.float64)
    np.testing.assert_allclose(found[key], flat[key] * factor[:, None], atol=1e-6)
    np.testing.assert_allclose(found[f"{key}_bias"], flat[f"{key}_bias"] * factor, atol=1e-6)
    np.testing.assert_allclose(
        found[down], flat[down] * np.asarray(adapters[down]["input_scale"])[..., None], atol=1e-6
    )


def test_merged_weights_keep_the_dtype_of_the_base_and_are_rounded_once(model):
    adapters = drawn(LORA, model)
    rough = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rough)
    exact = flatten(merge_adapters(same, adapters, LORA))
    for path, leaf in flatten(merge_adapters(rough, adapters, LORA)).items():
        assert leaf.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(leaf, exact[path].astype(jnp.bfloat16), err_msg=path)


def test_gradients_follow_from_merged_weights_and_none_reaches_the_base(model):
    """By the chain rule through W + scale * down @ up."""
    adapters = drawn(LORA, model)
    coefficients = np.random.default_rng(2).standard_normal((*TOKENS.shape, VOCAB_SIZE))
    score = lambda model: (logits(model) * coefficients).sum()  # noqa: E731
    grads, frozen = jax.jit(
        jax.grad(lambda adapters, model: score(apply_adapters(model, adapters, LORA)), argnums=(0, 1))
    )(adapters, model)
    whole = flatten(jax.jit(jax.grad(score))(merge_adapters(model, adapters, LORA)))
    for path, adapter in adapters.items():
        down, up = np.asarray(adapter["down"]), np.asarray(adapter["up"])
        size = np.abs(whole[path]).max()
        np.testing.assert_allclose(
            grads[path]["down"], 2.0 * whole[path] @ up.swapaxes(1, 2), rtol=1e-3, atol=1e-4 * size
        )
        np.testing.assert_allclose(
            grads[path]["up"], 2.0 * down.swapaxes(1, 2) @ whole[path], rtol=1e-3, atol=1e-4 * size
        )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen))


def test_numbers_of_layers_in_paths_choose_layers_of_a_stack():
    query = "layers/0/0/mixer/query"
    assert set(declare_adapters(PLAN, LoraConfig(rank=2, targets=("query",)))) == {query}
    down = declare_adapters(PLAN, LoraConfig(rank=2, targets=("query",)))[query]["down"]
    assert (down.shape, down.trained) == ((2, 16, 2), None)
    one = declare_adapters(PLAN, LoraConfig(rank=2, targets=("layers/[1-9]/mixer/q*",)))
    assert {path: each["up"].trained for path, each in one.items()} == {query: (False, True)}
    roles = declare_adapters(PLAN, LayersConfig(targets=("role:table", "final_norm/scale")))
    assert set(roles) == {"embedding", "final_norm/scale"}


def test_random_numbers_of_a_layer_do_not_depend_on_how_layers_are_stacked():
    apart, config, key = with_biases((1, 1)), LoraConfig(rank=2, targets=("query",)), jax.random.key(3)
    together = initialize(declare_adapters(PLAN, config), key)["layers/0/0/mixer/query"]["down"]
    one, two = initialize(declare_adapters(Decoder(apart, EXECUTION), config), key).values()
    np.testing.assert_array_equal(together, np.concatenate([one["down"], two["down"]]))


NO_BIASES = Decoder(tiny_config(), EXECUTION)


@pytest.mark.parametrize(
    ("plan", "config", "message"),
    [
        (
            PLAN,
            LoraConfig(targets=("query", "norm")),
            "adapters.targets: 'norm' is not a matrix; allowed: down, gate, key",
        ),
        (
            PLAN,
            LoraConfig(targets=("layers/2/mixer/query",)),
            "adapters.targets: 'layers/2/mixer/query' matches no matrix; the nearest are layers/",
        ),
        (
            PLAN,
            LayersConfig(targets=("role:norms",)),
            "adapters.targets: 'role:norms' matches no parameter; allowed: role:bias",
        ),
        (
            PLAN,
            LoraConfig(rank=9),
            "adapters.rank: 9 exceeds the smaller side of layers/0/0/mixer/key, which is 16 x 8",
        ),
        (NO_BIASES, BitfitConfig(), "adapters.kind: bitfit trains biases, and the model has none; set lora or ia3"),
        (PLAN, Ia3Config(outputs=("down",)), "adapters.inputs: layers/0/0/mlp/down is also in adapters.outputs"),
        (PLAN, Ia3Config(outputs=(), inputs=()), "adapters.outputs: is empty, and so is adapters.inputs"),
    ],
    ids=["name", "path", "role", "rank", "no biases", "twice", "nothing"],
)
def test_what_a_model_does_not_have_is_refused_by_name(plan, config, message):
    with pytest.raises(ConfigError) as error:
        declare_adapters(plan, config)
    assert message in str(error.value)
