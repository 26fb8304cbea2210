"""Known bugs of training stacks, each planted here: verification must find it, by the correct variant."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from small import config_of, small_model

from maxlm.cli import main
from maxlm.config.load import dump_yaml
from maxlm.core.batch import Batch
from maxlm.core.sharding import current_mesh
from maxlm.core.term import LossOutput, Term
from maxlm.layers import attend, moe
from maxlm.layers.norm import Norm
from maxlm.models import decoder
from maxlm.objectives import sft
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.ops.linear import AdaptedWeight
from maxlm.ops.norm import rms_norm
from maxlm.train import step
from maxlm.verify.run import verify

pytestmark = pytest.mark.exhaustive


def failed(config, *only):
    """Names of the variants that differ."""
    report = verify(config, only=only)
    assert len(report.findings) >= len(only)
    return [finding.name for finding in report.failed]


def test_mean_of_means(monkeypatch):
    original = step.loss_and_gradient

    def mean_of_means(trainable, frozen, batch, *, loss_function, accumulate, pipeline, **settings):
        parts = jax.tree.map(lambda x: step._split(x, accumulate), batch)
        found = [
            original(
                trainable, frozen, jax.tree.map(lambda x, n=n: x[n], parts), loss_function=loss_function, accumulate=1
            )
            for n in range(accumulate)
        ]
        outputs, gradients = zip(*found)
        mean = lambda *leaves: sum(leaves) / accumulate  # noqa: E731
        return jax.tree.map(lambda *leaves: sum(leaves), *outputs), jax.tree.map(mean, *gradients)

    monkeypatch.setattr(step, "loss_and_gradient", mean_of_means)
    assert failed(config_of("sft"), "accumulation: 2", "token ids") == ["accumulation: 2"]


def test_auxiliary_loss_not_scaled_by_microbatch_weight(monkeypatch):
    original = sft.language_model_loss

    def unscaled(model, batch, *, z_loss):
        output = original(model, batch, z_loss=z_loss)
        return LossOutput({**output.terms, "z_loss": Term(output.terms["z_loss"].mean(), jnp.float32(1))}, {})

    monkeypatch.setattr(sft, "language_model_loss", unscaled)
    # The weight of all microbatches together is that of one: each adds its full z-loss.
    monkeypatch.setattr(
        step.Term, "mean", lambda term: term.sum / jnp.where(term.weight > 1, term.weight, 1.0), raising=True
    )
    report = verify(config_of("sft"), only=["accumulation: 2", "token ids"])
    assert [finding.name for finding in report.failed] == ["accumulation: 2"]


def ignore_segments(monkeypatch):
    original = attend.attention

    def without_segments(query, key, value, rule, operands, **settings):
        return original(query, key, value, rule, replace(operands, segments=None), **settings)

    monkeypatch.setattr(attend, "attention", without_segments)


def test_attention_that_ignores_segments(monkeypatch):
    ignore_segments(monkeypatch)
    assert failed(config_of("sft"), "packing", "token ids", "accumulation: 2") == ["packing: a row for each document"]


def test_command_reports_a_bug_and_exits_with_1(monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config_of("sft")))
    command = ["verify", str(file), "--only", "packing"]
    assert main(command) == 0
    assert "1 way gives the same: largest gradient difference" in capsys.readouterr().out
    ignore_segments(monkeypatch)
    assert main(command) == 1
    # A terminal of 80 columns wraps the sentence.
    output = " ".join(capsys.readouterr().out.split())
    number = r"\d\.\de[+-]\d\d"
    sentence = (
        rf"packing: a row for each document differs: \w+ by {number} of it;"
        rf" gradients from embedding on, by {number} of its largest entry"
    )
    assert re.search(sentence, output), output


def test_loss_weights_derived_from_token_id(monkeypatch):
    original = sft.language_model_loss

    def masked(model, batch, *, z_loss):
        text = batch["text"]
        weights = text.loss_weights * (text.targets != 0)
        return original(model, Batch({"text": replace(text, loss_weights=weights)}), z_loss=z_loss)

    monkeypatch.setattr(sft, "language_model_loss", masked)
    assert failed(config_of("sft"), "token ids", "accumulation: 2") == ["token ids: renamed"]


def test_padding_identified_by_token_id(monkeypatch):
    original = sft.language_model_loss

    def masked(model, batch, *, z_loss):
        text = batch["text"]
        weights = jnp.where(text.tokens != 0, jnp.maximum(text.loss_weights, 0.1), text.loss_weights)
        return original(model, Batch({"text": replace(text, loss_weights=weights)}), z_loss=z_loss)

    monkeypatch.setattr(sft, "language_model_loss", masked)
    assert "padding: more rows and columns" in failed(config_of("sft"), "padding")


def test_rollout_without_adapters(monkeypatch):
    original = Sampler.__call__

    def without_adapters(self, model, *args, **settings):
        is_adapted = lambda leaf: isinstance(leaf, AdaptedWeight)  # noqa: E731
        base = jax.tree.map(lambda leaf: leaf.base if is_adapted(leaf) else leaf, model, is_leaf=is_adapted)
        return original(self, base, *args, **settings)

    config = config_of("policy", adapters={"kind": "lora", "rank": 4})
    only = "rollout: after an update, one device"
    assert failed(config, only) == []
    monkeypatch.setattr(Sampler, "__call__", without_adapters)
    assert failed(config, only) == [only]


def test_rollout_with_stale_weights(monkeypatch):
    original, kept = Sampler.__call__, []

    def stale(self, model, *args, **settings):
        kept.append(model)
        return original(self, kept[0], *args, **settings)

    monkeypatch.setattr(Sampler, "__call__", stale)
    only = "rollout: after an update, one device"
    assert failed(config_of("policy"), only) == [only]


def test_gradient_missing_an_all_reduce(monkeypatch):
    """The sum over the data axis is missing for the final norm, as in a shard_map without its psum."""

    @jax.custom_vjp
    def local(x):
        return x

    def backward(_, gradient):
        mesh = current_mesh()
        return (gradient / (1 if mesh is None else mesh.shape["data"]),)

    local.defvjp(lambda x: (x, None), backward)

    class LocalNorm(Norm):
        def __call__(self, x):
            return rms_norm(x, local(self.scale), self.config.epsilon)

    monkeypatch.setattr(decoder, "Norm", LocalNorm)
    report = verify(config_of("sft"), only=["mesh: data=2", "mesh: fsdp=2", "token ids"])
    assert [(finding.name, finding.first) for finding in report.failed] == [("mesh: data=2", "final_norm/scale")]


def test_ring_that_treats_zigzag_as_plain_order(monkeypatch):
    original = attend.context_attention
    monkeypatch.setattr(
        attend, "context_attention", lambda *args, order, **settings: original(*args, order="plain", **settings)
    )
    assert failed(config_of("sft"), "mesh: context=2", "mesh: tensor=2") == ["mesh: context=2"]


def test_expert_balance_computed_over_the_batch(monkeypatch):
    def product_of_means(scores_BLE, experts_BLK, segment_ids_BL):
        real_BL1 = (segment_ids_BL != 0)[..., None].astype(jnp.float32)
        chosen_BLE = jnp.sum(jax.nn.one_hot(experts_BLK, scores_BLE.shape[-1]), axis=-2)
        shares_E, means_E = (jnp.sum(real_BL1 * x, (0, 1)) / jnp.sum(real_BL1) for x in (chosen_BLE, scores_BLE))
        return jnp.sum(real_BL1) * jnp.sum(jax.lax.stop_gradient(shares_E) * means_E)

    monkeypatch.setattr(moe, "document_balance", product_of_means)
    model = small_model(moe={"num_experts": 4, "experts_per_token": 2, "dim": 16})
    assert failed(config_of("sft", model=model), "accumulation: 2", "token ids") == ["accumulation: 2"]
