"""A tiny tokenizer, an untrained model, and a model fine-tuned on the toy task, shared by all tests."""

import shutil

import jax
import pytest
from toy_task import COLORS, chat, make_config, question, toy_model, write_lines

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import TokenizerConfig
from maxlm.config.load import dump_yaml
from maxlm.core.parameters import initialize
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer
from maxlm.train.run import train
from maxlm.train.setup import resolve_model
from maxlm.train.state import create_state


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*COLORS, *COLORS.values(), "coin", "yes", "no"]
    (folder / "text.txt").write_text("\n".join(" ".join(words) for _ in range(50)), encoding="utf-8")
    config = {"kind": "tokenizer", "output": str(folder / "out"), "input": str(folder / "text.txt"), "vocab_size": 330}
    train_tokenizer(TokenizerConfig(**config))
    return folder / "out"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def untrained(tokenizer, tokenizer_folder, tmp_path_factory):
    """The run folder of a model with random weights."""
    folder = tmp_path_factory.mktemp("untrained")
    config = make_config(folder, model=toy_model(), objective={"kind": "pretrain", "sources": [{"path": "nowhere"}]})
    config = resolve_model(config, tokenizer)
    plan = Decoder(config.model, config.execution)
    state = create_state(initialize(plan, jax.random.key(0)), make_optimizer(config.optim, plan))
    metadata = {"config": config.model_dump(mode="json"), "config_yaml": dump_yaml(config)}
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(state, {**metadata, "fingerprint": tokenizer.fingerprint, "step": 0})
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def task_chats():
    colors = [chat(thing, color) for thing, color in COLORS.items()]
    coins = [chat(f"coin {n}", answer) for n in range(5) for answer in ("yes", "no")]
    return colors * 2 + coins


@pytest.fixture(scope="session")
def tuned(untrained, task_chats, tmp_path_factory):
    """The run folder of a model fine-tuned on the task, and its manifest."""
    folder = tmp_path_factory.mktemp("tuned")
    data = write_lines(folder / "chats.jsonl", task_chats)
    config = make_config(
        folder / "run",
        init_from=str(untrained),
        objective={"kind": "sft", "train_file": data, "valid_file": data},
        steps=80,
    )
    return folder / "run", train(config)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of prompts whose right answer is sampled half of the time."""
    records = [{"prompt": question(f"coin {n}"), "answer": "yes"} for n in range(5)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)
