"""Rollouts of several turns: the model answers, its environment does, and so on.

Dimensions: R conversations of this process, N tokens after the prompt.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maxlm.data.examples.preference import Prompt
from maxlm.errors import TokenizerError
from maxlm.objectives.sampling.environments import Environment
from maxlm.objectives.sampling.sampler import Answers, Sampler
from maxlm.runtime.agree import any_process
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class Conversations:
    """Samples conversations with an environment; called as a `Sampler` is, and by all processes.

    A conversation ends when the environment has nothing to say, with the model's turn number `max_turns`, or with its
    token number `max_tokens`, those of the environment counted; what the environment says is left out if no room for
    an answer is left. Each turn is sampled after all tokens before it, exactly those that were sampled or observed.

    sampler: samples a turn; its `prompt_length` is that of a prompt and `max_tokens` together.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    environment: Environment
    max_turns: int
    max_tokens: int

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        rows: np.ndarray,
        *,
        stream: int,
        temperature: float,
        group_size: int = 1,
    ) -> Answers:
        """One conversation for each of this process's prompts, whose `text` is messages.

        Returns:
          As of `Sampler`, with whole conversations as answers: `is_sampled_RN` marks the model's own tokens, and only
          their log-probabilities are not 0. A text is that of the model's last turn.

        Raises:
          TokenizerError: the chat template writes what came before differently once more follows.
        """
        num_rows = len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        sampled: list[list[bool]] = [[] for _ in prompts]
        log_probabilities: list[list[float]] = [[] for _ in prompts]
        texts = [""] * num_rows
        messages: list[Any] = [list(prompt.text) for prompt in prompts]
        active = np.ones(num_rows, bool)
        turns: list[Answers] = []
        for turn in range(self.max_turns):
            if not any_process(bool(active.any())):
                break
            # A conversation that has ended is not computed.
            so_far = [
                replace(prompt, ids=[*prompt.ids, *tokens[row]] if active[row] else [])
                for row, prompt in enumerate(prompts)
            ]
            answers = self.sampler(
                model,
                so_far,
                rows,
                stream=stream,
                temperature=temperature,
                group_size=group_size if turn == 0 else 1,
                turn=turn,
            )
            turns.append(answers)
            asks: list[int] = []
            for row in np.flatnonzero(active).tolist():
                length = min(int(answers.lengths_R[row]), self.max_tokens - len(tokens[row]))
                ids = answers.tokens_RN[row, :length].tolist()
                tokens[row] += ids
                sampled[row] += [True] * length
                log_probabilities[row] += answers.log_probabilities_RN[row, :length].tolist()
                has_ended = ids[-1] in self.tokenizer.stop_ids
                texts[row] = self.tokenizer.decode(ids[:-1] if has_ended else ids)
                messages[row].append({"role": "assistant", "content": texts[row]})
                if has_ended and turn + 1 < self.max_turns:
                    asks.append(row)
            active[:] = False
            with ThreadPoolExecutor() as pool:
                replies = list(pool.map(self.environment.step, [messages[row] for row in asks]))
            for row, reply in zip(asks, replies):
                if reply is None:
                    continue
                observed = _observed(self.tokenizer, messages[row], reply, self.environment.tools)
                if len(tokens[row]) + len(observed) < self.max_tokens:
                    active[row] = True
                    messages[row] += reply
                    tokens[row] += observed
                    sampled[row] += [False] * len(observed)
                    log_probabilities[row] += [0.0] * len(observed)

        def padded(parts: list[list], dtype: Any) -> np.ndarray:
            whole_RN = np.zeros((num_rows, self.max_tokens), dtype)
            for row, part in enumerate(parts):
                whole_RN[row, : len(part)] = part
            return whole_RN

        first = turns[0]
        fingerprints_TR = np.stack([turn.fingerprints_R for turn in turns])
        # The first turn whose weights are others than those of the first, if there is one.
        other_R = np.argmax(fingerprints_TR != first.fingerprints_R, axis=0)
        return Answers(
            prompts_RP=first.prompts_RP[:, : first.prompts_RP.shape[1] - self.max_tokens],
            prompt_lengths_R=first.prompt_lengths_R,
            tokens_RN=padded(tokens, np.int32),
            lengths_R=np.array([len(part) for part in tokens], np.int32),
            log_probabilities_RN=padded(log_probabilities, np.float32),
            is_sampled_RN=padded(sampled, bool),
            fingerprints_R=fingerprints_TR[other_R, np.arange(num_rows)],
            texts=texts,
        )


def _observed(tokenizer: Tokenizer, messages: list[dict], reply: Sequence[dict], tools: Sequence[dict]) -> list[int]:
    """The tokens between the end of an answer, its stop token, and the beginning of the next."""
    before = tokenizer.encode_chat(messages, tools=tools).ids
    after = tokenizer.encode_chat([*messages, *reply], tools=tools, generation_prompt=True).ids
    if after[: len(before)] != before:
        raise TokenizerError(
            "the chat template writes an answer differently once more messages follow it, so what the model sampled"
            " could not be continued; use another chat template for rollouts of several turns"
        )
    end = max(place for place, id_ in enumerate(before) if id_ in tokenizer.stop_ids)
    return after[end + 1 :]
