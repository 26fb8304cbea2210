"""Optimizers in numpy float64, one array at a time, and a tree of parameters to test them on.

Each rule is a class called with the gradients of one parameter, in order; it returns the direction, to be multiplied
by the learning rate.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.parameters import Normal, Parameter
from maxlm.core.tree import flatten


def plan(num_layers=4, embed=32, mlp=48, experts=2, vocab=64):
    """Parameter declarations like those of a decoder with experts."""

    def declare(*sizes_and_axes):
        sizes, axes = zip(*sizes_and_axes)
        role = {"norm": "norm", None: "router_bias"}.get(axes[-1], "table" if axes[0] == "vocab" else "matrix")
        return Parameter(sizes, axes, Normal(1.0), role=role)

    layers, width, hidden = (num_layers, "layers"), (embed, "embed"), (mlp, "mlp")
    expert, expert_width = (experts, "experts"), (embed, "expert_embed")
    return {
        "embedding": declare((vocab, "vocab"), width),
        "final_norm": declare((embed, "norm")),
        "layers": {
            "attention": {"query": declare(layers, width, (16, "heads"))},
            "mlp": {"down": declare(layers, hidden, width)},
            "mlp_norm": declare(layers, (embed, "norm")),
            "moe": {
                "up": declare(layers, expert, expert_width, hidden),
                "router_bias": declare(layers, (experts, None)),
            },
        },
    }


def random_tree(plan, seed, dtype="float32"):
    """A random array for each declaration."""
    random = np.random.default_rng(seed)
    is_parameter = lambda leaf: isinstance(leaf, Parameter)  # noqa: E731
    return jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape), dtype), plan, is_leaf=is_parameter)


def in_numpy(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}


def is_matrix(path):
    return "norm" not in path and "bias" not in path


def each_matrix(function, array):
    """Apply `function` to each matrix of a stack."""
    stack = array.reshape(-1, *array.shape[-2:])
    return np.stack([function(matrix) for matrix in stack]).reshape(array.shape)


class Adam:
    """arXiv:1412.6980."""

    def __init__(self, config):
        self.config, self.m, self.v, self.step = config, 0.0, 0.0, 0

    def __call__(self, grad):
        c = self.config
        self.step += 1
        self.m = c.beta1 * self.m + (1 - c.beta1) * grad
        self.v = c.beta2 * self.v + (1 - c.beta2) * grad**2
        return (self.m / (1 - c.beta1**self.step)) / (np.sqrt(self.v / (1 - c.beta2**self.step)) + c.epsilon)


class Lion:
    """arXiv:2302.06675."""

    def __init__(self, config):
        self.config, self.m = config, 0.0

    def __call__(self, grad):
        c = self.config
        direction = np.sign(c.beta1 * self.m + (1 - c.beta1) * grad)
        self.m = c.beta2 * self.m + (1 - c.beta2) * grad
        return direction


class Sgd:
    """Nesterov momentum as in torch.optim.SGD."""

    def __init__(self, config):
        self.config, self.m = config, 0.0

    def __call__(self, grad):
        self.m = self.config.momentum * self.m + grad
        return grad + self.config.momentum * self.m


class Adafactor:
    """arXiv:1804.04235, algorithm 4 without the relative step size."""

    def __init__(self, is_matrix):
        self.is_matrix, self.step, self.rows, self.columns, self.v = is_matrix, 0, 0.0, 0.0, 0.0

    def __call__(self, grad):
        self.step += 1
        decay = 1 - self.step**-0.8
        square = grad**2 + 1e-30
        if self.is_matrix and min(grad.shape[-2:]) >= 128:
            self.rows = decay * self.rows + (1 - decay) * square.mean(-1, keepdims=True)
            self.columns = decay * self.columns + (1 - decay) * square.mean(-2, keepdims=True)
            estimate = self.rows * self.columns / self.rows.mean(-2, keepdims=True)
        else:
            self.v = estimate = decay * self.v + (1 - decay) * square
        direction = grad / np.sqrt(estimate)
        axes = (-2, -1) if self.is_matrix else -1
        return direction / np.maximum(1, np.sqrt((direction**2).mean(axes, keepdims=True)))


class Muon:
    """Nesterov momentum, orthogonalized by five quintic steps."""

    def __init__(self, config):
        self.config, self.trace = config, 0.0

    def __call__(self, grad):
        beta = self.config.momentum
        self.trace = beta * self.trace + (1 - beta) * grad

        def orthogonal(matrix):
            # A polynomial of the matrix acts only on its singular values.
            u, s, vt = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            return u @ np.diag(s) @ vt * np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))

        return each_matrix(orthogonal, beta * self.trace + (1 - beta) * grad)


class Soap:
    """arXiv:2409.11321, algorithm 3, for one matrix; the first gradient sets the bases."""

    def __init__(self, config, shape):
        self.config, self.adam = config, Adam(config)
        self.count, self.m = 0, 0.0
        self.turns = [size <= config.precondition_max_dim for size in shape]
        self.means, self.bases = [np.zeros((n, n)) for n in shape], [np.eye(n) for n in shape]

    def __call__(self, grad):
        c, direction = self.config, np.zeros_like(grad)
        if self.count:
            left, right = self.bases
            self.m = c.beta1 * self.m + (1 - c.beta1) * grad
            # Adam on the rotated gradient, with the first moment taken before the rotation.
            self.adam(left.T @ grad @ right)
            first = left.T @ self.m @ right / (1 - c.beta1**self.count)
            second = np.sqrt(self.adam.v / (1 - c.beta2**self.count))
            direction = left @ (first / (second + c.epsilon)) @ right.T
        for side, product in enumerate((grad @ grad.T, grad.T @ grad)):
            self.means[side] = c.beta2 * self.means[side] + (1 - c.beta2) * product
            if not self.turns[side]:
                continue
            if self.count % c.precondition_every == 0:
                for _ in range(8 if self.count == 0 else 1):
                    shifted = self.means[side] + 0.01 * np.linalg.eigvalsh(self.means[side]).mean() * np.eye(
                        len(product)
                    )
                    self.bases[side] = np.linalg.qr(shifted @ self.bases[side])[0]
        self.count += 1
        return direction


class SoapStack:
    """Soap applied to each matrix of a stack."""

    def __init__(self, config, shape):
        self.rules = [Soap(config, shape[-2:]) for _ in range(int(np.prod(shape[:-2])))]

    def __call__(self, grad):
        stack = grad.reshape(-1, *grad.shape[-2:])
        return np.stack([rule(matrix) for rule, matrix in zip(self.rules, stack)]).reshape(grad.shape)


def rule_of(config, path, shape):
    of_layers = path.startswith("layers/") and is_matrix(path)
    if config.kind == "muon" and of_layers:
        return Muon(config)
    if config.kind == "soap" and of_layers:
        return SoapStack(config, shape)
    if config.kind == "adafactor":
        return Adafactor(is_matrix(path))
    return {"lion": Lion, "sgd": Sgd}.get(config.kind, Adam)(config)


def train(config, params, gradients):
    """Parameters by path, after steps with these gradients at the full learning rate."""
    rules = {path: rule_of(config, path, value.shape) for path, value in params.items()}
    for grads in gradients:
        squares = sum((grad**2).sum() for path, grad in grads.items() if "bias" not in path)
        clip = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / np.sqrt(squares))
        after = {}
        for path, value in params.items():
            if "bias" in path:
                after[path] = value - config.router_bias_rate * np.sign(grads[path])
                continue
            penalty = is_matrix(path) * (config.l1_penalty * np.sign(value) + config.l2_penalty * value)
            is_muon = config.kind == "muon" and isinstance(rules[path], Muon)
            rate = config.muon_learning_rate if is_muon else config.learning_rate
            direction = rules[path](clip * grads[path] + penalty)
            after[path] = value - rate * (direction + config.weight_decay * is_matrix(path) * value)
        params = after
    return params
