"""The cost of fixed programs, compiled for TPUs on this CPU: memory, estimated cycles, collectives, kernels.

    python tools/ledger.py compare            # exits with 1 if a number grew by more than 3 % over tests/ledger.json
    python tools/ledger.py update             # writes tests/ledger.json
    python tools/ledger.py show "8B v5p-128" [--top 30] [--set remat=dots] [--text FILE]   # a field of ExecutionConfig

The programs are the real training step and the real decoding step, of a few layers in `LEDGER`, and of whole models in
`MODELS` (two minutes each). They need libtpu, and no TPU. Numbers depend on its version, which the file names.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)
os.environ.setdefault("TPU_LOG_DIR", "disabled")

import jax
import jax.numpy as jnp
from compiled_cost import CHIPS, Cost, read_cost
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding

from maxlm.config.execution import ExecutionConfig
from maxlm.config.fault import GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.optim import OptimConfig
from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch, Stream
from maxlm.core.parameters import abstract
from maxlm.core.sharding import logical_to_spec, make_mesh
from maxlm.generate.decoding import Programs, SlotState
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled
from maxlm.objectives.language_model import language_model_loss
from maxlm.optim.build import make_optimizer
from maxlm.optim.schedule import schedule_factor
from maxlm.train.loss import weigh_router_losses
from maxlm.train.state import abstract_state, create_state
from maxlm.train.step import train_step

FILE = Path(__file__).parents[1] / "tests" / "ledger.json"
GROWTH = 0.03

# Name of the topology and of the chip's configuration, and whether each dimension is a ring.
TOPOLOGIES = {
    "v5e-4": ("v5e:2x2", "default", False),
    "v5e-16": ("v5e:4x4", "default", False),
    "v5p-16": ("v5:2x2x2", "megacore", False),
    "v5p-32": ("v5:2x2x4", "megacore", False),
    "v5p-128": ("v5:4x4x4", "megacore", True),
    "v6e-8": ("v6e:2x4", "default", False),
}


@dataclass(frozen=True)
class Training:
    """A training step: rows of `length` tokens, `rows` on each group of devices that shares rows, AdamW."""

    topology: str
    model: dict[str, Any]
    length: int
    rows: int = 1
    mesh: dict[str, int] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)

    def lower(self) -> Any:
        mesh = make_mesh(MeshConfig(**self.mesh), devices_of(self.topology))
        execution = ExecutionConfig(**{"max_length": self.length, "remat": "full"} | self.execution)
        declared = Decoder(ModelConfig.model_validate({"tie_embeddings": False} | self.model), execution)
        optim = OptimConfig()
        optimizer = make_optimizer(optim, declared)
        with jax.set_mesh(mesh):
            create = partial(create_state, optimizer=optimizer, keep_ema=False)
            state = abstract_state(create, abstract(declared, mesh), mesh)
            num_groups = mesh.devices.size // mesh.shape["context"] // mesh.shape["tensor"]
            place = NamedSharding(mesh, logical_to_spec(("batch", "length")))
            whole, real = (
                jax.ShapeDtypeStruct((self.rows * num_groups, self.length), dtype, sharding=place)
                for dtype in (jnp.int32, jnp.float32)
            )
            step = partial(
                train_step,
                loss_function=lambda model, frozen, batch: weigh_router_losses(
                    language_model_loss(AppliedModel.of(model, batch), batch), RegularizationConfig()
                ),
                optimizer=optimizer,
                schedule=partial(schedule_factor, optim.schedule, 1000),
                guard=GuardConfig(),
                accumulate=1,
            )
            batch = Batch({"text": Stream(whole, whole, real, whole, whole)})
            return jax.jit(step, donate_argnums=0).lower(state, {}, batch)


@dataclass(frozen=True)
class Decoding:
    """A decoding step of the engine on one device: `slots` sequences of up to `length` tokens."""

    topology: str
    model: dict[str, Any]
    length: int
    slots: int
    execution: dict[str, Any] = field(default_factory=dict)

    def lower(self) -> Any:
        execution = ExecutionConfig(**{"max_length": self.length, "parameter_dtype": "bfloat16"} | self.execution)
        plan = Decoder(ModelConfig.model_validate(self.model), execution)
        model = jax.eval_shape(unrolled, abstract(plan))
        state = jax.eval_shape(lambda: SlotState.create(model, self.slots, self.length, jnp.bfloat16))
        active = jax.ShapeDtypeStruct((self.slots,), jnp.bool_)
        weights, structure = jax.tree.flatten(model)
        place = SingleDeviceSharding(devices_of(self.topology)[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (weights, state, active)
        )
        return Programs.of(structure).decode.lower(*arguments, num_tokens=1)


def uniform(repeat: int, embed_dim: int, vocab_size: int, mixer: dict[str, Any], mlp: dict[str, Any]) -> dict[str, Any]:
    """A `model:` section of equal layers."""
    return {
        "embed_dim": embed_dim,
        "vocab_size": vocab_size,
        "layers": {"repeat": repeat, "mixer": mixer, "mlp": mlp},
    }


def experts(num_experts: int, experts_per_token: int, dim: int) -> dict[str, Any]:
    return {"kind": "moe", "num_experts": num_experts, "experts_per_token": experts_per_token, "dim": dim}


SMALL_MIXER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128}
SMALL = uniform(2, 512, 8192, SMALL_MIXER, {"dim": 1024})
SMALL_EXPERTS = uniform(2, 512, 8192, SMALL_MIXER, experts(16, 2, 512))
LEDGER = {
    "dense": Training("v5e-16", SMALL, length=1024),
    "dense, dots": Training("v5p-16", SMALL, length=1024, mesh={"tensor": 2}, execution={"remat": "dots"}),
    "experts": Training("v5p-16", SMALL_EXPERTS, length=1024, mesh={"expert": 4}, execution={"remat": "none"}),
    "long rows": Training("v6e-8", SMALL, length=4096, mesh={"context": 4}, execution={"remat": "none"}),
    "decoding": Decoding("v5e-4", uniform(4, 512, 8192, SMALL_MIXER, {"dim": 1024}), length=2048, slots=16),
}

LARGE_MIXER = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "rope": {"theta": 5e5}}
MODEL_1B = uniform(16, 2048, 128256, LARGE_MIXER | {"num_heads": 16}, {"dim": 8192})
MODEL_8B = uniform(32, 4096, 128256, LARGE_MIXER, {"dim": 14336})
MIXTRAL = uniform(32, 4096, 32000, LARGE_MIXER, experts(8, 2, 14336))
QWEN_30B = uniform(48, 2048, 151936, LARGE_MIXER | {"num_kv_heads": 4, "qk_norm": True}, experts(128, 8, 768))
MODELS = {
    "1B v5e-16": Training("v5e-16", MODEL_1B, length=2048, rows=4),
    "8B v5e-16": Training("v5e-16", MODEL_8B, length=2048),
    "8B v5p-128": Training("v5p-128", MODEL_8B, length=8192),
    "8B 131k v5p-32": Training("v5p-32", MODEL_8B, length=131072, mesh={"context": 16}),
    "Mixtral v5p-128": Training("v5p-128", MIXTRAL, length=4096, mesh={"expert": 4}),
    "Qwen3-30B-A3B v5p-128": Training("v5p-128", QWEN_30B, length=4096, mesh={"expert": 16}),
    "8B decoding v5e": Decoding("v5e-4", uniform(8, 4096, 128256, LARGE_MIXER, {"dim": 14336}), length=4096, slots=32),
}


def devices_of(topology: str) -> list[jax.Device]:
    name, chip, is_ring = TOPOLOGIES[topology]
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=name,
        chip_config_name=chip,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=(is_ring,) * 3,
    )
    return list(described.devices)


def measure(program: Training | Decoding) -> tuple[dict[str, Any], Cost, str]:
    """The program's entry in the ledger, all of its cost, and its text."""
    compiled = program.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = read_cost(text)
    entry = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "cycles": sum(cost.cycles.values()),
        "collective_bytes": dict(sorted(cost.bytes_moved.items())),
        "kernels": dict(sorted(cost.kernels.items())),
    }
    return entry, cost, text


