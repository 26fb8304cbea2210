"""`maxlm config show --tree`: the model part by part."""

from maxlm.cli import main
from maxlm.config.model import ModelConfig
from maxlm.models.decoder import Decoder
from maxlm.models.show import describe_model

SMALL = ("model.vocab_size=50", "model.embed_dim=16")


def test_parts_have_their_shapes_roles_and_numbers_of_parameters():
    config = ModelConfig(vocab_size=50, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
    lines = {line.split()[0]: line.split() for line in describe_model(Decoder(config)).splitlines()}
    assert lines["embedding"] == ["embedding", "[50,", "16]", "float32", "table", "800"]
    assert lines["key"] == ["key", "[16,", "16]", "float32", "matrix", "768"]
    assert lines["attention_norm"] == ["attention_norm", "[16]", "float32", "norm", "48"]
    layers = 3 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24 + 2 * 16)
    assert lines["layers"] == ["layers", "x", "3", f"{layers:,}"]
    assert lines["total"] == ["total", f"{layers + 800 + 16:,}"]


def test_command_prints_adapters_beside_the_model(capsys):
    assert main(["config", "show", "quickstart/pretrain", "--tree", *SMALL, "lora={rank: 4}"]) == 0
    output = capsys.readouterr().out
    assert "adapters x 3" in output
    assert "layers x 3" in output


def test_unknown_vocabulary_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "show", "quickstart/pretrain", "--tree"]) == 2
    assert (
        "model.vocab_size: is that of the tokenizer (runs/quickstart/data: has no manifest" in capsys.readouterr().err
    )
