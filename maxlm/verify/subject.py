"""The subject of a verification: an objective's loss terms and gradient, for given weights and examples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maxlm.config.execution import ExecutionConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.compat import quick_compiler_options
from maxlm.core.parameters import initialize
from maxlm.core.sharding import named_sharding
from maxlm.core.tree import flatten, unflatten
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.adapters.frozen import quantized_base
from maxlm.objectives.sequences import target_log_probabilities
from maxlm.train import step
from maxlm.train.loss import TrainingLoss
from maxlm.train.objective import RunContext, TrainingData
from maxlm.train.trained_model import assemble
from maxlm.verify import examples
from maxlm.verify.examples import Maker
from maxlm.verify.reduce import NUM_ROWS, ROW_LENGTH
from maxlm.verify.workspace import Workspace, quiet

# Parts of a model and of a layer, from input to output; heads are last.
_PARTS = ("embedding", "positions", "embedding_norm", "relative_bias", "layers", "final_norm")
_PARTS_OF_LAYER = ("mixer_norm", "mixer", "mixer_output_norm", "mlp_norm", "mlp", "mlp_output_norm")


@dataclass(frozen=True)
class Measured:
    """Means of the loss terms by name, and the gradient of their sum by path, on the host."""

    means: dict[str, float]
    gradient: dict[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A reduced configuration with weights and examples."""

    config: TrainConfig
    seed: int = 0

    def measure(
        self,
        *,
        execution: ExecutionConfig | None = None,
        mesh: Mesh | None = None,
        accumulate: int = 1,
        batch: Any = None,
        new_ids_V: np.ndarray | None = None,
    ) -> Measured:
        """Loss terms and gradient.

        Args:
          execution: another way to compute the same model.
          mesh: None for one device without sharding.
          accumulate: microbatches.
          batch: by default `self.batch`.
          new_ids_V: new token ids: rows of the vocabulary tables are permuted, and permuted back in the gradient.
        """
        objective, batch = self.config.objective, self.batch if batch is None else batch
        execution = execution or self.config.execution
        trainable_plan, frozen_plan = self.plans(execution)
        trainable, frozen = self.weights
        if new_ids_V is not None:
            batch = examples.renamed(batch, new_ids_V)
            trainable, frozen = (
                _move_rows(weights, plan, np.argsort(new_ids_V))
                for weights, plan in ((trainable, trainable_plan), (frozen, frozen_plan))
            )

        loss_function = TrainingLoss(objective, self.config.regularization, self.assemble)

        def compute(trainable, frozen, batch):
            # Looked up when called, so that verification runs the same function as training.
            return step.loss_and_gradient(
                trainable,
                frozen,
                batch,
                loss_function=loss_function,
                accumulate=accumulate,
                pipeline=execution.pipeline,
            )

        with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
            placed = place(trainable, trainable_plan, mesh), self.stored(place(frozen, frozen_plan, mesh), execution)
            rows = batch if mesh is None else put_batch(batch, mesh)
            program = jax.jit(compute, compiler_options=quick_compiler_options())
            output, gradient = jax.device_get(program(*placed, rows))
        if new_ids_V is not None:
            gradient = _move_rows(flatten(gradient), trainable_plan, new_ids_V)
        means = {name: float(term.mean()) for name, term in output.terms.items()}
        return Measured(means, flatten(gradient))

    def plans(self, execution: ExecutionConfig) -> tuple[Any, dict[str, Any]]:
        """Declarations of the trained and the frozen parameters."""
        objective, model = self.config.objective, self.config.model
        plan, teacher = objective.declare(model, execution), objective.declare_teacher(model, execution)
        frozen = {} if teacher is None else {"teacher": teacher}
        if self.config.adapters is None:
            return plan, frozen
        return declare_adapters(plan, self.config.adapters), frozen | {"base": plan}

    def stored(self, frozen: dict[str, Any], execution: ExecutionConfig) -> dict[str, Any]:
        """The frozen weights, with the base of adapters quantized as the configuration says."""
        if self.config.adapters is None:
            return frozen
        adapters = self.plans(execution)[0]
        return frozen | {"base": quantized_base(frozen["base"], self.config.adapters.base, adapters)}

    def assemble(self, trainable: Any, frozen: dict[str, Any]) -> Any:
        """The model for the loss."""
        return assemble(self.config, trainable, frozen)

    def open_data(self, workspace: Workspace, mesh: Mesh) -> TrainingData:
        """The data of an objective that samples, from synthetic prompts; its reference is the starting model."""
        plans = self.plans(self.config.execution)
        with jax.set_mesh(mesh):
            trainable, frozen = (place(weights, plan, mesh) for weights, plan in zip(self.weights, plans))
            frozen = self.stored(frozen, self.config.execution)
        reference = frozen.get("base", trainable)
        config = workspace.with_prompts(self.config)
        with quiet(), jax.set_mesh(mesh):
            return config.objective.open_data(RunContext(config, workspace.tokenizer, mesh, lambda: reference))

    @cached_property
    def order(self) -> list[str]:
        """Paths of the trained parameters as the model uses them, from input to output."""
        trained = flatten(self.plans(self.config.execution)[0])

        def place(path: str) -> tuple[int, ...]:
            part, *rest = path.split("/")
            if part == "layers":
                group, position, of_layer, *_ = rest
                return _PARTS.index(part), int(group), int(position), _PARTS_OF_LAYER.index(of_layer)
            return (_PARTS.index(part) if part in _PARTS else len(_PARTS),)

        return sorted(trained, key=place)

    @cached_property
    def weights(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Weights by path on the host: perturbed from their initial values, since zeros would hide errors."""
        key = jax.random.key(self.seed)

        def draw(plan: Any) -> dict[str, np.ndarray]:
            random = np.random.default_rng(self.seed)
            create = jax.jit(lambda key: initialize(plan, key), compiler_options=quick_compiler_options())
            flat = flatten(jax.device_get(create(key)))
            return {path: leaf + _noise(random, leaf) for path, leaf in flat.items()}

        student, teacher = self.plans(self.config.execution)
        return draw(student), draw(teacher)

    @cached_property
    def batch(self) -> Batch:
        """The examples as the objective takes them, packed if it packs."""
        return self.example()

    def example(self, *, unpacked: bool = False) -> Batch:
        """The examples, or with `unpacked` each document in its own row, if rows hold documents."""
        make = Maker(
            np.random.default_rng(self.seed),
            num_rows=NUM_ROWS,
            length=ROW_LENGTH,
            vocab_size=self.config.model.vocab_size,
            log_probabilities=self._log_probabilities,
            unpacked=unpacked,
        )
        batch = self.config.objective.example(make)
        if not self.config.regularization.is_random:
            return batch
        num_rows = len(jax.tree.leaves(batch)[0])
        seeds_B = np.random.default_rng(self.seed).integers(2**32, size=num_rows, dtype=np.uint32)
        return replace(batch, row_seeds_B=seeds_B)

    def without_noise(self) -> "Subject":
        """The same with nothing random: dropout depends on a token's row and place, which packing changes."""
        regularization = self.config.regularization.without_noise()
        return replace(self, config=self.config.model_copy(update={"regularization": regularization}))

    def with_sampler(self, layout: str) -> "Subject":
        """The same with this layout of the weights while sampling."""
        objective = self.config.objective.model_copy(update={"sampler": layout})
        return replace(self, config=self.config.model_copy(update={"objective": objective}))

    def _log_probabilities(self, stream: Stream) -> np.ndarray:
        """Log-probabilities of the targets under these weights."""
        plans = self.plans(self.config.execution)
        trainable, frozen = (place(weights, plan, None) for weights, plan in zip(self.weights, plans))
        frozen = self.stored(frozen, self.config.execution)
        temperature = getattr(self.config.objective, "temperature", 1.0)

        def compute(trainable, frozen, stream):
            return target_log_probabilities(self.assemble(trainable, frozen), stream, temperature=temperature)

        return np.asarray(jax.jit(compute, compiler_options=quick_compiler_options())(trainable, frozen, stream))


def place(weights: Mapping[str, np.ndarray], plan: Any, mesh: Mesh | None) -> Any:
    """Host arrays as the tree of a plan, sharded over a mesh."""
    arrays = {
        path: jax.device_put(leaf, None if mesh is None else named_sharding(mesh, parameter.axes))
        for (path, leaf), parameter in zip(weights.items(), flatten(plan).values(), strict=True)
    }
    return unflatten(arrays, plan)


def _noise(random: np.random.Generator, leaf: np.ndarray) -> np.ndarray:
    """Noise for weights with constant initial values: zeros hide their factors, and ones their own factor."""
    return random.normal(0, 0.1, leaf.shape).astype(leaf.dtype) if np.ptp(leaf) == 0 else np.zeros_like(leaf)


def _move_rows(weights: Mapping[str, np.ndarray], plan: Any, source_V: np.ndarray) -> dict[str, np.ndarray]:
    """Weights in which row i of each vocabulary table is row source_V[i] of the old one."""
    axes = {path: parameter.axes for path, parameter in flatten(plan).items()}
    return {
        path: np.take(leaf, source_V, axis=axes[path].index("vocab")) if "vocab" in axes[path] else leaf
        for path, leaf in weights.items()
    }
