"""A family of models as Hugging Face stores it: its settings, and a table of its tensors for both directions.

Each other module of this package that describes families defines `FAMILIES`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.config.model import ModelConfig
from maxlm.config.registry import collect
from maxlm.families.settings import Settings

# Indices of the rows of their tensor that hold each parameter, from the numbers of rows of the parameters.
Rows = Callable[[ModelConfig, Sequence[int]], Sequence[np.ndarray]]


def consecutive(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """One parameter after the other."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class Tensor:
    """One of their tensors, and the parameters of ours that it holds.

    A row of a tensor is an output of a matrix [out, in], an element of a vector, or a token of a table.

    Attributes:
      name: with {layer}, the number of a layer, and {expert}.
      holds: paths of parameters; those in a layer, or in a prediction module, begin with `layer/`.
      rows: which rows hold which parameter.
      input_first: the matrix is stored as [in, out], as ours are.
      all_experts: it holds the parameters of all experts of a layer, one expert after the other on its first axis.
      only: the models that have it under this name; None: all.
    """

    name: str
    holds: tuple[str, ...]
    rows: Rows = consecutive
    input_first: bool = False
    all_experts: bool = False
    only: Callable[[ModelConfig], bool] | None = None


def interleaved_rope(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Queries or keys of one matrix, where channel 2i rotates with channel 2i + 1, and ours i with i + R / 2."""
    mixer: Any = next(model.each_layer()).mixer
    channels = np.arange(mixer.head_dim)
    rotated = mixer.rope.rotated_channels(mixer.head_dim)
    order = np.concatenate([channels[:rotated:2], channels[1:rotated:2], channels[rotated:]])
    return [(np.arange(size // mixer.head_dim)[:, None] * mixer.head_dim + order).ravel() for size in sizes]


def tensor(name: str, *holds: str, **layout: Any) -> Tensor:
    return Tensor(name, holds, **layout)


# The last part of the class of a model with labels, and its head.
CLASSIFIER = "ForSequenceClassification"
SCORE = tensor("score.weight", "score")


@dataclass(frozen=True)
class Description:
    """What config.json says: the model, and the longest text that it was made for."""

    model: ModelConfig
    max_length: int


@dataclass(frozen=True)
class Family:
    """Models with one `model_type`.

    Attributes:
      model_type: in config.json; architecture: the class of `transformers`.
      read: their settings as ours; raises CheckpointError for one that is not supported.
      write: settings of config.json for a model of ours. It need not fit: whether it describes the same model is found
        by reading it.
      tensors: the table.
      ignored: regular expression of tensors without parameters, such as constants.
      copies: further copies of tables that files may have, with the paths of the tables: in each layer {layer} of the
        prediction modules.
      ignores_later_layers: files may have layers after the model's, for predicting several tokens.
      is_in_transformers: False: its code comes with the weights.
      classifier: the class of `transformers` for models with labels, if not named like others; "": there is none.
    """

    model_type: str
    architecture: str
    read: Callable[[Settings], Description]
    write: Callable[[Description], dict[str, Any]]
    tensors: tuple[Tensor, ...]
    ignored: str = ""
    copies: tuple[tuple[str, str], ...] = ()
    ignores_later_layers: bool = False
    is_in_transformers: bool = True
    classifier: str | None = None

    def class_name(self, model: ModelConfig) -> str:
        """The class of `transformers` for a model.

        Raises:
          LookupError: there is none.
        """
        if model.labels is None:
            return self.architecture
        if self.classifier == "" or not self.is_in_transformers:
            raise LookupError(f"{self.model_type}: there is no class for models with labels")
        return self.classifier or re.sub(r"(LMHeadModel|ForCausalLM)$", CLASSIFIER, self.architecture)


@functools.cache
def families() -> dict[str, Family]:
    """All families by `model_type`, those of transformers first."""
    found = [family for each in collect("maxlm.families", "FAMILIES") for family in each]
    return {family.model_type: family for family in sorted(found, key=lambda family: not family.is_in_transformers)}