def growth(old: Any, new: Any, at: str = "") -> list[str]:
    """What grew by more than `GROWTH`, or is new; one sentence each."""
    if isinstance(new, dict):
        old = old or {}
        return [line for key in new for line in growth(old.get(key), new[key], f"{at}/{key}")]
    old = old or 0
    return [f"{at}: {old:,} -> {new:,}"] if new > old * (1 + GROWTH) else []


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def show(name: str, program: Training | Decoding, top: int, text_file: str | None) -> None:
    entry, cost, text = measure(program)
    if text_file:
        Path(text_file).write_text(text, encoding="utf-8")
    chip = CHIPS[program.topology.split("-")[0]]
    print(name, "| GB of arguments", entry["argument_bytes"] / 1e9, "temporaries", entry["temp_bytes"] / 1e9)
    print(f"seconds: instructions {cost.seconds(chip):.4f}, waiting collectives {cost.waiting_seconds(chip):.4f}")
    for kind, count in sorted(cost.counts.items()):
        print(f"{kind}: {count}, {cost.bytes_moved[kind] / 1e9:.3f} GB")
    print("kernels:", entry["kernels"])
    for source, cycles in cost.cycles.most_common(top):
        print(f"{1e3 * cycles / chip.clock:9.3f} ms  {source[-110:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compare").add_argument("--only", default="")
    commands.add_parser("update").add_argument("--only", default="")
    shown = commands.add_parser("show")
    shown.add_argument("name", choices=[*LEDGER, *MODELS])
    shown.add_argument("--top", type=int, default=0)
    shown.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of its execution")
    shown.add_argument("--text", help="write the compiled program to this file")
    options = parser.parse_args(arguments)
    if options.command == "show":
        program = (LEDGER | MODELS)[options.name]
        changes = {key: _value(text) for key, _, text in (each.partition("=") for each in options.set)}
        program = dataclasses.replace(program, execution=program.execution | changes)
        show(options.name, program, options.top, options.text)
        return 0
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"versions": versions(), "programs": {}}
    names = [name for name in LEDGER if options.only in name]
    new = {name: measure(LEDGER[name])[0] for name in names}
    lines = [line for name in names for line in growth(old["programs"].get(name), new[name], name)]
    print("\n".join(lines) or "nothing grew")
    if options.command == "compare":
        return 1 if lines else 0
    programs = {name: (old["programs"] | new)[name] for name in LEDGER}
    FILE.write_text(json.dumps({"versions": versions(), "programs": programs}, indent=2) + "\n", encoding="utf-8")
    return 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
