"""A tiny model of a family, computed by maxlm and by transformers, imported and exported."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn_weights import draw, inputs
from family_cases import CASES, SCORE_CASES, file_name
from safetensors.numpy import load_file, save_file

from maxlm.families.family import Description, Family
from maxlm.families.placement import placed_tensors
from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface
from maxlm.models.decoder import Decoder
from maxlm.models.scores import sequence_scores

GOLDEN = Path(__file__).parent / "families" / "golden"


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences of logits, of whole texts and with a cache; relative ones of loss and gradient norm.

    same_greedy: the greedy continuation is that of transformers.
    same_tensors: what is exported is bit for bit what was imported; same_model: and its settings describe that model.
    """

    logits: float
    cached_logits: float
    loss: float
    gradient_norm: float
    same_greedy: bool
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
    tokens, mask = inputs()
    logits, loss, gradient_norm = _compute(model, tokens, mask)
    greedy, cached_logits = _continue_greedily(model, tokens[0], len(golden["greedy"]))

    written, same_model = _write(folder, model)
    return Comparison(
        logits=_largest((logits - golden["logits"])[mask == 1]),
        cached_logits=_largest(cached_logits - golden["logits"][0]),
        loss=_largest(loss / golden["loss"] - 1),
        gradient_norm=_largest(gradient_norm / golden["gradient_norm"] - 1),
        same_greedy=np.array_equal(greedy, golden["greedy"]),
        same_tensors=_are_same(written, tensors),
        same_model=same_model,
    )


def _write(folder: Path, model: Decoder) -> tuple[dict[str, np.ndarray], bool]:
    """The tensors of its export, and whether its settings describe the model of the folder."""
    out = folder / "out"
    out.mkdir()
    write_huggingface(out, model, None, {})
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


def _continue_greedily(model: Decoder, tokens: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The most likely next tokens, one by one with a cache, and the logits of the given tokens, its prompt."""
    length = len(tokens)

    @jax.jit
    def run(model):
        def step(carry, position):
            caches, token = carry
            output = model(token[None, None], positions_BL=position[None, None], caches=caches)
            token = jnp.argmax(model.logits(output.hidden_BLD)[0, 0]).astype(jnp.int32)
            return (output.caches, token), token

        caches = model.create_caches(1, length + count, jnp.float32)
        prompt = model(tokens[None], positions_BL=jnp.arange(length)[None], caches=caches)
        logits = model.logits(prompt.hidden_BLD)[0]
        first = jnp.argmax(logits[-1]).astype(jnp.int32)
        _, later = jax.lax.scan(step, (prompt.caches, first), length + jnp.arange(count - 1))
        return logits, jnp.concatenate([first[None], later])

    logits, chosen = run(model)
    return np.asarray(chosen), np.asarray(logits)
