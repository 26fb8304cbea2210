"""Verification: variants, reduced configurations, and reports."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from small import OBJECTIVES, config_of, small_model

from maxlm.cli import main
from maxlm.config.load import dump_yaml
from maxlm.core.sharding import MESH_AXES
from maxlm.errors import RequestError
from maxlm.verify import examples
from maxlm.verify.reduce import describe_subject, reduced_config, reduced_model
from maxlm.verify.report import Finding, Report, compare
from maxlm.verify.run import choose, verify
from maxlm.verify.show import conclusion, failure, markdown, summary, table
from maxlm.verify.subject import Measured
from maxlm.verify.variants import meshes, variants_of

SAME = Finding("mesh", "data=2, fsdp=2", 1e-7, "policy", 3e-6, "embedding", seconds=1.0)
WRONG = Finding(
    "padding", "more rows", 1e-9, "preference", 0.02, "final_norm", first="layers/0/0/mlp/up[1]", first_difference=3e-4
)
SKIPPED = Finding("mesh", "tensor=2", skipped="num_heads: 3 is not divisible")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("reward", {}),
        ("process_reward", {}),
        ("cost", {}),
        ("preference", {}),
        ("unpaired_preference", {}),
        ("distill", {}),
        ("distill_chat", {}),
        ("online_preference", {}),
        ("policy", {"adapters": {"kind": "lora", "rank": 4}}),
    ],
    ids=[
        "reward",
        "process reward",
        "cost",
        "preference",
        "kto",
        "distill",
        "chat distill",
        "online dpo",
        "grpo with adapters",
    ],
)
def test_every_objective_passes_with_padding_and_on_three_axes(kind, settings):
    report = verify(config_of(kind, **settings), only=["padding", "mesh: data=2, fsdp=2, tensor=2"])
    assert [finding.verdict for finding in report.findings] == ["same", "same"], report


PPO = {
    "advantage": {"kind": "gae"},
    "critic": {"kind": "own"},
    "importance": {"level": "answer"},
    "entropy_weight": 0.1,
}
PAIRS = {"loss": {"kind": "aot", "paired": False}, "tail_weight": 0.5, "weight_by_policy": True, "sft_on_prompts": True}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [
        ("policy", PPO | {"average": "answers", "top_entropy_fraction": 0.2}, "mesh: stage=2, 1f1b"),
        ("policy", PPO | {"surrogate": {"kind": "clip", "ratio": "answer"}}, "mesh: fsdp=2, context=2, tensor=2"),
        ("preference", PAIRS, "mesh: fsdp=2, context=2, tensor=2"),
    ],
    ids=["critic in a pipeline", "ratios of answers", "optimal transport"],
)
def test_losses_over_whole_answers_do_not_depend_on_the_layout(kind, settings, layout):
    objective = {"kind": kind, **OBJECTIVES[kind], **settings}
    report = verify(config_of(kind, objective=objective), only=[layout])
    assert {finding.verdict for finding in report.findings} == {"same"}, report


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_noise_is_the_same_in_every_layout(kind):
    rates = {"neftune_alpha": 5.0, "embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.3}
    rates |= {"stochastic_depth": 0.3}
    layouts = [
        "accumulation: 2",
        "attention: xla",
        "mesh: data=2, context=2, tensor=2",
        "mesh: stage=2, expert=2, tensor=2",
        "mesh: fsdp=2, context=2, tensor=2, all_to_all",
        "mesh: stage=2, 1f1b",
    ]
    report = verify(config_of(kind, regularization=rates), only=layouts[: 6 if kind == "sft" else 3])
    assert {finding.verdict for finding in report.findings} == {"same"}, report


ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LATENT = {"kind": "mla", "num_heads": 4, "latent_dim": 16, "content_dim": 8, "rope_dim": 4, "value_dim": 8}
GATED = {"kind": "gated", "dim": 24}
DYNAMIC = {"kind": "dynamic", "factor": 4.0, "original_length": 16}
# Each kind of mixer, MLP, norm and residual, with each of their settings, is in one of them.
KINDS = {
    "recurrence, biases by distance, norms around": {
        "norm": {"kind": "layer", "placement": "around"},
        "embedding_norm": True,
        "layers": {
            "repeat": 2,
            "pattern": [
                {"times": 2, "mixer": {"kind": "gru", "dim": 12}, "mlp": {"kind": "plain", "dim": 24}},
                {
                    "mixer": ATTENTION | {"window": 16, "rope": None, "alibi": True, "alibi_scale": 0.5},
                    "mlp": {"kind": "moe", "dim": 12},
                },
                {
                    "mixer": ATTENTION
                    | {"rope": {"theta": 500.0}, "qk_norm": True, "qk_norm_over": "all_heads", "soft_cap": 5.0}
                },
                {"mixer": ATTENTION | {"rope": None, "relative_bias": {}}, "mlp": GATED | {"activation": "gelu"}},
            ],
        },
    },
    "sinks, biases, parallel, learned positions": {
        "residual": "parallel",
        "norm": {"kind": "rms", "unit_offset": True},
        "learned_positions": 512,
        "layers": {
            "repeat": 2,
            "pattern": [
                {"mixer": ATTENTION | {"sinks": True, "window": 16, "bias": True, "out_bias": True}, "mlp": GATED},
                {"mixer": ATTENTION | {"sinks": True, "qk_norm": True, "rope": {"share": 0.5}}},
            ],
        },
    },
    "latent attention, groups of experts, norms after": {
        "norm": {"kind": "rms", "placement": "after"},
        "layers": [
            {"repeat": 1, "mixer": LATENT | {"query_rank": 16, "bias": True}, "mlp": GATED},
            {
                "repeat": 2,
                "mixer": LATENT,
                "mlp": {
                    "kind": "moe",
                    "dim": 12,
                    "num_groups": 4,
                    "groups_per_token": 2,
                    "group_score": "best_two",
                    "scoring": "sigmoid",
                    "router_bias": True,
                    "num_shared_experts": 1,
                    "routed_scaling": 2.0,
                },
            },
        ],
    },
    "experts with biases, one norm, rotation by length": {
        "residual": "parallel_one_norm",
        "norm": {"kind": "layer", "bias": False},
        "layers": {
            "repeat": 2,
            "mixer": ATTENTION | {"rope": {"scaling": DYNAMIC}},
            "mlp": {
                "kind": "moe",
                "dim": 12,
                "num_experts": 4,
                "bias": True,
                "swiglu_limit": 2.0,
                "router_logit_bias": True,
                "num_shared_experts": 1,
                "shared_dim": 20,
                "shared_gate": True,
            },
        },
    },
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_layers_are_the_same_in_every_layout(name):
    layouts = [
        "mesh: data=2, context=2, tensor=2",
        "mesh: stage=2, expert=2, tensor=2",
        "mesh: fsdp=2, context=2, tensor=2, all_to_all",
        "mesh: stage=2, 1f1b",
    ]
    report = verify(config_of("sft", model=small_model() | KINDS[name]), only=layouts)
    assert [finding.verdict for finding in report.findings] == ["same"] * len(layouts), report


def test_fine_tuning_of_an_imported_model_is_verified(imported_run, tmp_path, capsys):
    config = config_of(
        "sft", init_from=str(imported_run), model=None, execution=None, adapters={"kind": "lora", "rank": 2}
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert main(["verify", str(file), "--only", "mesh: fsdp=2", "--only", "packing", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert f"that of {imported_run}" in report["subject"]


@pytest.mark.exhaustive
def test_prefixes_are_the_same_in_every_layout():
    rope = {"two_dimensional": True, "theta": 500.0}
    layers = {"repeat": 2, "mixer": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": rope, "window": 40}}
    model = small_model() | {"prefix_attention": True, "layers": layers}
    layouts = [
        "packing",
        "mesh: data=2, context=2, tensor=2",
        "mesh: fsdp=2, context=2, tensor=2, all_to_all",
        "mesh: stage=2, 1f1b",
    ]
    report = verify(config_of("prefix_lm", model=model), only=layouts)
    assert {finding.verdict for finding in report.findings} == {"same"}, report


MODULE_MIXER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("modules", "rates", "layouts"),
    [
        (
            {"modules": 2},
            {},
            ["packing", "remat: full", "mesh: data=2, context=2, tensor=2", "mesh: stage=2, expert=2, tensor=2"],
        ),
        (
            {"layer": {"mixer": MODULE_MIXER, "mlp": {"kind": "moe", "dim": 12, "router_bias": True}}},
            {"embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.3, "stochastic_depth": 0.3},
            ["mesh: fsdp=2, expert=2, context=2", "mesh: stage=2, 1f1b"],
        ),
    ],
    ids=["two", "experts and noise"],
)
def test_prediction_modules_are_the_same_in_every_layout(modules, rates, layouts):
    layers = {"repeat": 2, "mixer": MODULE_MIXER, "mlp": {"dim": 24}}
    model = {"embed_dim": 16, "layers": layers, "multi_token": modules}
    report = verify(config_of("multi_token", model=model, regularization=rates), only=layouts)
    assert {finding.verdict for finding in report.findings} == {"same"}, report


def variants(kind="sft", **settings):
    config = config_of(kind, **settings)
    return list(variants_of(config, reduced_config(config, vocab_size=64), num_devices=8))


def test_every_pair_of_mesh_axes_is_covered():
    wide = [{axis for axis in MESH_AXES if getattr(mesh, axis) == 2} for mesh in meshes(all_products=False)]
    assert all(any({left, right} <= axes for axes in wide) for left, right in itertools.combinations(MESH_AXES, 2))
    assert all({axis} in wide for axis in MESH_AXES)
    assert len(list(meshes(all_products=True))) == 6 + 15 + 20 + 1


def test_mesh_that_does_not_fit_is_skipped_with_the_number_to_change():
    found = {variant.name: variant.skipped for variant in variants(model=small_model(num_heads=3, num_kv_heads=1))}
    assert "model.layers.mixer.num_heads: 3 is not divisible by mesh.tensor = 2" in found["mesh: tensor=2"]
    assert found["mesh: data=2"] is None


def test_meshes_need_enough_devices():
    config = config_of("sft")
    found = variants_of(config, reduced_config(config, vocab_size=64), num_devices=1)
    reasons = [variant.skipped for variant in found if variant.mesh is not None]
    assert all("there are 1" in reason for reason in reasons)


def test_exact_names_take_precedence_over_partial_ones():
    assert [variant.detail for variant in choose(variants(), ["mesh: data=2"])] == ["data=2"]
    assert [variant.detail for variant in choose(variants(), ["accumulation"])] == ["2", "4"]
    staged = choose(variants(), ["mesh.stage"])
    assert {"mesh: stage=2", "mesh: stage=2, fsdp=2, context=2"} <= {variant.name for variant in staged}
    assert all(variant.mesh.stage == 2 for variant in staged)
    assert [variant.name for variant in choose(variants(), ["one dev"])] == ["one device: as configured"]
    with pytest.raises(RequestError, match="--only 'packs': matches no variant; groups are accumulation, packing"):
        choose(variants(), ["packs"])


def test_reduced_model_keeps_structure():
    config = config_of(
        "sft",
        model=small_model(
            num_layers=24,
            num_heads=32,
            num_kv_heads=8,
            window_pattern=[4096, 512, None],
            tie_embeddings=False,
            qk_norm=True,
            logit_soft_cap=30.0,
            moe={"num_experts": 64, "experts_per_token": 4, "dim": 512, "num_shared_experts": 1},
        ),
    )
    reduced = reduced_config(config, vocab_size=64)
    small = reduced.model
    assert small.num_layers == 12
    assert (small.tie_embeddings, small.logit_soft_cap) == (False, 30.0)
    [group] = small.layers
    assert [layer.mixer.window for layer in group.pattern] == [11, 5, None]
    for layer in group.pattern:
        assert layer.mixer.num_heads // layer.mixer.num_kv_heads == 4
        assert layer.mixer.qk_norm
        assert (layer.mlp.experts_per_token, layer.mlp.num_shared_experts) == (4, 1)
        assert layer.mlp.num_experts < 64
    assert (reduced.execution.activation_dtype, reduced.execution.matmul_dtype) == ("float32", "float32")


@pytest.mark.parametrize(("turns", "kept"), [(1, 1), (2, 2), (3, 3), (5, 1), (6, 2), (12, 4), (18, 2), (30, 2)])
def test_reduced_model_fits_stages_if_full_model_does(turns, kept):
    for pattern in ([None], [None] * 6):
        model = small_model(num_layers=turns * len(pattern), window_pattern=pattern)
        assert reduced_model(config_of("sft", model=model).model, vocab_size=64).num_layers == kept * len(pattern)
        skipped = {variant.name: variant.skipped for variant in variants(model=model)}
        assert (skipped["mesh: stage=2"] is None) is (turns % 2 == 0)


def test_reduced_model_keeps_groups():
    """The longest one is shared by stages, as in the full model; of the others one turn is enough."""
    local, every = {"mixer": {"window": 512}}, {"mlp": {"kind": "moe", "num_experts": 32, "dim": 64}}
    pattern = [{"times": 5, **local}, {"times": 1, **every}]
    layers = [{"repeat": 3, **local}, {"repeat": 8, "pattern": pattern}, {"repeat": 2, **every}]
    small = reduced_model(config_of("sft", model={"layers": layers}).model, vocab_size=64)
    assert [(group.repeat, [layer.times for layer in group.pattern]) for group in small.layers] == [
        (1, [1]),
        (4, [2, 1]),
        (1, [1]),
    ]
    assert small.longest_group == 1
    assert [layer.mlp.kind for layer in small.each_layer()] == ["gated", *["gated", "gated", "moe"] * 4, "moe"]
    assert {layer.mixer.window for layer in small.each_layer()} == {5, None}


def test_configured_mesh_is_a_variant():
    fitting = variants(mesh={"tensor": 4}, model=small_model(num_kv_heads=4))
    skipped = {variant.name: variant.skipped for variant in fitting}
    assert skipped["mesh: fsdp=2, tensor=4, the configuration's own"] is None
    skipped = {variant.name: variant.skipped for variant in variants(mesh={"tensor": 3})}
    assert "is not divisible by mesh.tensor = 3" in skipped["mesh: fsdp=2, tensor=3, the configuration's own"]


def test_every_loss_term_is_enabled():
    small = reduced_config(config_of("preference"), vocab_size=64)
    assert small.objective.sft_weight >= 0.1
    assert reduced_config(config_of("policy"), vocab_size=64).objective.kl.beta >= 0.1


@pytest.mark.parametrize(
    ("eight_bit", "ending"),
    [(None, "float32"), ("int8", "float32, without the 8-bit rounding of execution.eight_bit=int8")],
)
def test_subject_says_that_8_bit_rounding_is_disabled(eight_bit, ending):
    config = config_of("sft", execution={"eight_bit": eight_bit})
    subject = describe_subject(reduced_config(config, vocab_size=64), config, "its own")
    assert subject.endswith(f"8 rows of 96 tokens, {ending}")


def test_examples_cover_known_bugs():
    rows = examples.make_documents(np.random.default_rng(0), num_rows=8, length=96, vocab_size=64)
    batch = examples.lay_out_rows(rows, length=96)
    real = batch.segment_ids > 0
    assert (batch.tokens[real] == 0).any()
    assert (batch.targets[batch.loss_weights > 0] == 0).any()
    assert (batch.loss_weights[real] == 0).any()
    assert min(len(document.tokens) for row in rows for document in row) == 1
    weights = batch.loss_weights.reshape(2, 4, 96).sum((0, 2))
    assert weights[1] < 0.4 * np.delete(weights, 1).min()
    alone = examples.unpack(rows, multiple=8)
    np.testing.assert_allclose(alone.loss_weights.sum(), batch.loss_weights.sum(), rtol=1e-6)
    assert alone.segment_ids.max() == 1


def test_first_differing_parameter_and_layer_are_named():
    gradient = {"embedding": np.ones((4, 2)), "layers/0/0/mlp/up": np.ones((3, 2, 2)), "final_norm": np.full(2, 5.0)}
    other = {path: leaf.copy() for path, leaf in gradient.items()}
    other["layers/0/0/mlp/up"][1, 0, 0] += 0.5
    other["final_norm"] += 5
    numbers = compare(Measured({"a": 2.0, "b": 1.0}, gradient), Measured({"a": 2.0, "b": 1.1}, other), list(gradient))
    assert (numbers["first"], numbers["first_difference"]) == ("layers/0/0/mlp/up[1]", 0.5)
    assert (numbers["parameter"], numbers["gradient_difference"]) == ("final_norm", 1.0)
    assert numbers["term"] == "b"
    assert numbers["loss_difference"] == pytest.approx(0.1)


def test_nan_counts_as_difference():
    assert Finding("mesh", "data=2", gradient_difference=float("nan")).verdict == "differs"
    assert Finding("mesh", "data=2", loss_difference=float("nan")).verdict == "differs"


def test_report_as_text_and_tables():
    report = Report("a.yaml", "sft", (SAME, WRONG, SKIPPED), 2.0)
    assert not report.passed
    assert report.largest() == {"mesh.data": 3e-6, "mesh.fsdp": 3e-6, "padding": 0.02}
    assert failure(WRONG) == (
        "padding: more rows differs: gradients from layers/0/0/mlp/up[1] on, by 3.0e-04 of its largest entry, and most"
        " in final_norm, by 2.0e-02"
    )
    assert failure(replace(WRONG, first="final_norm", first_difference=0.02)) == (
        "padding: more rows differs: gradients from final_norm on, by 2.0e-02 of its largest entry"
    )
    text = markdown(report)
    assert "| mesh: data=2, fsdp=2 | 1.0e-07 | 3.0e-06 | embedding | same | 1.0 |" in text
    assert "skipped: num_heads: 3 is not divisible" in text
    assert "| mesh.data | 3.0e-06 |" in summary([report])
    terminal = Console(file=io.StringIO(), width=200)
    terminal.print(table(Report("a.yaml", "sft", (SAME, WRONG, SKIPPED, replace(SKIPPED, detail="tensor=4")), 2.0)))
    *rows, skipped, failed = terminal.file.getvalue().splitlines()
    assert sum("same" in row for row in rows) == sum("differs" in row for row in rows) == 1
    assert skipped == "skipped (num_heads: 3 is not divisible): mesh: tensor=2; mesh: tensor=4"
    assert failed.startswith("padding: more rows differs")


def test_report_without_comparisons_does_not_pass():
    report = Report("a.yaml", "sft", (SKIPPED,), 2.0)
    assert not report.passed
    assert conclusion(report) == "nothing was compared: mesh: tensor=2: num_heads: 3 is not divisible"
    assert conclusion(Report("a.yaml", "sft", (SKIPPED, SAME), 2.0)).startswith(
        "1 way gives the same: largest gradient difference 3.0e-06 (mesh: data=2, fsdp=2;"
    )


def test_command_exits_with_1_if_something_differs(monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config_of("sft")))
    for findings, code in (((SAME, SKIPPED), 0), ((SAME, WRONG), 1), ((SKIPPED,), 1)):
        report = Report(str(file), "sft", findings, 2.0)
        monkeypatch.setattr("maxlm.verify.run.verify", lambda config, report=report, **settings: report)
        assert main(["verify", str(file), "--json"]) == code
        assert json.loads(capsys.readouterr().out)["passed"] is (code == 0)
        assert main(["verify", str(file)]) == code
        assert findings[0].detail in capsys.readouterr().out.replace("\n", "")
