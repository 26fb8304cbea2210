"""Configurations: merging, validation and error messages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from maxlm.config import dump_yaml, json_schema, load_config, parse_config
from maxlm.config.adapters import LoraConfig
from maxlm.config.model import ModelConfig
from maxlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted((ROOT / "configs").rglob("*.yaml"))

KINDS = "'train', 'data', 'tokenizer', 'sweep', 'model', 'feedback', 'constitution', 'prompt'"
GOOD = """\
kind: train
output: runs/x
model: {layers: {repeat: 2, mixer: {num_heads: 4, num_kv_heads: 2}}}
objective:
  kind: pretrain
  sources: [{path: a}, {path: b, weight: 2}]
"""
# Each list contains the previous one ten times.
ALIASES = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg"))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def problems(path, overrides=(), **arguments) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, **arguments)
    return [problem.removeprefix(f"{path}: ") for problem in error.value.problems]


def test_all_mistakes_are_reported_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "kind: train\n"
        "output: x\n"
        "modle: {}\n"
        "model: {embed_dim: -1, layers: {repeat: two, mixer: {nam_heads: 3}}}\n"
        "objective:\n"
        "  kind: pretrain\n"
        "  sources: [{pth: a}, {path: 3}]\n"
        "optim: {lerning_rate: 1, schedule: {kind: cosin}}\n"
        "mesh: {data: 0}\n",
        encoding="utf-8",
    )
    assert set(problems(path)) == {
        "modle: unknown key; did you mean model?",
        "model.layers.repeat: 'two': must be a whole number from 1 to 2147483647",
        "model.embed_dim: -1: must be a whole number from 1 to 2147483647",
        "model.layers.mixer.nam_heads: unknown key; did you mean num_heads?",
        "objective.sources.0.path: must be given",
        "objective.sources.0.pth: unknown key; did you mean path?",
        "objective.sources.1.path: 3: must be a string; write it in quotes",
        "optim.lerning_rate: unknown key; did you mean learning_rate?",
        "optim.schedule.kind: 'cosin': must be 'cosine', 'linear', 'wsd', 'inverse_sqrt', 'cosine_restarts' or"
        " 'constant'",
        "mesh: an axis has at least one device, so none may be 0; -1 takes the remaining devices",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.data=-1", "mesh: data and fsdp are -1, but only one axis may be; fsdp is -1 by default"),
        (
            "kind=trian",
            f"kind: 'trian' must be one of {KINDS}; did you mean train?",
        ),
        (
            "objective.kind=polcy",
            "objective.kind: 'polcy' must be one of 'cost', 'distill', 'distill_chat', 'fim', 'multi_token',",
        ),
        ("objective.sources=[]", "objective.sources: []: must be a list of at least 1 item"),
        ("optim.learning_rate=nan", "optim.learning_rate: 'nan': must be a number"),
        ("optim.learning_rate=.inf", "optim.learning_rate: Infinity: must be a finite number"),
        ("optim.beta2=1", "optim.beta2: 1: must be less than 1"),
        ("output=5", "output: 5: must be a string; write it in quotes"),
        ("steps=", "steps: null: must be a whole number from 1 to 2147483647"),
        ("seed=-1", "seed: -1: must be a whole number from 0 to 4294967295"),
        (f"seed={2**70}", f"seed: {2**70}: must be a whole number from 0 to 4294967295"),
        ("steps=1e400", "steps: Infinity: must be a whole number"),
        (f"steps={'1' * 300}", "steps: 111111111"),
        (f"optim.learning_rate={'1' * 399}", "optim.learning_rate: 1111"),
        ("model.vocab_size=true", "model.vocab_size: true: must be a whole number from 0 to 2147483647"),
        ("model.layers.repeat=1.0", "model.layers.repeat: 1.0: must be a whole number"),
        ("model.layers.repeat='2'", "model.layers.repeat: '2': must be a whole number"),
        ("optim.learning_rate='3e-4'", "optim.learning_rate: '3e-4': must be a number"),
        ("optim.learning_rate=true", "optim.learning_rate: true: must be a number"),
        ("optim.beta1=2020-13-45", "optim.beta1: '2020-13-45': must be a number"),
        ("optim.schedule.decay_fraction=2", "optim.schedule.decay_fraction: 2: must be a number from 0 to 1"),
        ("model.layers.mixer.qk_norm=1", "model.layers.mixer.qk_norm: 1: must be true or false"),
        ("model.layers.mixer.rope.theta=0", "model.layers.mixer.rope.theta: 0: must be greater than 0"),
        ("model.layers=3", "model.layers: 3: must be a section of keys and values"),
        ("model.layers=[]", "model.layers: []: must be a list of at least 1 item"),
        ("model.layers={pattern: []}", "model.layers.pattern: []: must be a list of at least 1 item"),
        ("model.layers={pattern: {times: 2}}", 'model.layers.pattern: {"times": 2}: must be a list'),
        ("model.layers.times=2", "model.layers.times: unknown key; allowed here: mixer, mlp, repeat"),
        ("model.num_layers=2", "model.num_layers: unknown key; did you mean layers?"),
        ("model.layers.mlp.kind=mo", "model.layers.mlp.kind: 'mo' must be one of 'gated', "),
        ("model.layers.mlp.kind=moo", "; did you mean moe?"),
        ("model.layers.mlp.kind=moe", "model.layers.mlp.dim: must be given"),
        ("model.layers.mlp.num_experts=4", "model.layers.mlp.num_experts: unknown key; allowed here: kind, dim"),
        ("model.layers.mixer.kind=attn", "model.layers.mixer.kind: 'attn' must be one of 'attention', "),
        ("model.layers.mixer.kind=atention", "; did you mean attention?"),
        ("model.norm.kind=batch", "model.norm.kind: 'batch': must be 'rms' or 'layer'"),
        ("regularization.router_balanse=1", "regularization.router_balanse: unknown key; did you mean router_balance?"),
        ("regularization.attention_dropout=1", "regularization.attention_dropout: 1: must be less than 1"),
        (
            "regularization.attention_dropout=-0.1",
            "regularization.attention_dropout: -0.1: must be greater than or equal to 0",
        ),
        ("regularization.attention_dropout=0", None),
        ("steps=19", "optim.schedule.warmup_steps (20) exceeds steps (19)"),
        ("seed=1.5", "seed: 1.5: must be a whole number from 0 to 4294967295"),
        ("optim=3", "optim: 3: must be a section of keys and values"),
        ("batch_size=10", None),
        ("accumulate=3", "batch_size (16) must be a multiple of accumulate (3)"),
        (
            "model.layers.mixer.num_kv_heads=3",
            "model.layers.mixer: num_heads (4) must be a multiple of num_kv_heads (3)",
        ),
        ("model.layers.mixer.head_dim=7", "model.layers.mixer: head_dim (7) must be even"),
        ("model.layers.mixer.alibi_scale=0.5", "model.layers.mixer: alibi_scale (0.5) needs alibi: true"),
        (
            "model.layers.mixer.qk_norm_over=all_heads",
            "model.layers.mixer: qk_norm_over (all_heads) needs qk_norm: true",
        ),
        (
            "model.layers.mlp={kind: moe, dim: 8, shared_dim: 16}",
            "model.layers.mlp: shared_dim (16) needs num_shared_experts of 1 or more",
        ),
        (
            "model.layers.mlp={kind: moe, dim: 8, shared_gate: true}",
            "model.layers.mlp: shared_gate needs num_shared_experts of 1 or more",
        ),
        (
            "model.layers.mixer={alibi: true, relative_bias: {}}",
            "model.layers.mixer: alibi and relative_bias are both biases by distance; choose one",
        ),
        (
            "model.layers.mixer.relative_bias={buckets: 1}",
            "model.layers.mixer.relative_bias: buckets (1) must be 2 or more",
        ),
        (
            "model.layers.mixer.relative_bias.max_distance=16",
            "model.layers.mixer.relative_bias: max_distance (16) must exceed half of buckets, 16",
        ),
        (
            "model.layers={pattern: [{mixer: {relative_bias: {}}}, {mixer: {relative_bias: {buckets: 8}}}]}",
            "model: layers: those with a relative_bias share one table, so their buckets, max_distance and num_heads",
        ),
        ("row_length=512", "row_length (512) exceeds execution.max_length (256)"),
        ("model.learned_positions=8", "execution.max_length (256) exceeds model.learned_positions (8)"),
        ("model.layers.mixer.rope.share=0.02", "model.layers.mixer: rope.share (0.02) of head_dim"),
        ("model.layers.mixer.rope.scaling={kind: yarn, factor: 2}", "rope.scaling.original_length: must be given"),
        ("model.layers.mixer.rope.scaling.kind=stretched", "'stretched' must be one of 'linear', 'llama3', 'yarn'"),
        ("model.residual=serial", "model.residual: 'serial': must be 'sequential', 'normalized', 'parallel' or"),
        (
            "regularization.adapter_dropout=0.1",
            "is of the inputs of low-rank updates; set adapters.kind=lora, or leave",
        ),
        ("model=null", "either model or init_from must be given"),
        ("objective={kind: sft, train_file: x}", "init_from must name the model that objective.kind=sft starts from"),
    ],
)
def test_invalid_values_are_reported_with_path_and_value(good, override, message):
    if message is None:
        load_config(good, [override])
    else:
        overrides = ["optim.schedule.warmup_steps=20", override]
        assert any(message in problem for problem in problems(good, overrides)), problems(good, overrides)


def test_mistakes_in_groups_of_layers_are_reported_where_they_were_written(good):
    pattern = "[{mixer: {windoe: 3}}, {mlp: {kind: mo}}, {times: 0}, 3, {mixr: 1}]"
    found = problems(good, [f"model.layers={{repeat: 2, pattern: {pattern}}}"])
    assert [re.sub("one of .*;", "one of ...;", problem) for problem in found] == [
        "model.layers.pattern.0.mixer.windoe: unknown key; did you mean window?",
        "model.layers.pattern.1.mlp.kind: 'mo' must be one of ...; did you mean moe?",
        "model.layers.pattern.2.times: 0: must be a whole number from 1 to 2147483647",
        "model.layers.pattern.3: 3: must be a section of keys and values",
        "model.layers.pattern.4.mixr: unknown key; did you mean mixer?",
    ]
    groups = (
        "[{repet: 2, pattern: [{mixer: {soft_cap: -1}}]}, {repeat: 0}, 3, null, [1],"
        " {mlp: {kind: moe, dim: 8, experts_per_token: 9}}, {pattern: [{repeat: 3}]}, {repeat: 1, times: 2}]"
    )
    assert problems(good, [f"model.layers={groups}"]) == [
        "model.layers.0.pattern.0.mixer.soft_cap: -1: must be greater than 0",
        "model.layers.0.repet: unknown key; did you mean repeat?",
        "model.layers.1.repeat: 0: must be a whole number from 1 to 2147483647",
        "model.layers.2: 3: must be a section of keys and values",
        "model.layers.3: null: must be a section of keys and values",
        "model.layers.4: [1]: must be a section of keys and values",
        "model.layers.5.mlp: experts_per_token (9) exceeds num_experts (8); make it 8 or less",
        "model.layers.6.pattern.0.repeat: unknown key; allowed here: mixer, mlp, times",
        "model.layers.7.times: unknown key; allowed here: mixer, mlp, repeat",
    ]


def test_spellings_of_equal_layers_are_equal(good):
    mixer = "{num_heads: 4, num_kv_heads: 2}"
    spellings = [
        f"{{repeat: 2, mixer: {mixer}}}",
        f"{{repeat: 2, pattern: [{{mixer: {mixer}, times: 1}}]}}",
        f"[{{repeat: 2, mixer: {mixer}, mlp: {{kind: gated}}}}]",
    ]
    models = [load_config(good, [f"model.layers={layers}"]).model for layers in spellings]
    assert models[0] == models[1] == models[2] == load_config(good).model
    # The same layers in another loop have other stacked weights.
    twice = load_config(good, [f"model.layers={{repeat: 1, pattern: [{{times: 2, mixer: {mixer}}}]}}"]).model
    assert twice != models[0]
    assert [layer.mixer for layer in twice.each_layer()] == [layer.mixer for layer in models[0].each_layer()]


def test_unknown_key_without_a_close_match_lists_the_allowed_keys(good):
    [problem] = problems(good, ["adapters={kind: lora, zzz: 1}"])
    assert problem == f"adapters.zzz: unknown key; allowed here: {', '.join(LoraConfig.model_fields)}"


def test_overrides_reach_sections_lists_and_missing_keys(good):
    config = load_config(
        good,
        [
            "objective.sources.1.path=c",
            "objective.sources.0.weight=0.5",
            "optim.learning_rate=3e-4",
            "optim.clip_norm=null",
            "optim.schedule.kind=wsd",
            "adapters=null",
            "adapters.kind=lora",
            "adapters.rank=4",
            "model.layers={repeat: 3, pattern: [{mixer: {num_heads: 8}}, {mixer: {window: 16}}]}",
            "model.layers.pattern.0.mixer.head_dim=32",
            "model.layers.pattern.1.times=5",
            "steps=7",
        ],
    )
    assert [(source.path, source.weight) for source in config.objective.sources] == [("a", 0.5), ("c", 2.0)]
    assert config.optim.learning_rate == 3e-4
    assert config.optim.clip_norm is None
    assert config.optim.schedule.kind == "wsd"
    assert config.adapters.rank == 4
    mixers = [layer.mixer for layer in config.model.each_layer()]
    assert [(mixer.window, mixer.num_heads, mixer.head_dim) for mixer in mixers] == 3 * [
        (None, 8, 32),
        *5 * [(16, 4, 64)],
    ]
    assert config.steps == 7


def test_numbers_follow_yaml_1_2_and_the_default_warmup_fits_a_short_run(good):
    config = load_config(good, ["optim.learning_rate=3e-4", "seed=010", "steps=1_000", "guard.spike_factor=1e3"])
    assert (config.optim.learning_rate, config.seed, config.steps) == (3e-4, 10, 1000)
    assert [config.optim.schedule.warmup(steps) for steps in (1, 20, 1000)] == [1, 20, 20]
    load_config(good, ["steps=5"])


def test_many_mistakes_are_truncated_and_aliases_are_not_shared(good):
    with pytest.raises(ConfigError) as error:
        load_config(good, [f"x{i}=1" for i in range(50)])
    lines = str(error.value).splitlines()
    assert (len(lines), lines[-1]) == (21, "and 30 more")
    shared = "guard: &x {max_rollbacks: 1}\noptim: {schedule: {<<: {warmup_steps: 3}, warmup_steps: 4}}\nadapters: *x\n"
    good.write_text(GOOD + shared)
    config = load_config(good, ["adapters={kind: lora, rank: 2}", "guard.max_rollbacks=2"])
    assert (config.optim.schedule.warmup_steps, config.adapters.rank, config.guard.max_rollbacks) == (4, 2, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        (
            "optim.learning_rate={a",
            "the value is not valid YAML: expected ',' or '}', but got '<stream end>'",
        ),
        ("output.x=1", "output holds a value, not a section"),
        ("objective.sources.2.path=x", "objective.sources is a list of 2, counted from 0, and has no 2"),
        ("objective.sources.2=x", "objective.sources is a list of 2, counted from 0, and has no 2"),
        ("objective.sources.first.path=x", "objective.sources is a list of 2, counted from 0, and has no first"),
        ("objective.sources.-1.path=x", "objective.sources is a list of 2, counted from 0, and has no -1"),
    ],
)
def test_override_of_an_invalid_path_is_reported(good, override, message):
    assert problems(good, [override, "steps=3"]) == [f"override {override!r}: {message}"]


def test_base_is_merged_and_its_path_is_relative(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base.yaml").write_text(GOOD + "optim: {kind: muon, weight_decay: 0.3}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: models/base.yaml\noutput: runs/y\noptim: {weight_decay: 0.2}\nmodel: {layers: {repeat: 6}}\n")
    config = load_config(top, ["optim.beta1=0.8"])
    assert config.output == "runs/y"
    assert (config.optim.kind, config.optim.weight_decay, config.optim.beta1) == ("muon", 0.2, 0.8)
    [group] = config.model.layers
    assert (group.repeat, group.pattern[0].mixer.num_heads) == (6, 4)
    assert [source.path for source in config.objective.sources] == ["a", "b"]


def test_section_of_another_kind_replaces_the_base_section(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    top = tmp_path / "top.yaml"
    top.write_text("base: base.yaml\ninit_from: runs/a\nobjective: {kind: sft, train_file: t.jsonl}\n")
    assert load_config(top).objective.train_file == "t.jsonl"


def test_base_of_a_base_is_rejected(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    load_config(tmp_path / "b.yaml")
    assert problems(tmp_path / "c.yaml") == ["its base b.yaml has a base itself; only one level is allowed"]
    (tmp_path / "d.yaml").write_text("base: [a.yaml]\n")
    assert problems(tmp_path / "d.yaml") == ["base: ['a.yaml'] is not the name of a file"]


def test_missing_file_suggests_the_closest_name(good):
    missing = good.with_name("god.yaml")
    assert problems(missing) == [f"there is no such file; did you mean {good}?"]
    far = problems(good.parent / "none" / "x.yaml")
    assert far == ["there is no such file; `maxlm config list` lists the recipes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: train\nmodel: {a: 1\nsteps: 3\n", ", line 3: is not valid YAML"),
        ("- 1\n", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        (GOOD + "kind: data\n", ", line 7: kind is given twice, first in line 1"),
        (GOOD + "optim: {beta1: 0.5,\n beta1: 0.6}\n", ", line 8: beta1 is given twice, first in line 7"),
        (GOOD + f"seed: {'9' * 5000}\n", ", line 7: a number of 5,000 characters is too long"),
        (GOOD + f"seed: {'[' * 5000}\n", "is nested too deep"),
        (GOOD + f"seed: {'[' * 60 + ']' * 60}\n", "is nested too deep"),
        (GOOD + "seed: &a [*a]\n", "is nested too deep"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + ALIASES, "holds more than 100,000 values"),
        (GOOD + "1: 2\n", "the key 1 must be a string; write it in quotes"),
        (GOOD + 'adapters: "a\\0b"\n', "holds a NUL or a lone surrogate"),
        (GOOD + 'adapters: "\\ud800"\n', "holds a NUL or a lone surrogate"),
        (GOOD + "adapters: \x01\n", ", line 7: holds the character '\\x01', which YAML does not allow"),
        (GOOD + "adapters: !!binary x\n", "line 7: is not valid YAML: failed to decode base64 data"),
        (GOOD + "adapters: !!bool x\n", "holds a value that cannot be read"),
        (GOOD + "adapters: !!set {x}\n", "holds {'x'}, which is not a string, number, list or section"),
        (GOOD + "adapters: !!int x\n", "line 7: x is not a number"),
    ],
)
def test_invalid_yaml_is_reported_with_its_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    [problem] = problems(path)
    assert message in problem


def test_binary_files_and_folders_are_reported(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00kind")
    assert "is not UTF-8 text" in problems(path)[0]
    assert "cannot be read" in problems(tmp_path)[0]
    [problem] = problems(tmp_path / ("x" * 5000))
    assert problem.endswith("...: cannot be read: file name too long")
    assert len(problem) < 400


def test_wrong_kind_is_reported(good):
    good.write_text(GOOD.replace("kind: train\n", "", 1), encoding="utf-8")
    assert problems(good) == [f"kind: must be given: one of {KINDS}"]
    good.write_text(GOOD, encoding="utf-8")
    assert problems(good, kind="data") == ["kind is 'train', but this command needs kind: data"]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_of_the_repository_loads(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(copy) == config
    assert len(path.read_text().splitlines()) < 60


def test_the_repository_has_configurations():
    assert len(CONFIG_FILES) >= 5


def test_schema_is_valid_and_names_every_key():
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in CONFIG_FILES:
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    validator.validate({"base": "x.yaml", **yaml.safe_load(GOOD)})
    moe = {"repeat": 2, "mlp": {"kind": "moe", "dim": 8}}
    for layers in (moe, [moe], {"pattern": [{"times": 2, "mixer": {"window": 8}}, {}]}, [{"pattern": [{}]}, {}]):
        validator.validate({**yaml.safe_load(GOOD), "model": {"layers": layers}})
    for wrong in (
        {"stepz": 3},
        {"model": {"layers": {"repet": 2}}},
        {"model": {"layers": []}},
        {"model": {"layers": [{"pattern": [{"mixer": {"windoe": 8}}]}]}},
        {"model": {"layers": {"mlp": {"num_experts": 8}}}},
        {"model": {"layers": {"mlp": {"kind": "moe"}}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**yaml.safe_load(GOOD), **wrong})
    assert set(schema["$defs"]["ModelConfig"]["properties"]) == set(ModelConfig.model_fields)


def test_configurations_are_immutable():
    config = parse_config({"kind": "tokenizer", "output": "a", "input": "b"})
    with pytest.raises(ValueError, match="frozen"):
        config.output = "c"


def test_configuration_does_not_import_jax():
    heavy = ("jax", "numpy", "flax", "grain")
    script = f"import sys, maxlm.config; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
