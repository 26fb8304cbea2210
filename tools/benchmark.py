"""Benchmark what limits training and decoding on this machine: medians and ratios.

    python tools/benchmark.py [product attention step train decode decode8] [--repeats 7]

Variants are run round-robin, so that load on the machine affects all equally; ratios are to the first variant.
The results in docs/benchmarks.md are from this tool.
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
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import plain_llama  # noqa: E402

from maxlm.config import load_config  # noqa: E402
from maxlm.config.adapters import LoraConfig  # noqa: E402
from maxlm.config.execution import ExecutionConfig  # noqa: E402
from maxlm.config.fault import GuardConfig  # noqa: E402
from maxlm.config.model import ModelConfig  # noqa: E402
from maxlm.config.train import OptimConfig  # noqa: E402
from maxlm.core.batch import Batch, Stream  # noqa: E402
from maxlm.core.parameters import initialize  # noqa: E402
from maxlm.generate.engine import Engine  # noqa: E402
from maxlm.generate.model import for_this_backend  # noqa: E402
from maxlm.generate.request import Event, Request  # noqa: E402
from maxlm.interop.int8 import quantize_model  # noqa: E402
from maxlm.models.adapters.apply import apply_adapters  # noqa: E402
from maxlm.models.adapters.declare import declare_adapters  # noqa: E402
from maxlm.models.applied import AppliedModel  # noqa: E402
from maxlm.models.decoder import Decoder  # noqa: E402
from maxlm.objectives.language_model import language_model_loss  # noqa: E402
from maxlm.ops.attention.dispatch import attention  # noqa: E402
from maxlm.ops.attention.operands import AttentionOperands  # noqa: E402
from maxlm.ops.attention.rule import AttentionRule  # noqa: E402
from maxlm.optim.build import make_optimizer  # noqa: E402
from maxlm.train.state import create_state  # noqa: E402
from maxlm.train.step import train_step  # noqa: E402

Variants = dict[str, Callable[[], object]]
VOCAB_SIZE = 2048


def product() -> tuple[str, Variants]:
    """One matrix product: dtype of the operands, and of the result."""
    x, weight = jax.random.normal(jax.random.key(0), (4096, 256)), jax.random.normal(jax.random.key(1), (256, 1024))

    def dot(x, weight, operands, result):
        return jnp.dot(x.astype(operands), weight.astype(operands), preferred_element_type=result)

    return "product 4096 x 256 x 1024", {
        name: partial(jax.jit(partial(dot, operands=operands, result=result)), x, weight)
        for name, operands, result in (
            ("float32", jnp.float32, jnp.float32),
            ("bfloat16 operands, float32 sums", jnp.bfloat16, jnp.float32),
            ("bfloat16", jnp.bfloat16, jnp.bfloat16),
        )
    }


def attention_gradient() -> tuple[str, Variants]:
    """Attention forward and backward, batch 8, length 512, 4 query and 2 key-value heads of 64, two documents a row."""
    shapes = ((8, 512, 4, 64), (8, 512, 2, 64), (8, 512, 2, 64))
    arrays = tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    segment_ids = jnp.broadcast_to(1 + jnp.arange(512) // 300, (8, 512))

    rule = AttentionRule(scale=64**-0.5)

    def loss(arrays, **settings):
        return jnp.sum(attention(*arrays, rule, AttentionOperands(segments=(segment_ids,) * 2), **settings) ** 2)

    return "attention, forward and backward", {
        name: partial(jax.jit(jax.grad(partial(loss, **settings))), arrays)
        for name, settings in (
            ("reference", {"implementation": "reference"}),
            ("xla, float32", {"implementation": "xla"}),
            ("xla, bfloat16 operands", {"implementation": "xla", "matmul_dtype": jnp.bfloat16}),
        )
    }


def step() -> tuple[str, Variants]:
    """A training step of the quickstart model, including the update."""
    config = load_config("configs/quickstart/pretrain.yaml")
    shape = (config.batch_size, config.row_length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, VOCAB_SIZE)
    batch = Batch({"text": _stream(tokens)})

    def variant(optimizer_kind: str, **changes) -> Callable[[], object]:
        model_config = config.model.model_copy(update={"vocab_size": VOCAB_SIZE})
        execution = config.execution.model_copy(update=changes)
        plan = Decoder(model_config, execution)
        optimizer = make_optimizer(config.optim.model_copy(update={"kind": optimizer_kind}), plan)
        state = create_state(initialize(plan, jax.random.key(0)), optimizer)
        function = partial(
            train_step,
            loss_function=lambda model, frozen, batch: language_model_loss(AppliedModel.of(model, batch), batch),
            optimizer=optimizer,
            schedule=lambda step: 1.0,
            guard=config.guard,
            accumulate=1,
        )
        return partial(jax.jit(function), state, None, batch)

    return f"training step, {shape[0]} x {shape[1]} tokens", {
        "quickstart": variant(config.optim.kind),
        "float32 products": variant(config.optim.kind, matmul_dtype="float32"),
        **{f"remat {kind}": variant(config.optim.kind, remat=kind) for kind in ("none", "dots", "full")},
        "reference attention": variant(config.optim.kind, attention="reference"),
        "AdamW": variant("adamw"),
    }


def training() -> tuple[str, Variants]:
    """A training step of a model of 6.9 million parameters with AdamW, by maxlm and by plain JAX (`plain_llama.py`)."""
    shape, rows, length = plain_llama.Shape(), 8, 256
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, shape.vocab)
    batch = Batch({"text": _stream(tokens)})
    weights = plain_llama.initialize(shape, jax.random.key(0))
    adamw = optax.adamw(1e-3)

    @jax.jit
    def plain_step(weights, optimizer_state):
        loss, gradient = jax.value_and_grad(partial(plain_llama.loss, shape))(weights, tokens, tokens)
        updates, optimizer_state = adamw.update(gradient, optimizer_state, weights)
        return optax.apply_updates(weights, updates), optimizer_state, loss

    def variant(matmul_dtype: str, remat: str, lora: LoraConfig | None = None) -> Callable[[], object]:
        plan = Decoder(
            llama_config(shape), ExecutionConfig(activation_dtype="float32", matmul_dtype=matmul_dtype, remat=remat)
        )
        model, trained = initialize(plan, jax.random.key(0)), plan
        if lora is not None:
            trained = declare_adapters(plan, lora)
        optimizer = make_optimizer(OptimConfig(kind="adamw"), trained)

        def loss(trainable, frozen, batch):
            adapted = trainable if lora is None else apply_adapters(frozen, trainable, lora)
            return language_model_loss(AppliedModel.of(adapted, batch), batch)

        function = partial(
            train_step,
            loss_function=loss,
            optimizer=optimizer,
            schedule=lambda step: 1e-3,
            guard=GuardConfig(),
            accumulate=1,
        )
        state = create_state(model if lora is None else initialize(trained, jax.random.key(1)), optimizer)
        return partial(jax.jit(function), state, None if lora is None else model, batch)

    lora = LoraConfig(rank=8, targets=("query", "key", "value", "out"))
    return f"training step, {rows} x {length} tokens, 6.9 million parameters, AdamW", {
        "plain JAX, float32": partial(plain_step, weights, adamw.init(weights)),
        **{
            f"{name}{dtype}, remat {remat}": variant(dtype, remat, trained)
            for name, trained in (("", None), ("LoRA, ", lora))
            for dtype in ("float32", "bfloat16")
            for remat in ("none", "dots", "full")
        },
    }


def _stream(tokens: jax.Array) -> Stream:
    """Rows of one document each; the targets do not matter for the time."""
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Stream(tokens, tokens, jnp.ones(tokens.shape), ones, positions)


def llama_config(shape: plain_llama.Shape) -> ModelConfig:
    attention = {"num_heads": shape.heads, "num_kv_heads": shape.heads, "head_dim": shape.head}
    layers = {"repeat": shape.layers, "mixer": attention, "mlp": {"dim": shape.mlp}}
    return ModelConfig.model_validate({"vocab_size": shape.vocab, "embed_dim": shape.embed, "layers": layers})


def decoding(batch: int) -> tuple[str, Variants]:
    """192 greedy tokens of a model of 6.9 million parameters, by the engine and by plain JAX (`plain_llama.py`).

    The engine also computes a prompt for each sequence, of one token; plain JAX has none.
    """
    shape, count = plain_llama.Shape(), 192
    execution = ExecutionConfig(max_length=256, activation_dtype="float32", matmul_dtype="float32")
    model = initialize(Decoder(llama_config(shape), execution), jax.random.key(0))
    weights = plain_llama.initialize(shape, jax.random.key(0))

    def run(engine: Engine) -> None:
        done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine.submit_all([Request((1,), max_new_tokens=count)] * batch, lambda _, event: done.put(event))
        left = batch
        while left:
            left -= done.get().finish_reason is not None

    def engine(model: Decoder) -> Callable[[], object]:
        prepared = for_this_backend(model)
        return partial(run, Engine(prepared, NoText(), stop_ids=(), num_slots=batch))

    tokens = jnp.ones(batch, jnp.int32)
    return f"{count} tokens for {batch} sequence(s), 6.9 million parameters", {
        "plain JAX, float32": lambda: plain_llama.generate(shape, weights, tokens, count, 256),
        "engine, float32": engine(model),
        "engine, int8": engine(jax.jit(quantize_model)(model)),
    }


class NoText:
    """In place of a tokenizer."""

    def stream_decoder(self) -> "NoText":
        return self

    def push(self, id_: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


BENCHMARKS = {
    "product": product,
    "attention": attention_gradient,
    "step": step,
    "train": training,
    "decode": partial(decoding, 1),
    "decode8": partial(decoding, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {jax.local_device_count()} device(s)")
    for name in args.names or BENCHMARKS:
        title, variants = BENCHMARKS[name]()
        print(f"\n{title}\n| variant | wall ms | CPU ms | ratio |\n| --- | --- | --- | --- |")
        medians = measure(variants, args.repeats)
        first = next(iter(medians.values()))[0]
        for variant, (wall, cpu) in medians.items():
            print(f"| {variant} | {1e3 * wall:.2f} | {1e3 * cpu:.2f} | {wall / first:.2f} |", flush=True)


def measure(variants: Variants, repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each variant, without compilation."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for function in variants.values():
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(wall for wall, _ in pairs), statistics.median(cpu for _, cpu in pairs))
        for name, pairs in times.items()
    }


if __name__ == "__main__":
    main()
