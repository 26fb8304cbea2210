"""`maxlm config show --tree`: the model part by part."""

from model_section import uniform

from maxlm.cli import main
from maxlm.config.model import ModelConfig
from maxlm.models.decoder import Decoder
from maxlm.models.show import describe_model

SMALL = ("model.vocab_size=50", "model.embed_dim=16")


def test_parts_have_their_shapes_roles_and_numbers_of_parameters():
    sizes = {"num_layers": 3, "embed_dim": 16, "mlp_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = ModelConfig(vocab_size=50, **uniform(**sizes))
    lines = {line.split()[0]: line.split() for line in describe_model(Decoder(config)).splitlines()}
    assert lines["embedding"] == ["embedding", "[50,", "16]", "float32", "table", "800"]
    assert lines["key"] == ["key", "[16,", "16]", "float32", "matrix", "768"]
    assert lines["mixer_norm"] == ["mixer_norm", "48"]
    assert lines["scale"] == ["scale", "[16]", "float32", "norm", "48"]
    layers = 3 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24 + 2 * 16)
    assert lines["layers"] == ["layers", f"{layers:,}"]
    assert lines["group"] == ["group", "0", "x", "3", f"{layers:,}"]
    assert lines["position"] == ["position", "0", f"{layers:,}"]
    assert lines["total"] == ["total", f"{layers + 800 + 16:,}"]


def test_groups_and_rows_of_equal_layers_show_their_numbers():
    pattern = [{"times": 3}, {"mlp": {"kind": "moe", "num_experts": 4, "dim": 8}}]
    layers = [{"repeat": 2, "pattern": pattern}, {"repeat": 5}]
    text = describe_model(Decoder(ModelConfig(vocab_size=50, embed_dim=16, layers=layers)))
    lines = [line.strip() for line in text.splitlines()]
    headings = [line.rsplit("  ", 1)[0].strip() for line in lines if line.startswith(("group", "position"))]
    assert headings == ["group 0 x 2", "position 0 x 3", "position 1", "group 1 x 5", "position 0"]
    [experts] = [line.split() for line in text.splitlines() if "[4, 16, 8]" in line and "gate" in line]
    assert experts == ["gate", "[4,", "16,", "8]", "float32", "matrix", f"{2 * 4 * 16 * 8:,}"]


def test_command_prints_adapters_beside_the_model(capsys):
    assert main(["config", "show", "quickstart/pretrain", "--tree", *SMALL, "adapters={kind: lora, rank: 4}"]) == 0
    output = capsys.readouterr().out
    assert "adapters" in output
    assert output.count("group 0 x 3") == 2


def test_unknown_vocabulary_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "show", "quickstart/pretrain", "--tree"]) == 2
    assert (
        "model.vocab_size: is that of the tokenizer (runs/quickstart/data: has no manifest" in capsys.readouterr().err
    )
