"""The layers of a model: groups of layers, each with a mixer of tokens and an MLP, which are unions by kind."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, PositiveFloat, Tag, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen
from maxlm.config.mesh import MeshConfig
from maxlm.config.rope import RopeConfig


class PartConfig(Frozen):
    """A mixer or an MLP: one of a union by `kind`."""

    # Sizes that a mesh must divide: name of the field -> logical axis.
    sharded: ClassVar[dict[str, str]] = {}

    kind: str

    @abstractmethod
    def reduced(self, mesh: MeshConfig) -> Self:
        """The same structure with small sizes that `mesh` and meshes of two devices per axis divide, if these do."""


class RelativeBiasConfig(Frozen):
    """A learned number for each head and each range of distances: T5's relative positions (arXiv:1910.10683)."""

    buckets: Count = Field(32, description="Ranges of distances; the first half of them hold one distance each.")
    max_distance: Count = Field(128, description="Distances from here on are one range; the ranges below grow to it.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.buckets < 2:
            raise ValueError(f"buckets ({self.buckets}) must be 2 or more")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance ({self.max_distance}) must exceed half of buckets, {self.buckets // 2}: those hold one"
                " distance each"
            )
        return self


class MixerPartConfig(PartConfig):
    """A layer that moves information between tokens."""

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """Its rotary positions, and the channels of the heads that have them."""
        return None

    @property
    def bias_table(self) -> tuple[RelativeBiasConfig, int] | None:
        """Its learned bias by distance, and the number of heads that have one."""
        return None


class AttentionConfig(MixerPartConfig):
    """Causal self-attention with grouped key-value heads."""

    sharded: ClassVar[dict[str, str]] = {"num_heads": "heads", "num_kv_heads": "kv_heads"}

    kind: Literal["attention"] = "attention"
    num_heads: Count = 4
    num_kv_heads: Count = 2
    head_dim: Count = 64
    window: Count | None = Field(None, description="Tokens that one attends to, itself included; null is all before.")
    rope: RopeConfig | None = RopeConfig()
    alibi: bool = Field(
        False, description="Subtract slope * distance from the logits, with a slope per head (arXiv:2108.12409)."
    )
    alibi_scale: PositiveFloat = Field(1.0, description="Factor on the slopes of alibi.")
    relative_bias: RelativeBiasConfig | None = Field(
        None,
        description="Add to the logits what is learned for each head and range of distances; all layers that have it"
        " share one table (T5, arXiv:1910.10683).",
    )
    scale: PositiveFloat | None = Field(None, description="Factor on the logits; null is 1 / sqrt(head_dim).")
    bias: bool = Field(False, description="Add a learned vector to queries, keys and values.")
    out_bias: bool = Field(False, description="Add a learned vector to the output.")
    qk_norm: bool = Field(False, description="Normalize queries and keys before RoPE.")
    qk_norm_over: Literal["head", "all_heads"] = Field(
        "head", description="The channels that qk_norm normalizes together: those of each head, or of all heads."
    )
    soft_cap: PositiveFloat | None = Field(None, description="Attention logits become c * tanh(logits / c).")
    sinks: bool = Field(
        False, description="Learn a logit per head that takes part in the softmax, and has no value (arXiv:2309.17453)."
    )
    virtual_tokens: Count | None = Field(
        None,
        description="Learned keys and values that every token attends to besides its sequence, whatever the window"
        " (prefix tuning, arXiv:2101.00190).",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.alibi_scale != 1 and not self.alibi:
            raise ValueError(f"alibi_scale ({self.alibi_scale}) needs alibi: true")
        if self.alibi and self.relative_bias is not None:
            raise ValueError("alibi and relative_bias are both biases by distance; choose one")
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError(f"qk_norm_over ({self.qk_norm_over}) needs qk_norm: true")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs of channels")
        if self.rope is not None and (problem := self.rope.problem(self.head_dim)):
            raise ValueError(problem)
        return self

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        return None if self.rope is None else (self.rope, self.head_dim)

    @property
    def bias_table(self) -> tuple[RelativeBiasConfig, int] | None:
        return None if self.relative_bias is None else (self.relative_bias, self.num_heads)

    def reduced(self, mesh: MeshConfig) -> Self:
        num_kv_heads = math.gcd(self.num_kv_heads, math.lcm(2, mesh.tensor))
        num_heads = num_kv_heads * (self.num_heads // self.num_kv_heads)
        if self.relative_bias is not None:
            # As many in all layers that share the table, whatever their key-value heads.
            num_heads = math.gcd(self.num_heads, math.lcm(4, mesh.tensor))
        virtual_tokens = self.virtual_tokens and min(self.virtual_tokens, 3)
        sizes = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": 8,
            "virtual_tokens": virtual_tokens,
        }
        return self.model_copy(update=sizes | {"rope": self.rope and self.rope.reduced()})


class LatentAttentionConfig(MixerPartConfig):
    """Causal self-attention whose keys and values are made of one short vector a token, which alone is cached."""

    sharded: ClassVar[dict[str, str]] = {"num_heads": "heads", "query_rank": "embed", "latent_dim": "embed"}

    kind: Literal["mla"]
    num_heads: Count = 4
    query_rank: Count | None = Field(None, description="Channels that queries are compressed to; null: they are not.")
    latent_dim: Count = Field(description="Channels of the vector that keys and values are made of.")
    content_dim: Count = Field(64, description="Channels of a query and of a key that do not depend on the position.")
    rope_dim: Count = Field(32, description="Channels that rotate; those of the keys are the same for all heads.")
    value_dim: Count = 64
    rope: RopeConfig = RopeConfig()
    scale: PositiveFloat | None = Field(
        None, description="Factor on the logits; null is 1 / sqrt(content_dim + rope_dim)."
    )
    bias: bool = Field(False, description="Add learned vectors to what is compressed, and to the output.")
    norm_epsilon: PositiveFloat = Field(1e-6, description="Of the norms of what is compressed.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim ({self.rope_dim}) must be even: RoPE rotates pairs of channels")
        if problem := self.rope.problem(self.rope_dim):
            raise ValueError(problem)
        return self

    @property
    def rotary(self) -> tuple[RopeConfig, int]:
        return self.rope, self.rope_dim

    def reduced(self, mesh: MeshConfig) -> Self:
        shards = math.lcm(8, mesh.fsdp * mesh.expert * mesh.context)
        heads = math.gcd(self.num_heads, math.lcm(4, mesh.tensor * mesh.context))
        sizes = {"num_heads": heads, "latent_dim": shards, "content_dim": 8, "rope_dim": 4}
        more = {"value_dim": 12, "query_rank": self.query_rank and shards, "rope": self.rope.reduced()}
        return self.model_copy(update=sizes | more)


class GruConfig(MixerPartConfig):
    """A gated recurrent unit: the memory of the tokens before is one vector."""

    kind: Literal["gru"]
    dim: Count = Field(description="Channels of the state.")

    def reduced(self, mesh: MeshConfig) -> Self:
        return self.model_copy(update={"dim": 12})


class MlpPartConfig(PartConfig):
    """A layer that processes each token by itself."""

    @property
    def active_share(self) -> float:
        """The share of the experts that process a token, if it has any."""
        return 1.0


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class GatedMlpConfig(MlpPartConfig):
    """A gated MLP: down(activation(gate x) * up x)."""

    sharded: ClassVar[dict[str, str]] = {"dim": "mlp"}

    kind: Literal["gated"] = "gated"
    dim: Count = Field(704, description="Hidden channels.")
    activation: Activation = "silu"

    def reduced(self, mesh: MeshConfig) -> Self:
        return self.model_copy(update={"dim": math.lcm(24, mesh.tensor)})


class PlainMlpConfig(MlpPartConfig):
    """An MLP with one hidden layer: down(activation(up x))."""

    sharded: ClassVar[dict[str, str]] = {"dim": "mlp"}

    kind: Literal["plain"]
    dim: Count = Field(description="Hidden channels.")
    activation: Activation = "gelu"
    bias: bool = Field(True, description="Add a learned vector after each product.")

    def reduced(self, mesh: MeshConfig) -> Self:
        return self.model_copy(update={"dim": math.lcm(24, mesh.tensor)})


class MoeConfig(MlpPartConfig):
    """Mixture of experts: a router sends each token to a few of many small gated MLPs."""

    sharded: ClassVar[dict[str, str]] = {"dim": "mlp", "shared_dim": "mlp", "num_experts": "experts"}

    # Required, so that a section without it is a gated MLP in the schema too.
    kind: Literal["moe"]
    num_experts: Count = 8
    experts_per_token: Count = 2
    dim: Count = Field(description="Hidden channels of one expert.")
    num_shared_experts: CountOrZero = Field(
        0, description="Experts that every token passes through; computed as one MLP that is this many times as wide."
    )
    shared_dim: Count | None = Field(None, description="Hidden channels of one shared expert; null is dim.")
    shared_gate: bool = Field(
        False,
        description="Multiply the output of the shared experts by the sigmoid of a learned product with the token.",
    )
    scoring: Literal["softmax", "sigmoid"] = Field("softmax", description="Function from router logits to scores.")
    num_groups: Count = Field(1, description="Groups that the experts are divided into, in order.")
    groups_per_token: Count = Field(1, description="Groups that a token's experts may be of (arXiv:2405.04434).")
    group_score: Literal["best", "best_two"] = Field(
        "best", description="What a group is chosen by: its best expert's score, or the sum of its best two."
    )
    bias: bool = Field(False, description="Add a learned vector after each product of a routed expert.")
    swiglu_limit: PositiveFloat | None = Field(
        None,
        description="Hidden channels of routed experts are g * sigmoid(1.702 g) * (u + 1), with g at most this limit"
        " and u within plus or minus it, as in gpt-oss; null: silu(g) * u.",
    )
    router_logit_bias: bool = Field(False, description="Add a learned vector to the router logits.")
    normalize_weights: bool = Field(True, description="Scale the scores of a token's experts to sum to 1.")
    routed_scaling: PositiveFloat = Field(1.0, description="Factor on the output of the routed experts.")
    router_bias: bool = Field(
        False,
        description="Learn a bias per expert that only affects which experts are chosen, to balance their load"
        " (arXiv:2408.15664).",
    )

    @property
    def active_share(self) -> float:
        return self.experts_per_token / self.num_experts

    def reduced(self, mesh: MeshConfig) -> Self:
        least = math.lcm(max(4, 2 * self.experts_per_token), mesh.expert, 2 * self.num_groups)
        num_experts = min(self.num_experts, least)
        sizes = {"dim": math.lcm(12, mesh.tensor), "shared_dim": self.shared_dim and math.lcm(20, mesh.tensor)}
        return self.model_copy(update=sizes | {"num_experts": num_experts})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts});"
                f" make it {self.num_experts} or less"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts ({self.num_experts}) must be a multiple of num_groups ({self.num_groups})")
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token ({self.groups_per_token}) exceeds num_groups ({self.num_groups})")
        group_size = self.num_experts // self.num_groups
        if self.experts_per_token > self.groups_per_token * group_size:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) exceeds the {self.groups_per_token * group_size} experts"
                f" of groups_per_token ({self.groups_per_token}) groups"
            )
        if self.group_score == "best_two" and self.num_groups > 1 and group_size < 2:
            raise ValueError("group_score best_two needs groups of two experts or more")
        if self.num_shared_experts == 0 and self.shared_dim is not None:
            raise ValueError(f"shared_dim ({self.shared_dim}) needs num_shared_experts of 1 or more")
        if self.num_shared_experts == 0 and self.shared_gate:
            raise ValueError("shared_gate needs num_shared_experts of 1 or more")
        return self


