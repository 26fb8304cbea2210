"""Mixture of experts.

Dimensions: B batch, L length, D embed, F channels of an expert, E experts, K experts per token.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import GatedMlpConfig, MoeConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Normal, Parameter, Role, zeros
from maxlm.core.sharding import shard
from maxlm.core.term import LossOutput, Term
from maxlm.layers.context import TokenContext
from maxlm.layers.mlp import GatedMlp
from maxlm.ops.linear import linear, operand_dtype
from maxlm.ops.moe.balance import bias_pull, choices, document_balance
from maxlm.ops.moe.experts import ExpertWeights, Groups, Routing, mixture_of_experts, route, router_scores


class MixtureOfExperts(nnx.Module):
    """A router, routed experts, and shared experts that process every token."""

    def __init__(self, model: ModelConfig, config: MoeConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        experts, embed, mlp, dtype = (
            config.num_experts,
            model.embed_dim,
            config.dim,
            jnp.dtype(execution.parameter_dtype),
        )
        narrow = Normal(1 / math.sqrt(2 * model.num_layers * mlp))
        widen = Normal(1 / math.sqrt(embed))
        widening, narrowing = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        # Always float32: rounding two close scores could select another expert.
        self.router = _parameter((embed, experts), ("embed", None), widen, role="router")
        self.gate = _parameter((experts, embed, mlp), widening, widen, dtype, role="matrix")
        self.up = _parameter((experts, embed, mlp), widening, widen, dtype, role="matrix")
        self.down = _parameter((experts, mlp, embed), narrowing, narrow, dtype, role="matrix")
        if config.bias:
            self.gate_bias = _parameter((experts, mlp), ("experts", "mlp"), zeros, role="bias")
            self.up_bias = _parameter((experts, mlp), ("experts", "mlp"), zeros, role="bias")
            self.down_bias = _parameter((experts, embed), ("experts", None), zeros, role="bias")
        if config.router_logit_bias:
            self.router_logit_bias = _parameter((experts,), (None,), zeros, role="bias")
        if config.router_bias:
            self.router_bias = _parameter((experts,), (None,), zeros, role="router_bias")
        if config.num_shared_experts:
            shared_dim = config.num_shared_experts * (config.shared_dim or mlp)
            self.shared = GatedMlp(model, GatedMlpConfig(dim=shared_dim), execution)
            if config.shared_gate:
                self.shared_gate = _parameter((embed, 1), ("embed", None), widen, role="router")

    def __call__(self, x_BLD: jax.Array, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        """The output of the experts for each token, and the losses of the router. Padding is not routed."""
        config = self.config
        real_BL = context.segment_ids_BL != 0
        logits_BLE, scores_BLE, routing = self._route(x_BLD)
        y_BLD = self._mix(x_BLD, routing, real_BL, context)

        tokens = jnp.sum(real_BL, dtype=jnp.float32)
        choices_BLE = choices(routing.experts_BLK, real_BL, config.num_experts)
        load_E = jnp.sum(choices_BLE, axis=(0, 1)) / config.experts_per_token
        squares_BL = jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1))
        terms = {
            "moe_balance": Term(document_balance(scores_BLE, routing.experts_BLK, context.segment_ids_BL), tokens),
            "router_z_loss": Term(jnp.sum(jnp.where(real_BL, squares_BL, 0.0)), tokens),
        }
        if config.router_bias:
            terms["router_bias"] = Term(bias_pull(self.router_bias, load_E), tokens)
        metrics = {
            # Load of the busiest expert, as a multiple of an equal share.
            "max_expert_load": Term(config.num_experts * jax.lax.stop_gradient(jnp.max(load_E)), tokens),
        }
        return y_BLD, LossOutput(terms, metrics)

    def _route(self, x_BLD) -> tuple[jax.Array, jax.Array, Routing]:
        config = self.config
        logits_BLE = _exact_linear(x_BLD, self.router)
        if config.router_logit_bias:
            logits_BLE = logits_BLE + self.router_logit_bias
        scores_BLE = router_scores(logits_BLE, config.scoring)
        routing = route(
            scores_BLE,
            self.router_bias if config.router_bias else None,
            experts_per_token=config.experts_per_token,
            normalize_weights=config.normalize_weights,
            scaling=config.routed_scaling,
            groups=Groups(config.num_groups, config.groups_per_token, config.group_score),
        )
        return logits_BLE, scores_BLE, routing

    def _mix(self, x_BLD, routing, real_BL, context: TokenContext):
        execution = self.execution
        y_BLD = mixture_of_experts(
            x_BLD,
            routing,
            real_BL,
            self._weights,
            dtype=operand_dtype(execution.matmul_dtype),
            gradient_sum=execution.gradient_sum_dtype,
            output_axes=context.residual_axes,
            implementation=None if execution.experts == "auto" else execution.experts,
        )
        if self.config.num_shared_experts:
            shared_BLD = self.shared(x_BLD, context)[0]
            if self.config.shared_gate:
                gate_BL1 = jax.nn.sigmoid(_exact_linear(x_BLD, self.shared_gate))
                shared_BLD = shared_BLD * shard(gate_BL1, *context.residual_axes).astype(shared_BLD.dtype)
            y_BLD = y_BLD + shared_BLD
        return y_BLD

    @property
    def _weights(self) -> ExpertWeights:
        config = self.config
        return ExpertWeights(
            self.gate,
            self.up,
            self.down,
            gate_bias_GF=self.gate_bias if config.bias else None,
            up_bias_GF=self.up_bias if config.bias else None,
            down_bias_GD=self.down_bias if config.bias else None,
            swiglu_limit=config.swiglu_limit,
        )


def _exact_linear(x: jax.Array, weight: Any) -> jax.Array:
    """A product in float32, which TPUs do not compute by default."""
    with jax.default_matmul_precision("float32"):
        return linear(x.astype(jnp.float32), weight, "float32")


def _parameter(*declared, role: Role) -> Any:
    return nnx.data(Parameter(*declared, role=role))
