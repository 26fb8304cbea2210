"""Prompts as Hugging Face's `peft` stores them: the embeddings of virtual tokens [P, D], before those of the text.

There they have the first positions and the tokens of the text come after them, which is the same as here. A factor on
the embeddings of words (Gemma) is applied before the virtual tokens are put in front (transformers 5), so that these
have none; here they are read as words are.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlm.config.adapters import PromptTuningConfig
from maxlm.config.layers import AttentionConfig
from maxlm.errors import CheckpointError, ConfigError
from maxlm.models.adapters.frozen import VIRTUAL_TOKENS, Adapters
from maxlm.models.adapters.prompt import check_prompt
from maxlm.models.decoder import Decoder

TENSOR = "prompt_embeddings"


def read_prompt(
    settings: dict[str, Any], tensors: dict[str, np.ndarray], base: Decoder, file: Path
) -> tuple[PromptTuningConfig, Adapters]:
    """The configuration and the embeddings.

    Raises:
      CheckpointError: they are not of this model, or it computes something else than peft does.
    """
    _check(base, file)
    shape = [settings.get("num_virtual_tokens"), base.config.embed_dim]
    found = {name: list(x.shape) for name, x in tensors.items()}
    if found != {TENSOR: shape} or 0 in shape:
        raise CheckpointError(
            f"{file}: has the tensors {found}, but the configuration and the model make them {{{TENSOR!r}: {shape}}};"
            " give the model and the adapter_config.json of this prompt"
        )
    prompt_PD = jnp.asarray(tensors[TENSOR], jnp.float32) / (base.config.embedding_scale or 1)
    return PromptTuningConfig(tokens=prompt_PD.shape[0]), {VIRTUAL_TOKENS: {"prompt": prompt_PD}}


def written_prompt(base: Decoder, adapters: Adapters, file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """peft's settings and tensors.

    Raises:
      CheckpointError: peft would compute something else.
    """
    _check(base, file)
    prompt_PD = np.asarray(adapters[VIRTUAL_TOKENS]["prompt"], np.float32) * (base.config.embedding_scale or 1)
    mixer = base.config.layers[0].pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    settings = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": prompt_PD.shape[0],
        "token_dim": prompt_PD.shape[1],
        "num_attention_heads": mixer.num_heads,
        "num_layers": base.config.num_layers,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return settings, {TENSOR: prompt_PD}


def _check(base: Decoder, file: Path) -> None:
    try:
        check_prompt(base.config)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error.problems[0]}") from None
