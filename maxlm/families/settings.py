"""config.json of a Hugging Face model, read so that no setting which changes the function is overlooked."""

import math
import re
from typing import Any

from maxlm.errors import CheckpointError

_MISSING = object()

# Settings that do not change the function of the weights.
_WITHOUT_EFFECT = re.compile(
    "|".join(
        (
            # Names, and versions of other software.
            r"_.*|architectures|auto_map|finetuning_task|id2label|label2id|model_type|num_labels|prefix|problem_type|torchscript",
            r"task_specific_params|tokenizer_class|(torch_)?dtype|transformers_version|use_bfloat16|tf_legacy_loss",
            # Special tokens.
            r".*_token_ids?",
            # Noise and losses of training, initialization, speed.
            r".*dropout(_prob)?|.*_pdrop|initializer_range|router_(aux_loss_coef|jitter_noise)|output_router_logits",
            r"chunk_size_feed_forward|pretraining_tp|use_cache|cache_implementation|keys_to_ignore_at_inference|ep_size",
            # Generation and what is returned.
            r"output_(attentions|hidden_states|scores)|return_dict(_in_generate)?|(max|min)_length|bad_words_ids",
            r"(begin_)?suppress_tokens|do_sample|early_stopping|(encoder_)?no_repeat_ngram_size|num_beams|num_beam_groups",
            r"(diversity|length|repetition|exponential_decay_length)_penalty|num_return_sequences|temperature|top_k",
            r"top_p|typical_p|remove_invalid_values",
        )
    )
)
# Those that would change it, at the value that does not.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


class Settings:
    """Settings of a model, each of which must be asked for.

    where: config.json, for messages.
    """

    def __init__(self, values: dict[str, Any], where: Any):
        self._values, self.where = values, where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """A setting, or the default where it is missing.

        Raises:
          CheckpointError: it is missing and has no default.
        """
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"{self.where}: {key} is missing, which the model needs; restore it")
        return value

    def size(self, key: str, default: Any = _MISSING, *, least: int = 1) -> int:
        """A number of something; null is the default."""
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "positive whole number" if least else "whole number"
            raise CheckpointError(f"{self.where}: {key} is {value!r}, and must be a {kind}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, above: float = -math.inf) -> Any:
        """A number as a float; null is the default, which may be None."""
        value = self._or_default(key, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
            kind = "a number" if above == -math.inf else f"a number above {above}"
            raise CheckpointError(f"{self.where}: {key} is {value!r}, and must be {kind}")
        return float(value)

    def items(self, key: str) -> list[Any] | None:
        """A list; None if there is none."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, list):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, and must be a list")
        return value

    def _or_default(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        return default if value is None and default is not _MISSING else value

    def require(self, key: str, *allowed: Any) -> None:
        """Check a setting that is supported at some values only, the first of which is its default.

        Raises:
          CheckpointError: it has another value.
        """
        if (value := self.get(key, allowed[0])) not in allowed:
            values = " or ".join(dict.fromkeys(map(repr, allowed)))
            raise CheckpointError(
                f"{self.where}: {key} is {value!r}, which maxlm does not support; it must be {values}"
            )

    def section(self, key: str) -> "Settings | None":
        """A nested group of settings; None if there is none."""
        value = self.get(key, None)
        if not value:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, and must be a group of settings")
        return Settings(value, f"{self.where}: {key}")

    def check_all_read(self) -> None:
        """Raise CheckpointError if a setting was not asked for that may change the function."""
        for key, allowed in _UNUSED.items():
            if key not in self._read:
                self.require(key, *allowed)
        for key in self._values:
            if key not in self._read and not _WITHOUT_EFFECT.fullmatch(key):
                raise CheckpointError(
                    f"{self.where}: {key} ({self._values[key]!r}) is not known for this family, so the model might be"
                    " computed wrongly; if it changes nothing, remove it from the file"
                )
