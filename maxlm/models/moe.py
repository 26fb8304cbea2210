"""The mixture-of-experts layer that replaces a decoder layer's MLP.

Dimensions: B batch, L length, D embed, F channels of an expert, E experts, K experts per token.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Normal, Parameter, Role, zeros
from maxlm.core.term import LossOutput, Term
from maxlm.models.layers import Mlp
from maxlm.ops.linear import linear, operand_dtype
from maxlm.ops.moe import Routing, mixture_of_experts, route, router_scores
from maxlm.ops.moe_balance import bias_pull, choices, document_balance


class MixtureOfExperts(nnx.Module):
    """A router, routed experts, and shared experts that process every token."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        moe = config.moe
        embed, mlp, dtype = config.embed_dim, moe.mlp_dim, jnp.dtype(execution.parameter_dtype)
        narrow = Normal(1 / math.sqrt(2 * config.num_layers * mlp))
        widen = Normal(1 / math.sqrt(embed))
        widening, narrowing = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        # Always float32: rounding two close scores could select another expert.
        self.router = _parameter((embed, moe.num_experts), ("embed", None), widen, role="router")
        self.gate = _parameter((moe.num_experts, embed, mlp), widening, widen, dtype, role="matrix")
        self.up = _parameter((moe.num_experts, embed, mlp), widening, widen, dtype, role="matrix")
        self.down = _parameter((moe.num_experts, mlp, embed), narrowing, narrow, dtype, role="matrix")
        if moe.balance.bias:
            self.router_bias = _parameter((moe.num_experts,), (None,), zeros, role="router_bias")
        if moe.num_shared_experts:
            self.shared = Mlp(config, execution, moe.num_shared_experts * mlp)

    def __call__(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, output_axes: tuple[str | None, ...]
    ) -> tuple[jax.Array, LossOutput]:
        """The output of the experts for each token, and the balance loss. Padding is not routed."""
        moe = self.config.moe
        real_BL = segment_ids_BL != 0
        logits_BLE, scores_BLE, routing = self._route(x_BLD)
        y_BLD = self._mix(x_BLD, routing, real_BL, output_axes)

        tokens = jnp.sum(real_BL, dtype=jnp.float32)
        choices_BLE = choices(routing.experts_BLK, real_BL, moe.num_experts)
        load_E = jnp.sum(choices_BLE, axis=(0, 1)) / moe.experts_per_token
        terms = {}
        if moe.balance.loss_weight:
            balance = document_balance(scores_BLE, routing.experts_BLK, segment_ids_BL)
            terms["moe_balance"] = Term(moe.balance.loss_weight * balance, tokens)
        if moe.balance.bias:
            terms["router_bias"] = Term(bias_pull(self.router_bias, load_E), tokens)
        if moe.router_z_loss:
            squares_BL = jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1))
            terms["router_z_loss"] = Term(moe.router_z_loss * jnp.sum(jnp.where(real_BL, squares_BL, 0.0)), tokens)
        metrics = {
            # Load of the busiest expert, as a multiple of an equal share.
            "max_expert_load": Term(moe.num_experts * jax.lax.stop_gradient(jnp.max(load_E)), tokens),
        }
        return y_BLD, LossOutput(terms, metrics)

    def decode(self, x_BLD: jax.Array, positions_BL: jax.Array) -> jax.Array:
        """The output of the experts for new tokens, as in training."""
        _, _, routing = self._route(x_BLD)
        return self._mix(x_BLD, routing, positions_BL >= 0, None)

    def _route(self, x_BLD) -> tuple[jax.Array, jax.Array, Routing]:
        moe = self.config.moe
        # TPUs do not compute full float32 products by default.
        with jax.default_matmul_precision("float32"):
            logits_BLE = linear(x_BLD.astype(jnp.float32), self.router, "float32")
        scores_BLE = router_scores(logits_BLE, moe.scoring)
        routing = route(
            scores_BLE,
            self.router_bias if moe.balance.bias else None,
            experts_per_token=moe.experts_per_token,
            normalize_weights=moe.normalize_weights,
            scaling=moe.routed_scaling,
        )
        return logits_BLE, scores_BLE, routing

    def _mix(self, x_BLD, routing, real_BL, output_axes):
        execution = self.execution
        y_BLD = mixture_of_experts(
            x_BLD,
            routing,
            real_BL,
            self.gate,
            self.up,
            self.down,
            dtype=operand_dtype(execution.matmul_dtype),
            gradient_sum=execution.gradient_sum_dtype,
            output_axes=output_axes,
            implementation=None if execution.experts == "auto" else execution.experts,
        )
        if self.config.moe.num_shared_experts:
            y_BLD = y_BLD + self.shared(x_BLD, output_axes)
        return y_BLD


def _parameter(*declared, role: Role) -> Any:
    return nnx.data(Parameter(*declared, role=role))