def _kind(default: str) -> Discriminator:
    """Select the member of a union by `kind`, which may be left out of the default one."""
    return Discriminator(
        lambda value: value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)
    )


MixerConfig = Annotated[
    Annotated[AttentionConfig, Tag("attention")]
    | Annotated[LatentAttentionConfig, Tag("mla")]
    | Annotated[GruConfig, Tag("gru")],
    _kind("attention"),
]
MlpConfig = Annotated[
    Annotated[GatedMlpConfig, Tag("gated")]
    | Annotated[PlainMlpConfig, Tag("plain")]
    | Annotated[MoeConfig, Tag("moe")],
    _kind("gated"),
]


class LayerConfig(Frozen):
    """A residual layer: a mixer moves information between tokens, then an MLP processes each token."""

    mixer: MixerConfig = AttentionConfig()
    mlp: MlpConfig = GatedMlpConfig()


class PatternLayerConfig(LayerConfig):
    """A layer of a pattern, possibly several times in a row."""

    times: Count = 1


class UniformGroup(LayerConfig):
    """Equal layers."""

    repeat: Count = 4

    def as_group(self) -> "LayerGroup":
        return LayerGroup(repeat=self.repeat, pattern=(PatternLayerConfig(mixer=self.mixer, mlp=self.mlp),))


