"""Sample answers with the current weights, on all devices.

Dimensions: R answers of this process, P prompt length after padding, N new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from maxlm.core.batch import put_batch
from maxlm.core.sharding import logical_to_spec
from maxlm.data.preference import Prompt
from maxlm.generate.rollout import Rollout, rollout
from maxlm.objectives.sequences import local_rows
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class Answers:
    """Prompts and their sampled answers, as host arrays.

    prompts_RP, prompt_lengths_R: token ids, padded on the right.
    tokens_RN, lengths_R: answers, including the stop token; 0 after the end.
    log_probabilities_RN: of each token, under the policy that sampled it.
    texts: the answers without the stop token.
    """

    prompts_RP: np.ndarray
    prompt_lengths_R: np.ndarray
    tokens_RN: np.ndarray
    lengths_R: np.ndarray
    log_probabilities_RN: np.ndarray
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
    """Samples answers; each depends only on its prompt, the weights and (seed, stream, row)."""

    def __init__(self, tokenizer: Tokenizer, mesh: Mesh, *, prompt_length: int, max_new_tokens: int, seed: int):
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._prompt_length = prompt_length
        self._stop_ids = tokenizer.stop_ids
        self._sample = jax.jit(
            partial(_sample, mesh=mesh, seed=seed, max_new_tokens=max_new_tokens, stop_ids=self._stop_ids)
        )

    def __call__(
        self, model: Any, prompts: Sequence[Prompt], rows: np.ndarray, *, stream: int, temperature: float
    ) -> Answers:
        """One answer for each of this process's prompts.

        Args:
          model: a decoder, with or without adapters, sharded over the mesh.
          prompts: their number is a multiple of this process's devices.
          rows: [R], the global index of each answer, over all processes.
          stream: separates the random draws of different steps.
          temperature: 0 is greedy decoding.
        """
        prompts_RP = np.zeros((len(prompts), self._prompt_length), np.int32)
        prompt_lengths_R = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            prompts_RP[row, : len(prompt.ids)] = prompt.ids
        streams_R2 = np.stack([np.full(len(rows), stream), rows], axis=1).astype(np.uint32)
        inputs = put_batch((prompts_RP, prompt_lengths_R, streams_R2), self._mesh, axes=("batch",))
        sampled = self._sample(model, *inputs, jnp.float32(temperature))
        tokens_RN, lengths_R = local_rows(sampled.tokens_BN), local_rows(sampled.lengths_B)
        texts = [self._text(tokens[:length]) for tokens, length in zip(tokens_RN, lengths_R)]
        return Answers(
            prompts_RP, prompt_lengths_R, tokens_RN, lengths_R, local_rows(sampled.log_probabilities_BN), texts
        )

    def _text(self, tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        return self._tokenizer.decode(ids[:-1] if ids[-1] in self._stop_ids else ids)


def _sample(
    model: Any,
    prompts_BP: jax.Array,
    prompt_lengths_B: jax.Array,
    streams_B2: jax.Array,
    temperature: jax.Array,
    *,
    mesh: Mesh,
    seed: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """`rollout` of all rows: each device gathers the whole model and decodes its own rows until the last one ends."""

    def local(model, prompts_BP, prompt_lengths_B, streams_B2, temperature):
        keys_B = jax.vmap(lambda ids: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ids[0]), ids[1]))(
            streams_B2
        )
        return rollout(
            model,
            prompts_BP,
            prompt_lengths_B,
            keys_B,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
        )

    whole = jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), model)
    rows = logical_to_spec(("batch",))
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), rows, rows, rows, P()), out_specs=rows, check_vma=False)(
        whole, prompts_BP, prompt_lengths_B, streams_B2, temperature
    )
