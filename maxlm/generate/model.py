"""A model loaded for inference: logits, scores and text.

Shapes: B rows, L length, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.config.adapters import LoraConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.errors import RequestError
from maxlm.generate.decoding import bucket_length
from maxlm.generate.engine import Engine
from maxlm.generate.request import Request
from maxlm.generate.scorer import score_sequences, target_scores
from maxlm.interop.formats import find_format
from maxlm.interop.load import load_any_model
from maxlm.models.adapters.frozen import Adapters
from maxlm.models.adapters.stacked import of_served, stackable, with_stacked, without_stacked
from maxlm.models.decoder import Decoder, with_execution, with_matrices_cast
from maxlm.models.multi_token import without_modules
from maxlm.models.regroup import unrolled
from maxlm.models.scores import sequence_scores
from maxlm.tokenizer.codec import Tokenizer

# A text to continue, or the messages of a chat to answer.
Prompt = str | Sequence[dict]

# Two engine sizes, so that at most two are ever compiled.
_ONE_SLOT, _MANY_SLOTS = 1, 8


def load(path: str | Path, *, ema: bool = False, adapters: Mapping[str, str | Path] | None = None) -> "LoadedModel":
    """Load a model for inference: a run folder, a checkpoint folder, or a folder of another format (an int8 bundle).

    Without a tokenizer in the folder, the model takes only token ids.

    Args:
      ema: load the run's EMA weights instead of the raw weights.
      adapters: by name, runs of low-rank adapters that were trained on this model, to answer with in its engine.

    Raises:
      CheckpointError: there is no model at `path`, or it cannot be read; adapters are of another model.
      RequestError: adapters are of a kind that needs a model of its own.
    """
    decoder, tokenizer = load_any_model(path, ema=ema)
    name = Path(path).resolve().name
    if not adapters:
        return LoadedModel(for_this_backend(decoder), tokenizer, name=name)
    if ema:
        raise RequestError(f"{path}: adapters are trained on a run's weights, not on their mean; leave out --ema")
    if (exported := find_format(Path(path))) is not None:
        raise RequestError(f"{path}: is {exported.title}; adapters need the run that they were trained on")
    # Orbax takes half a second to import, which a server of a bundle does not need.
    from maxlm.checkpoint.load import load_adapters_of

    decoder = without_modules(decoder)
    stack, tokenizers = [], {}
    for each, run in adapters.items():
        found = load_adapters_of(run, path)
        used = of_served(found.adapters, decoder)
        stack.append((used, stackable(str(run), used, found.config)))
        tokenizers[each] = found.tokenizer
    return LoadedModel(for_this_backend(decoder, stack), tokenizer, name=name, adapters=tokenizers)


def for_this_backend(decoder: Decoder, stack: Sequence[tuple[Adapters, LoraConfig]] = ()) -> Decoder:
    """Adapt the computation to decoding on this backend: the same weights and function.

    Layers are unrolled, prediction modules left out, and matrices stored in the dtype of the products' operands, which
    a decode step would otherwise convert them to, each time. On CPU, activations are float32: CPUs emulate bfloat16
    arithmetic, which makes a decode step three times slower. Matrix products keep the operand dtype that the model was
    trained with.

    Args:
      stack: adapters that it holds, to choose from by row.
    """
    if jax.default_backend() == "cpu":
        decoder = with_execution(decoder, decoder.execution.model_copy(update={"activation_dtype": "float32"}))

    def adapt(decoder: Decoder, adapters: Sequence[Adapters]) -> Decoder:
        configs = [config for _, config in stack]
        return unrolled(with_stacked(with_matrices_cast(decoder), list(zip(adapters, configs))))

    return jax.jit(adapt)(without_modules(decoder), [adapters for adapters, _ in stack])


@dataclass(frozen=True)
class Score:
    """Log-probability of a continuation under a model.

    log_probability: sum over its tokens, in nats.
    is_greedy: whether each of its tokens is the model's most likely one.
    """

    log_probability: float
    num_tokens: int
    is_greedy: bool


class LoadedModel:
    """A decoder and its tokenizer.

    Without a tokenizer, methods that take text raise RequestError; `logits` and `score_tokens` take token ids.

    Args:
      adapters: the names of the adapters that the decoder holds, in order, and their tokenizers, which may have chat
        templates of their own. Engines and `generate` can answer with one; scores are of the model without any.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        name: str = "model",
        adapters: Mapping[str, Tokenizer | None] | None = None,
    ):
        self.decoder = without_stacked(decoder)
        self._with_adapters = decoder
        self.name = name
        self._tokenizers = {
            each: tokenizer and tokenizer.with_vocab_size(decoder.config.vocab_size)
            for each, tokenizer in {None: tokenizer, **(adapters or {})}.items()
        }

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that it can answer with."""
        return tuple(name for name in self._tokenizers if name is not None)

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def execution(self) -> ExecutionConfig:
        """How the model is computed."""
        return self.decoder.execution

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokenizer_of(None)

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """The tokenizer of an adapter, or of the model itself.

        Raises:
          RequestError: there is none, or no such adapter.
        """
        if adapter not in self._tokenizers:
            raise RequestError(f"adapter {adapter!r} is unknown; the model has {', '.join(self.adapters) or 'none'}")
        if (tokenizer := self._tokenizers[adapter]) is None:
            raise RequestError(
                f"{adapter or self.name}: has no tokenizer, so it takes token ids (`logits`, `score_tokens`) but no"
                " text; put the tokenizer that it was trained with into its run folder as `tokenizer`"
            )
        return tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_ids

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        adapter: str | None = None,
    ) -> list[int]:
        """Token ids of a prompt: of a text with its start token, or of a chat up to the next answer.

        Args:
          continue_final: the last message is the start of the answer.
          tools: that the answer to a chat may call, in OpenAI's form.
          adapter: the one that is to answer.
        """
        tokenizer = self.tokenizer_of(adapter)
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, bos=True)
        if continue_final:
            return self.encode(prompt[:-1], tools=tools, adapter=adapter) + tokenizer.encode(prompt[-1]["content"])
        return tokenizer.encode_chat(prompt, tools=tools, generation_prompt=True).ids

    def engine(self, *, num_slots: int, max_length: int | None = None, max_waiting: int | None = None) -> Engine:
        """An engine for this model; close it after use.

        Raises:
          RequestError: the model does not generate text.
        """
        self._check_predicts_tokens()
        return Engine(
            self._with_adapters,
            self.tokenizer,
            stop_ids=self.stop_ids,
            adapters={name: self.tokenizer_of(name).stop_ids for name in self.adapters},
            num_slots=num_slots,
            max_length=max_length,
            max_waiting=max_waiting,
        )

    def logits(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray | None = None,
        prefix_lengths: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 logits [batch, length, vocab] of tokens [batch, length].

        Of a reward model or classifier, the scores [batch, labels] at the last token of each row's one sequence.

        With `segment_ids` [batch, length] a token attends only to its own segment, and positions restart at each; 0 is
        padding. With `prefix_lengths` [batch], for a prefix language model, the first tokens of a row's one sequence
        attend to one another in both directions; by default none do.

        Raises:
          RequestError: a wrong shape, prefixes in a model without them, a row longer than the model's context, a token
            outside the vocabulary.
        """
        tokens_BL = self._checked(tokens)
        segment_ids_BL = np.ones_like(tokens_BL) if segment_ids is None else np.asarray(segment_ids, np.int32)
        if segment_ids_BL.shape != tokens_BL.shape:
            raise RequestError(f"segment_ids have shape {segment_ids_BL.shape}, but tokens have {tokens_BL.shape}")
        length = tokens_BL.shape[1]
        prefix_lengths_BL = self._prefixes(prefix_lengths, segment_ids_BL)
        padding = ((0, 0), (0, bucket_length(length, self.execution.max_length) - length))
        tokens_BL, segment_ids_BL, prefix_lengths_BL = jax.tree.map(
            lambda x: np.pad(x, padding), (tokens_BL, segment_ids_BL, prefix_lengths_BL)
        )
        positions_BL = segment_positions(segment_ids_BL)
        if self.config.labels is not None:
            return np.asarray(_scores(self.decoder, tokens_BL, positions_BL, segment_ids_BL))
        return np.asarray(_logits(self.decoder, tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL))[:, :length]

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """Log-probability of each continuation after its prompt.

        Prompt and continuation are tokenized together; a token that spans the boundary counts as continuation.

        Raises:
          RequestError: the two differ in number, a continuation is empty, or a pair is longer than the context.
        """
        if len(prompts) != len(continuations):
            raise RequestError(f"there are {len(prompts)} prompts and {len(continuations)} continuations")
        pairs = [self._split(prompt, continuation) for prompt, continuation in zip(prompts, continuations)]
        return self.score_tokens([pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def score_tokens(self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]) -> list[Score]:
        """`score` on token ids; a prompt needs at least one, such as the tokenizer's `document_begin`."""
        self._check_predicts_tokens()
        for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            if not prompt or not continuation:
                raise RequestError(f"pair {index}: the prompt or its continuation is empty")
            self._checked([[*prompt, *continuation]], where=f"pair {index}: ")
        if not prompts:
            return []
        sequences = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations)]
        tokens, targets = [ids[:-1] for ids in sequences], [ids[1:] for ids in sequences]
        # As in decoding: a prompt's last token begins the answer.
        prefix_lengths = [len(prompt) - 1 for prompt in prompts] if self.config.prefix_attention else None
        scores = score_sequences(target_scores, self.decoder, tokens, targets, prefix_lengths=prefix_lengths)
        found = []
        for continuation, (log_p_L, is_best_L) in zip(continuations, scores):
            count = len(continuation)
            found.append(Score(float(log_p_L[-count:].sum()), count, bool(is_best_L[-count:].all())))
        return found

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        adapter: str | None = None,
    ) -> list[str]:
        """Continue texts or answer chats; a single prompt is treated as a list of one.

        Each prompt has its own random stream, a function of the seed and its index in the list: equal prompts give
        different texts, and the output is reproducible.

        Raises:
          RequestError: prompt and new tokens exceed the context, or a setting is out of range.
        """
        self._check_predicts_tokens()
        listed: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        requests = [
            Request(
                tuple(self.encode(prompt, adapter=adapter)),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stream=(index, 0),
                stop=tuple(stop),
                adapter=adapter,
            )
            for index, prompt in enumerate(listed)
        ]
        with self.engine(num_slots=_ONE_SLOT if len(listed) == 1 else _MANY_SLOTS) as engine:
            streams = [engine.stream(request) for request in requests]
            return ["".join(event.text for event in stream) for stream in streams]

    def _split(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str):
            return self.encode(prompt), self.tokenizer.encode(continuation)
        ids = self.tokenizer.encode(prompt + continuation)
        ends = self.tokenizer.text_ends(ids)
        num_prompt_tokens = int(np.searchsorted(ends, len(prompt.encode()), side="right"))
        return self.tokenizer.document_begin + ids[:num_prompt_tokens], ids[num_prompt_tokens:]

    def _prefixes(self, prefix_lengths, segment_ids_BL: np.ndarray) -> np.ndarray | None:
        """The length of the prefix of each token's sequence; None if there are no prefixes."""
        if prefix_lengths is None:
            return None
        if not self.config.prefix_attention:
            raise RequestError(f"{self.name}: is a causal model, so it takes no prefix_lengths")
        lengths_B = np.asarray(prefix_lengths, np.int32)
        if lengths_B.shape != segment_ids_BL.shape[:1] or segment_ids_BL.max() > 1:
            raise RequestError(
                f"prefix_lengths must be [batch], one of each row, which holds one sequence; they are {lengths_B.shape}"
                f" of {len(segment_ids_BL)} rows with up to {segment_ids_BL.max()} sequences"
            )
        return np.where(segment_ids_BL > 0, lengths_B[:, None], 0)

    def _check_predicts_tokens(self) -> None:
        if self.config.labels is not None:
            raise RequestError(
                f"{self.name}: scores whole texts ({', '.join(self.config.labels)}) and predicts no tokens; score texts"
                " with `maxlm score`, or token ids with `logits`"
            )

    def _checked(self, tokens, where: str = "") -> np.ndarray:
        tokens_BL = np.asarray(tokens)
        if tokens_BL.ndim != 2 or tokens_BL.size == 0 or not np.issubdtype(tokens_BL.dtype, np.integer):
            raise RequestError(
                f"{where}tokens must be integers [batch, length], not {tokens_BL.dtype} {tokens_BL.shape}"
            )
        if tokens_BL.shape[1] > self.execution.max_length:
            raise RequestError(
                f"{where}{tokens_BL.shape[1]} tokens exceed the model's context of {self.execution.max_length}"
            )
        if tokens_BL.min() < 0 or tokens_BL.max() >= self.config.vocab_size:
            raise RequestError(f"{where}token ids must be between 0 and {self.config.vocab_size - 1}")
        return tokens_BL.astype(np.int32)


def segment_positions(segment_ids_BL: np.ndarray) -> np.ndarray:
    """Position of each token in its segment; restarts where the segment id changes."""
    columns_L = np.arange(segment_ids_BL.shape[1])
    starts_BL = np.ones(segment_ids_BL.shape, bool)
    starts_BL[:, 1:] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return (columns_L - np.maximum.accumulate(np.where(starts_BL, columns_L, 0), axis=1)).astype(np.int32)


@jax.jit
def _logits(model: Decoder, tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL) -> jax.Array:
    places = {"positions_BL": positions_BL, "segment_ids_BL": segment_ids_BL, "prefix_lengths_BL": prefix_lengths_BL}
    return model.logits(model(tokens_BL, **places).hidden_BLD)


@jax.jit
def _scores(model: Decoder, tokens_BL, positions_BL, segment_ids_BL) -> jax.Array:
    places = {"positions_BL": positions_BL, "segment_ids_BL": segment_ids_BL}
    return sequence_scores(model, model(tokens_BL, **places), **places)


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
