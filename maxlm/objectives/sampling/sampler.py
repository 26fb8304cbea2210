"""Sample answers with the current weights, on all devices.

There are two layouts of the weights while sampling. `replicated`: each device gathers the whole model once and decodes
its own rows, without communication. `sharded`: the weights stay where training has them, and each layer is gathered
when a decode step needs it, so that no device ever holds the whole model.

Dimensions: R answers of this process, U prompts, P prompt length after padding, N new tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from maxlm.core.batch import put_batch
from maxlm.core.fingerprint import fingerprint
from maxlm.core.sharding import logical_to_spec, on_each_device, row_groups, shard
from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError
from maxlm.generate.rollout import Rollout, rollout
from maxlm.objectives.sequences import local_rows
from maxlm.tokenizer.codec import Tokenizer

Layout = Literal["auto", "replicated", "sharded"]
# `auto` gathers models up to this size: a step then needs no communication, and any device has room for it.
REPLICATED_BYTES = 1 << 30


@dataclass(frozen=True)
class Answers:
    """Prompts and their sampled answers, as host arrays.

    prompts_RP, prompt_lengths_R: token ids, padded on the right.
    tokens_RN, lengths_R: answers, including the stop token; 0 after the end.
    log_probabilities_RN: of each token, under the policy that sampled it.
    is_sampled_RN: bool, the tokens that the policy sampled; within an answer, others are observations.
    fingerprints_R: uint32, of the weights that sampled each answer, as its device had them: `core.fingerprint`.
    texts: the answers without the stop token.
    """

    prompts_RP: np.ndarray
    prompt_lengths_R: np.ndarray
    tokens_RN: np.ndarray
    lengths_R: np.ndarray
    log_probabilities_RN: np.ndarray
    is_sampled_RN: np.ndarray
    fingerprints_R: np.ndarray
    texts: list[str]

    def taken(self, rows: np.ndarray) -> Self:
        """These answers, in this order."""
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "texts"}
        return replace(self, **arrays, texts=[self.texts[row] for row in rows])

    def joined(self, other: Self) -> Self:
        """Both, one after the other."""
        arrays = {
            field.name: np.concatenate([getattr(self, field.name), getattr(other, field.name)])
            for field in fields(self)
            if field.name != "texts"
        }
        return replace(self, **arrays, texts=self.texts + other.texts)


class Sampler:
    """Samples answers; each depends only on its prompt, the weights and (seed, stream, row).

    Args:
      layout: of the weights while sampling.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        prompt_length: int,
        max_new_tokens: int,
        seed: int,
        layout: Layout = "auto",
    ):
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._prompt_length = prompt_length
        self._stop_ids = tokenizer.stop_ids
        wide = [f"mesh.{axis} = {mesh.shape[axis]}" for axis in ("stage", "context") if mesh.shape[axis] > 1]
        if layout == "sharded" and wide:
            raise ConfigError(
                [
                    f"objective.sampler=sharded: decodes one token at a time, which {' and '.join(wide)} cannot divide;"
                    " use mesh.fsdp and mesh.tensor, or objective.sampler=replicated"
                ]
            )
        self._layout: Layout = "replicated" if wide else layout
        settings: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens, "stop_ids": self._stop_ids}
        self._programs = {
            "replicated": jax.jit(partial(_sample_replicated, mesh=mesh, **settings)),
            "sharded": jax.jit(partial(_sample, **settings)),
        }

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        rows: np.ndarray,
        *,
        stream: int,
        temperature: float,
        group_size: int = 1,
        turn: int = 0,
    ) -> Answers:
        """One answer for each of this process's prompts.

        Args:
          model: a decoder, with or without adapters, sharded over the mesh.
          prompts: their number is a multiple of this process's devices. One without tokens gets no answer.
          rows: [R], the global index of each answer, over all processes.
          stream: separates the random draws of different steps.
          temperature: 0 is greedy decoding.
          group_size: as many adjacent prompts are equal, and computed once.
          turn: separates the random draws of a row's answers in a conversation.
        """
        prompts_RP = np.zeros((len(prompts), self._prompt_length), np.int32)
        prompt_lengths_R = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            prompts_RP[row, : len(prompt.ids)] = prompt.ids
        # Of a group whose rows are on several devices, each computes the prompt.
        repeats = math.gcd(group_size, len(prompts) // len(row_groups(self._mesh)))
        streams_R3 = np.stack([np.full(len(rows), stream), rows, np.full(len(rows), turn)], axis=1).astype(np.uint32)
        arrays = (prompts_RP[::repeats], prompt_lengths_R[::repeats], streams_R3)
        sampled, fingerprints_B = self.program(model)(
            model, *put_batch(arrays, self._mesh, axes=("batch",)), jnp.float32(temperature)
        )
        tokens_RN, lengths_R = local_rows(sampled.tokens_BN), local_rows(sampled.lengths_B)
        return Answers(
            prompts_RP,
            prompt_lengths_R,
            tokens_RN,
            lengths_R,
            local_rows(sampled.log_probabilities_BN),
            np.arange(tokens_RN.shape[1]) < lengths_R[:, None],
            local_rows(fingerprints_B),
            [self._text(tokens[:length]) for tokens, length in zip(tokens_RN, lengths_R)],
        )

    def program(self, model: Any) -> Any:
        """The compiled function that samples from this model."""
        layout = self._layout
        if layout == "auto":
            leaves = jax.tree.leaves(model)
            is_small = sum(x.size * x.dtype.itemsize for x in leaves) <= REPLICATED_BYTES
            is_whole = all(x.sharding.is_fully_replicated for x in leaves)
            layout = "replicated" if is_small or is_whole else "sharded"
        return self._programs[layout]

    def _text(self, tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._stop_ids else ids)


def _sample(
    model: Any,
    prompts_UP: jax.Array,
    prompt_lengths_U: jax.Array,
    streams_B3: jax.Array,
    temperature: jax.Array,
    *,
    seed: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> tuple[Rollout, jax.Array]:
    """`rollout` with the weights where they are, and for each row the fingerprint of the weights."""

    def key(ids: jax.Array) -> jax.Array:
        stream, row, turn = ids
        of_row = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), row)
        return jnp.where(turn == 0, of_row, jax.random.fold_in(of_row, jnp.uint32(2**31) + turn))

    sampled = rollout(
        model,
        prompts_UP,
        prompt_lengths_U,
        on_each_device(jax.vmap(key), streams_B3, out_specs=logical_to_spec(("batch",))),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=stop_ids,
    )
    return sampled, shard(jnp.broadcast_to(fingerprint(model), len(streams_B3)), "batch")


def _sample_replicated(model: Any, *arguments: Any, mesh: Mesh, **settings: Any) -> tuple[Rollout, jax.Array]:
    """The same: each device gathers the whole model and decodes its own rows until the last one ends."""
    whole = jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), model)
    rows = logical_to_spec(("batch",))
    in_specs = (P(), rows, rows, rows, P())
    local: Any = jax.shard_map(
        partial(_sample, **settings), mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False
    )
    return local(whole, *arguments)
