"""Every kind of adapters has the same loss and gradient on meshes and in a pipeline."""

import pytest
from small import config_of, small_model

from maxlm.verify.run import verify

NF4 = {"kind": "nf4"}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "bias": True}
BIASES = small_model()["layers"] | {"mixer": {"kind": "attention", **ATTENTION}}
KINDS = {
    "dora of a layer, quantized": {
        "kind": "lora",
        "decomposed": True,
        "targets": ["layers/0/*", "query"],
        "base": NF4,
    },
    "ia3, quantized": {"kind": "ia3", "base": {"kind": "int4"}},
    "bitfit": {"kind": "bitfit"},
    "prefix": {"kind": "prefix", "tokens": 4},
    "prefix of an mlp, quantized": {"kind": "prefix", "reparametrize": {"dim": 8}, "base": NF4},
    "prompt, quantized": {"kind": "prompt", "tokens": 5, "base": NF4},
    "layers": {"kind": "layers", "targets": ["layers/0/mlp/*", "role:norm"]},
}


@pytest.mark.exhaustive
def test_dropout_of_adapters_is_the_same_in_every_layout():
    adapters = {"kind": "lora", "rank": 4, "decomposed": True, "base": NF4}
    config = config_of("sft", adapters=adapters, model=small_model(), regularization={"adapter_dropout": 0.3})
    layouts = ["accumulation", "mesh: data=2, fsdp=2, tensor=2", "mesh: fsdp=2, expert=2, context=2"]
    report = verify(config, only=[*layouts, "mesh: stage=2, 1f1b"])
    assert len(report.findings) == 5
    assert {finding.verdict for finding in report.findings} == {"same"}, report


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_pass(kind):
    config = config_of("sft", adapters=KINDS[kind], model=small_model() | {"layers": BIASES})
    report = verify(config, only=["padding", "mesh: data=2, fsdp=2, tensor=2", "mesh: stage=2, 1f1b"])
    skipped = [finding.skipped for finding in report.findings if finding.skipped]
    assert {finding.verdict for finding in report.findings if not finding.skipped} == {"same"}, report
    if not kind.startswith("prompt"):
        assert not skipped
        return
    assert ["of execution.pipeline.schedule=1f1b has its own part; set gpipe" in reason for reason in skipped] == [True]
    # Those who share a row's tokens, and the other schedule.
    report = verify(config, only=["mesh: fsdp=2, expert=2, context=2", "mesh: stage=2, expert=2, tensor=2"])
    assert {finding.verdict for finding in report.findings} == {"same"}, report
