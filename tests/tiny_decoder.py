"""A small decoder for tests, and rows for it."""

import jax
import jax.numpy as jnp
import numpy as np
from model_section import uniform

from maxlm.config import ModelConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.batch import Batch, Stream
from maxlm.core.parameters import initialize
from maxlm.core.term import LossOutput
from maxlm.core.tree import flatten, unflatten
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.objectives.language_model import language_model_loss

VOCAB_SIZE = 48
EXECUTION = ExecutionConfig(max_length=32, activation_dtype="float32", matmul_dtype="float32")


def tiny_config(**changes) -> ModelConfig:
    """Two layers with small and mostly different sizes."""
    base = {
        "vocab_size": VOCAB_SIZE,
        "embed_dim": 16,
        "mlp_dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
    }
    return ModelConfig(**uniform(**{**base, **changes}))


def drawn_model(config: ModelConfig, execution: ExecutionConfig = EXECUTION) -> Decoder:
    """Random weights, including norm scales and biases, that are large enough to expose any difference."""
    model = initialize(Decoder(config, execution), jax.random.key(0))
    flat = flatten(model)
    random = np.random.default_rng(0)
    for path, leaf in flat.items():
        if "norm" in path:
            flat[path] = jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), "float32")
        elif path.endswith(("bias", "sinks")):
            flat[path] = jnp.asarray(random.normal(0, 0.2, leaf.shape), "float32")
        elif "virtual" in path:
            flat[path] = jnp.asarray(random.normal(0, 1, leaf.shape), "float32")
        elif path in ("embedding", "head", "positions"):
            flat[path] = leaf * 30
        else:
            flat[path] = leaf * 1.5
    return unflatten(flat, model)


def text_loss(model, text: Stream, **settings) -> LossOutput:
    """The language-model loss of one stream."""
    batch = Batch({"text": text})
    return language_model_loss(AppliedModel.of(model, batch), batch, **settings)


def documents(seed=0, count=12) -> list[tuple[np.ndarray, float]]:
    """Token sequences of 3 to 9 tokens, and a weight for each."""
    random = np.random.default_rng(seed)
    return [(random.integers(0, VOCAB_SIZE, random.integers(3, 10)), random.uniform(0.2, 2)) for _ in range(count)]


def pack(documents, *, rows, length, per_row) -> Stream:
    """`per_row` documents in each row, padding after them; rows that get none are padding."""
    batch = Stream(*(np.zeros((rows, length), dtype) for dtype in ("int32", "int32", "float32", "int32", "int32")))
    # The content of padding must not matter.
    batch.tokens[:], batch.targets[:] = 5, 7
    for number, (tokens, weight) in enumerate(documents):
        row, segment = divmod(number, per_row)
        begin = int((batch.segment_ids[row] > 0).sum())
        place = slice(begin, begin + len(tokens) - 1)
        batch.tokens[row, place], batch.targets[row, place] = tokens[:-1], tokens[1:]
        batch.loss_weights[row, place], batch.segment_ids[row, place] = weight, segment + 1
        batch.positions[row, place] = np.arange(len(tokens) - 1)
    return batch