class LayerGroup(Frozen):
    """A pattern of layers, repeated. One loop computes all repeats; it is compiled once."""

    repeat: Count = 1
    pattern: tuple[PatternLayerConfig, ...] = Field(min_length=1)

    @property
    def layers_per_repeat(self) -> int:
        return sum(layer.times for layer in self.pattern)

    @property
    def num_layers(self) -> int:
        return self.repeat * self.layers_per_repeat

    def each_layer(self) -> Iterator[LayerConfig]:
        """The layers in order."""
        for _ in range(self.repeat):
            for layer in self.pattern:
                yield from [LayerConfig(mixer=layer.mixer, mlp=layer.mlp)] * layer.times

    def as_group(self) -> "LayerGroup":
        return self


def _group_spelling(value: Any) -> str:
    has_pattern = "pattern" in value if isinstance(value, dict) else isinstance(value, LayerGroup)
    return "pattern" if has_pattern else "uniform"


def _spelling(value: Any) -> str:
    return "groups" if isinstance(value, list | tuple) else _group_spelling(value)


_Group = Annotated[
    Annotated[UniformGroup, Tag("uniform")] | Annotated[LayerGroup, Tag("pattern")], Discriminator(_group_spelling)
]
_Groups = Annotated[tuple[_Group, ...], Field(min_length=1)]
# In a file: one group, or a list of them. A group is equal layers or a pattern of layers.
LayersField = Annotated[
    Annotated[UniformGroup, Tag("uniform")] | Annotated[LayerGroup, Tag("pattern")] | Annotated[_Groups, Tag("groups")],
    Discriminator(_spelling),
    AfterValidator(lambda given: tuple(each.as_group() for each in (given if isinstance(given, tuple) else (given,)))),
]


def key_as_written(key: str, tree: Any) -> str:
    """A dotted key of a validated configuration (nested dicts and lists) as one would write it.

    `layers.0.pattern.0.mixer.window` is `layers.mixer.window` if there is one group with one layer in its pattern.
    """
    written: list[str] = []
    node = tree
    for part in key.split("."):
        is_alone = isinstance(node, list) and len(node) == 1 and written[-1:] in (["layers"], ["pattern"])
        node = node[int(part)] if isinstance(node, list) else node[part]
        if not is_alone:
            written.append(part)
        elif written[-1] == "pattern":
            written.pop()
    return ".".join(written)


def value_at(config: Any, key: str) -> Any:
    """The value of a validated configuration at a dotted key as one would write it: see `key_as_written`."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, tuple | list) and not part.isdigit():
            (value,) = value
        if isinstance(value, LayerGroup) and part not in LayerGroup.model_fields:
            (value,) = value.pattern
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value
