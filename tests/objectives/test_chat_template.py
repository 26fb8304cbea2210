"""A chat template that a run adds to its tokenizer: saved with the model, and the same wherever it is used."""

import json
import shutil

import pytest
from tokenizer_kinds import CHATML
from toy_task import chat, make_config, write_lines

from maxlm.errors import MaxlmError
from maxlm.export.importing import import_huggingface
from maxlm.generate.model import load
from maxlm.train.run import train


@pytest.fixture(scope="module")
def base(huggingface_folder, tmp_path_factory):
    """An imported model whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(huggingface_folder, folder / "theirs")
    path = folder / "theirs" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    import_huggingface(folder / "theirs", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def config(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    data = write_lines(folder / "chats.jsonl", [chat("sky", "blue"), chat("grass", "green")])

    def make(output="run", **settings):
        objective = {"kind": "sft", "train_file": data}
        settings = {"steps": 1, "row_length": 64, "execution": None, "init_from": str(base), **settings}
        return make_config(folder / output, objective=objective, **settings)

    return make


@pytest.fixture(scope="module")
def tuned(config):
    train(config(chat_template="chatml"))
    return config().output


def test_the_model_is_served_with_the_template_it_was_trained_with(tuned):
    tokenizer = load(tuned).tokenizer
    prompt = [{"role": "user", "content": "sky"}]
    ids = tokenizer.encode_chat(prompt, generation_prompt=True).ids
    expected = "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_control=False) == expected
    assert tokenizer.end_of_turn_id == tokenizer.control_tokens["<|im_end|>"]


def test_the_run_is_resumed_and_started_from_without_naming_it_again(tuned, config):
    assert train(config(chat_template="chatml", steps=2))["metrics"]["steps"] == 2
    assert train(config("next", init_from=tuned))["metrics"]["finished"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "the tokenizer has no chat template, .* or name one when training: chat_template=chatml"),
        ({"chat_template": "llama3"}, r"the chat template writes '<\|start_header_id\|>', which is not one token"),
        ({"chat_template": "llama-3"}, "'llama-3' is neither a template nor a file; did you mean 'llama3'"),
    ],
)
def test_a_base_model_needs_a_template_that_fits(config, settings, sentence):
    with pytest.raises(MaxlmError, match=sentence):
        train(config("refused", **settings))


def test_a_second_template_is_refused(tuned, config):
    with pytest.raises(MaxlmError, match="has a chat template, which its model was trained with"):
        train(config("refused", init_from=tuned, chat_template="chatml"))


def test_a_template_that_was_changed_after_training_is_refused(tuned, tmp_path):
    """By the server as by everything that loads the model."""
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|endoftext|>"))
    with pytest.raises(MaxlmError, match="was trained with another tokenizer"):
        load(run)
