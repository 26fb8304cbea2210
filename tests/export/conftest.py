"""A small run folder, its tokenizer and its data, made by the real stages."""

from dataclasses import dataclass
from pathlib import Path

import jax
import optax
import pytest
from model_section import uniform

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.folder import find_checkpoint, weights_hash
from maxlm.config import ModelConfig, TokenizerConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.config.load import dump_yaml, parse_config
from maxlm.core.parameters import initialize
from maxlm.data.build import build_data
from maxlm.models.decoder import Decoder
from maxlm.runtime.manifest import write_manifest
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.train import train_tokenizer
from maxlm.train.state import create_state

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards quietly box five judges in the morning"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Run:
    """A saved model and its inputs."""

    path: Path
    data: Path
    tokenizer: Tokenizer
    model: Decoder


EXECUTION = ExecutionConfig(max_length=64, activation_dtype="float32", matmul_dtype="float32")


def small_config(**changes) -> ModelConfig:
    fields = {
        "embed_dim": 32,
        "mlp_dim": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**uniform(**(fields | changes)))


def draw_model(config: ModelConfig, *, seed: int = 0) -> Decoder:
    """Random weights, with larger embeddings than at initialization to separate the tokens."""
    model = initialize(Decoder(config, EXECUTION), jax.random.key(seed))
    model.embedding = model.embedding * 10
    return model


def make_text(seed: int, num_documents: int) -> str:
    key = jax.random.key(seed)
    lengths = jax.random.randint(key, (num_documents,), 8, 60).tolist()
    picks = jax.random.randint(jax.random.fold_in(key, 1), (num_documents, 60), 0, len(WORDS)).tolist()
    documents = [" ".join(WORDS[i] for i in row[:length]) + "." for row, length in zip(picks, lengths)]
    return "\n\n".join(documents) + "\n"


def make_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    text = folder.with_suffix(".txt")
    text.write_text(make_text(0, 100), encoding="utf-8")
    config = TokenizerConfig(kind="tokenizer", output=str(folder), input=str(text), vocab_size=vocab_size)
    return train_tokenizer(config)


def make_data(folder: Path, tokenizer_folder: Path, **changes) -> Path:
    text = folder.with_suffix(".txt")
    text.write_text(make_text(1, 120), encoding="utf-8")
    fields = {
        "kind": "data",
        "output": str(folder),
        "sources": [{"uri": str(text), "split_on_blank_lines": 40}],
        "clean": {"min_characters": 10},
        "deduplicate": {"near_threshold": None},
        "valid_fraction": 0.25,
        "tokenizer": str(tokenizer_folder),
        "row_length": 32,
        "workers": 1,
    }
    build_data(parse_config(fields | changes))
    return folder


def save_run(
    folder: Path,
    model: Decoder,
    *,
    tokenizer_folder: Path,
    objective: dict,
    inputs: dict,
    adapter_weights=None,
    **changes,
) -> Path:
    """A run folder as written by training; with `adapter_weights`, only they are saved."""
    config = parse_config(
        {
            "kind": "train",
            "output": str(folder),
            "model": model.config.model_dump(mode="json"),
            "execution": model.execution.model_dump(mode="json"),
            "objective": objective,
            "row_length": 32,
            **changes,
        }
    )
    fingerprint = Tokenizer.load(tokenizer_folder).fingerprint
    metadata = {
        "config": config.model_dump(mode="json"),
        "config_yaml": dump_yaml(config),
        "fingerprint": fingerprint,
        "start": config.init_from and _start(find_checkpoint(config.init_from)),
    }
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(create_state(model if adapter_weights is None else adapter_weights, optax.sgd(0.1)), metadata)
    (folder / "tokenizer").symlink_to(tokenizer_folder)
    stage = f"train/{config.objective.kind}"
    write_manifest(folder, stage=stage, inputs=inputs, config=metadata["config"], metrics={})
    return folder


def save_pretraining(folder: Path, model: Decoder, *, tokenizer_folder: Path, data: Path, **changes) -> Path:
    return save_run(
        folder,
        model,
        tokenizer_folder=tokenizer_folder,
        objective={"kind": "pretrain", "sources": [{"path": str(data)}]},
        inputs={"tokenizer": tokenizer_folder, "data_0": data},
        **changes,
    )


def _start(checkpoint) -> dict[str, str]:
    return {"checkpoint": str(checkpoint), "hash": weights_hash(checkpoint)}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = make_tokenizer(folder / "tokenizer", vocab_size=320)
    data = make_data(folder / "data", folder / "tokenizer")
    # With these weights int8 changes the perplexity by more than its tolerance.
    model = draw_model(small_config(vocab_size=tokenizer.vocab_size), seed=2)
    path = save_pretraining(folder / "run", model, tokenizer_folder=folder / "tokenizer", data=data)
    return Run(path, data, tokenizer, model)
