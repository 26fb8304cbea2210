"""Tokens per second of rollouts, and of the engine on the same weights in the same run: medians and ratios.

    python tools/bench_rollout.py [--rows 64] [--group 8] [--tokens 128] [--repeats 5]

The model is the Llama shape of 6.9 million parameters (`plain_llama.py`), the prompts have 32 tokens. `ends` is the
chance of a token to be the last one: with 0, all answers have the same length. Engine and rollouts are run in turn, so
that load on the machine affects both; the ratio is to the engine with as many slots as an engine of `maxlm serve`.
"""

import argparse
import queue
import statistics
import time
from collections.abc import Callable
from functools import partial

from maxlm.runtime.platform import prepare_platform

prepare_platform()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import plain_llama  # noqa: E402
from benchmark import NoText, llama_config  # noqa: E402

from maxlm.config.execution import ExecutionConfig  # noqa: E402
from maxlm.config.mesh import MeshConfig  # noqa: E402
from maxlm.core.parameters import initialize, shardings  # noqa: E402
from maxlm.core.sharding import make_mesh  # noqa: E402
from maxlm.data.examples.preference import Prompt  # noqa: E402
from maxlm.generate.engine import Engine  # noqa: E402
from maxlm.generate.model import for_this_backend  # noqa: E402
from maxlm.generate.request import Event, Request  # noqa: E402
from maxlm.models.decoder import Decoder  # noqa: E402
from maxlm.objectives.sampling.sampler import Sampler  # noqa: E402

PROMPT_LENGTH, SLOTS = 32, 8


class StopTokens(NoText):
    """In place of a tokenizer, with tokens that end an answer."""

    def __init__(self, stop_ids: tuple[int, ...]):
        self.stop_ids = stop_ids

    def stream_decoder(self) -> NoText:
        return self

    def decode(self, ids: list[int]) -> str:
        return ""


def variants(plan: Decoder, args: argparse.Namespace, ends: float) -> dict[str, Callable[[], int]]:
    """Functions that generate answers to the same prompts, and return the number of their tokens."""
    weights = initialize(plan, jax.random.key(0))
    # The weights are random, so that all tokens are about equally likely.
    tokenizer = StopTokens(tuple(range(round(ends * plan.config.vocab_size))))
    random = np.random.default_rng(0)
    ids = random.integers(1, plan.config.vocab_size, size=(args.rows // args.group, PROMPT_LENGTH)).tolist()
    prompts = [Prompt(each, {}) for each in ids for _ in range(args.group)]

    def with_engine(engine: Engine) -> int:
        done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        requests = [
            Request(tuple(prompt.ids), max_new_tokens=args.tokens, stream=(row, 0))
            for row, prompt in enumerate(prompts)
        ]
        generations = engine.submit_all(requests, lambda _, event: done.put(event))
        left = len(requests)
        while left:
            left -= done.get().finish_reason is not None
        return sum(generation.num_tokens for generation in generations)

    def engine(num_slots: int) -> Callable[[], int]:
        made = Engine(
            for_this_backend(weights),
            tokenizer,
            stop_ids=tokenizer.stop_ids,
            num_slots=num_slots,
            max_length=PROMPT_LENGTH + args.tokens,
        )
        return partial(with_engine, made)

    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    model = jax.device_put(weights, shardings(plan, mesh))

    def sampler(layout: str) -> Callable[[], int]:
        sample = Sampler(
            tokenizer, mesh, prompt_length=PROMPT_LENGTH, max_new_tokens=args.tokens, seed=0, layout=layout
        )

        def run() -> int:
            with jax.set_mesh(mesh):
                rows = np.arange(len(prompts))
                answers = sample(model, prompts, rows, stream=0, temperature=1.0, group_size=args.group)
            return int(answers.lengths_R.sum())

        return run

    return {
        **{f"engine, {slots} slots": engine(slots) for slots in sorted({SLOTS, args.rows})},
        "rollouts, replicated": sampler("replicated"),
        "rollouts, sharded": sampler("sharded"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="answers of a round")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    execution = ExecutionConfig(max_length=256, activation_dtype="float32", matmul_dtype="float32")
    plan = Decoder(llama_config(plain_llama.Shape()), execution)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {jax.device_count()} device(s)")
    for ends in (0.0, 0.03):
        print(f"\n{args.rows} answers in groups of {args.group}, up to {args.tokens} tokens, ends {ends:g}")
        print("| variant | tokens | tokens/s | ratio |\n| --- | --- | --- | --- |")
        found = measure(variants(plan, args, ends), args.repeats)
        first = next(iter(found.values()))[1]
        for name, (tokens, rate) in found.items():
            print(f"| {name} | {tokens} | {rate:.0f} | {rate / first:.2f} |", flush=True)


def measure(functions: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[int, float]]:
    """Tokens, and the median of tokens per second, without compilation."""
    tokens = {name: function() for name, function in functions.items()}
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            count = function()
            rates[name].append(count / (time.perf_counter() - start))
    return {name: (tokens[name], statistics.median(rates[name])) for name in functions}


if __name__ == "__main__":
    main()
