"""A tiny model of a family, computed by maxlm and by transformers, imported and exported."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn_weights import draw, inputs
from family_cases import CASES, SCORE_CASES, file_name
from safetensors.numpy import load_file, save_file

from maxlm.core.tree import flatten
from maxlm.families.family import Description, Family
from maxlm.families.placement import placed_tensors
from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.quantized import quantize_model
from maxlm.models.scores import sequence_scores
from maxlm.ops.qtensor import MAX_VALUE

GOLDEN = Path(__file__).parent / "families" / "golden"


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences of logits, of whole texts and with a cache; relative ones of loss and gradient norm.

    same_greedy: the most likely token after each prefix of transformers' greedy continuation is its next token.
    int8_divergence: median KL divergence, in nats, of the int8 model's next tokens, one by one with a cache, from ours:
      where rounding selects another expert, it is large.
    float_matrices: paths of matrices that are not quantized, or not to the nearest multiple of their scale.
    same_tensors: what is exported is bit for bit what was imported; same_model: and its settings describe that model.
    """

    logits: float
    cached_logits: float
    loss: float
    gradient_norm: float
    same_greedy: bool
    int8_divergence: float
    float_matrices: list[str]
    same_tensors: bool
    same_model: bool


def write_folder(folder: Path, settings: dict) -> dict[str, np.ndarray]:
    """A folder as transformers writes it, with weights drawn from a seed; returns the tensors."""
    (folder / "config.json").write_text(json.dumps(settings))
    family, description = _described(folder)
    placed = placed_tensors(family, Decoder(description.model))
    tensors = {name: draw(name, tensor.shape) for name, tensor in placed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def write_folder_with_modules(folder: Path, settings: dict, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A folder of DeepSeek-V3 as it was published: behind the layers, the tensors of each prediction module, with
    further copies of both tables."""
    tensors, layers, width = write_folder(folder, settings), settings["num_hidden_layers"], settings["hidden_size"]
    for number in range(layers, layers + settings["num_nextn_predict_layers"]):
        name, last = f"model.layers.{number}", f"model.layers.{layers - 1}."
        own = {f"{name}.{part}.weight": (width,) for part in ("enorm", "hnorm", "shared_head.norm")}
        own[f"{name}.eh_proj.weight"] = (width, 2 * width)
        own |= {each.replace(last, f"{name}."): x.shape for each, x in tensors.items() if each.startswith(last)}
        tensors |= {each: draw(each, shape) for each, shape in own.items()}
        tensors[f"{name}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{name}.shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@dataclass(frozen=True)
class ScoreComparison:
    """Of a reward model or classifier; see `Comparison`."""

    scores: float
    gradient_norm: float
    same_tensors: bool
    same_model: bool


def compare_scores(name: str, folder: Path) -> ScoreComparison:
    """Compare a case with labels with what transformers computes for it. `folder`: an empty one."""
    golden = np.load(GOLDEN / f"{file_name(name)}.npz")
    tensors = write_folder(folder, SCORE_CASES[name])
    model, _ = load_huggingface(folder)
    tokens, mask = inputs()
    places = {"positions_BL": jnp.broadcast_to(jnp.arange(16), (2, 16)), "segment_ids_BL": jnp.asarray(mask)}

    @jax.jit
    def scores_and_gradient(model):
        def loss(model):
            scores = sequence_scores(model, model(tokens, **places), **places)
            return jnp.sum(jnp.square(scores)), scores

        return jax.grad(loss, has_aux=True)(model)[::-1]

    scores, gradient = scores_and_gradient(model)
    written, same_model = _write(folder, model)
    return ScoreComparison(
        scores=_largest(scores - golden["scores"]),
        gradient_norm=_largest(_norm(gradient) / golden["gradient_norm"] - 1),
        same_tensors=_are_same(written, tensors),
        same_model=same_model,
    )


def compare(name: str, folder: Path) -> Comparison:
    """Compare a case with what transformers computes for it. `folder`: an empty one."""
    golden = np.load(GOLDEN / f"{file_name(name)}.npz")
    tensors = write_folder(folder, CASES[name])
    model, _ = load_huggingface(folder)
    # Compilation is most of the cost: nothing is recomputed, and only with a cache are experts computed as for users.
    model = with_execution(model, model.execution.model_copy(update={"remat": "none"}))
    simple = with_execution(model, model.execution.model_copy(update={"experts": "reference"}))
    tokens, mask = inputs()
    logits, loss, gradient_norm = _compute(simple, tokens, mask)
    greedy, length = golden["greedy"], tokens.shape[1]
    text = np.concatenate([tokens[0], greedy])
    # The prompt at once, which is longer than a window, then its continuation.
    cached_logits = _cached_logits(model, text, length)
    quantized = _quantize(model)
    divergence = _divergence(cached_logits, _cached_logits(quantized, text, 1))

    written, same_model = _write(folder, model)
    return Comparison(
        logits=_largest((logits - golden["logits"])[mask == 1]),
        cached_logits=_largest(cached_logits[:length] - golden["logits"][0]),
        loss=_largest(loss / golden["loss"] - 1),
        gradient_norm=_largest(gradient_norm / golden["gradient_norm"] - 1),
        same_greedy=np.array_equal(np.argmax(cached_logits[length - 1 : -1], axis=-1), greedy),
        int8_divergence=float(np.median(divergence)),
        float_matrices=_float_matrices(model, quantized),
        same_tensors=_are_same(written, tensors),
        same_model=same_model,
    )


def _write(folder: Path, model: Decoder) -> tuple[dict[str, np.ndarray], bool]:
    """The tensors of its export, and whether its settings describe the model of the folder."""
    out = folder / "out"
    out.mkdir()
    # From host arrays, which are sliced without compiling anything.
    write_huggingface(out, jax.device_get(model), None, {})
    return load_file(out / "model.safetensors"), _described(out) == _described(folder)


def _described(folder: Path) -> tuple[Family, Description]:
    """The model of a folder, without prediction modules, which transformers does not write."""
    family, description = read_description(folder)
    return family, replace(description, model=description.model.main_model)


def _are_same(written: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> bool:
    return written.keys() == tensors.keys() and all(
        written[path].dtype == x.dtype and np.array_equal(written[path], x) for path, x in tensors.items()
    )


def _norm(gradient) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))


def _largest(difference) -> float:
    return float(np.max(np.abs(np.asarray(difference))))


@jax.jit
def _compute(model, tokens, mask):
    """Logits, loss and norm of the gradient."""

    def loss(model):
        logits = model.logits(model(tokens, segment_ids_BL=mask).hidden_BLD)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * mask[:, 1:]) / jnp.sum(mask[:, 1:]), logits

    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    return logits, value, _norm(gradient)


_quantize = jax.jit(quantize_model)


@partial(jax.jit, static_argnames="chunk_length")
def _cached_logits(model, tokens, chunk_length):
    """Logits [length, vocab] of a row whose tokens are given in chunks, with a cache of the earlier ones."""

    def step(caches, chunk):
        tokens_L, positions_L = chunk
        output = model(tokens_L[None], positions_BL=positions_L[None], caches=caches)
        return output.caches, model.logits(output.hidden_BLD)[0]

    length, padding = len(tokens), (0, -len(tokens) % chunk_length)
    padded = jnp.pad(tokens, padding), jnp.pad(jnp.arange(length), padding, constant_values=-1)
    chunks = tuple(x.reshape(-1, chunk_length) for x in padded)
    _, logits = jax.lax.scan(step, model.create_caches(1, length, jnp.float32), chunks)
    return logits.reshape(len(padded[0]), -1)[:length]


def _divergence(logits: jax.Array, others: jax.Array) -> np.ndarray:
    """KL divergence of the second distribution from the first, at each place."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (logits, others))
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def _float_matrices(model: Decoder, quantized: Decoder) -> list[str]:
    """Paths of matrices and tables that are not multiples of a scale, each the nearest."""
    found, given = (flatten(jax.device_get(each)) for each in (quantized, model))

    def is_rounded(path: str, role: str) -> bool:
        if found.get(f"{path}/values", np.empty(0)).dtype != np.int8:
            return False
        weight = given[path] if role == "table" else np.swapaxes(given[path], -1, -2)
        values, scales = found[f"{path}/values"], found[f"{path}/scales"][..., None]
        nearest = np.abs(values * scales - weight) <= 0.501 * scales
        return bool(np.all(nearest) and np.all(np.max(np.abs(values), axis=-1) == MAX_VALUE))

    roles = {path: parameter.role for path, parameter in flatten(Decoder(model.config, model.execution)).items()}
    return [path for path, role in roles.items() if role in ("matrix", "table") and not is_rounded(path, role)]
