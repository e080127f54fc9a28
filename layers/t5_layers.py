# SPDX-License-Identifier: Apache-2.0
"""The layers of T5's encoder and decoder. Shapes: B batch, N or M encoder tokens, T decoder tokens, D width, H heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.tokens import Reduction, Signals, TokenSet
from layers.attention import Attention, Memory
from layers.linear import Initializer
from layers.norms import RMSNorm
from layers.parts import Parts
from layers.sharding import along_batch
from pallas_kernels.position_bias import PositionBias


@flax.struct.dataclass
class EncoderState:
    """The encoder between two layers.

    Attributes:
      tokens: the token set; gate: `[B, N]` values that fade keys, or None; reduction: all that hooks did so far, or None.
      chunk: `[B, N]` number of the chunk that each token sees and no other, or None; gone after a reduction.
      excess: `[B]` sum of the score excess over the maps so far, or None.
      moved: static; True once the rows' positions may differ.
      proportional: static; keys count as often as tokens they stand for.
    """

    tokens: TokenSet
    gate: Any = None
    reduction: Any = None
    chunk: Any = None
    excess: Any = None
    moved: bool = flax.struct.field(pytree_node=False, default=False)
    proportional: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def key_bias(self) -> Float[Array, "B N"]:
        """Log mass (0 for a plain token or a chunk, -inf for padding) plus the gate."""
        bias = self.tokens.log_mass if self.proportional else jnp.where(self.tokens.valid, 0.0, -jnp.inf)
        return bias if self.gate is None else bias + self.gate

    def reduce(self, reduction: Reduction) -> EncoderState:
        """The state after a reduction of its tokens."""
        tokens = reduction.apply(self.tokens)
        return EncoderState(
            tokens.replace(features=along_batch(tokens.features)),
            None if self.gate is None else reduction.reduce(self.gate),
            reduction if self.reduction is None else self.reduction.then(reduction),
            excess=self.excess,
            moved=True,
        )


@flax.struct.dataclass
class Encoded:
    """What a decoder needs of the encoder.

    Attributes:
      features: `[B, M, D]` after the last norm; key_bias: `[B, M]` added to the logits of each of them in cross-attention,
        -inf where there is no token.
      counts: `[B]` real tokens; aux: the encoder's other results, as `T5` describes them.
    """

    features: Float[Array, "B M D"]
    key_bias: Float[Array, "B M"]
    counts: Int[Array, " B"]
    aux: Any = None

    @property
    def valid(self) -> Bool[Array, "B M"]:
        """`[B, M]` True where there is a token."""
        return jnp.isfinite(self.key_bias)


@flax.struct.dataclass
class DecoderCache:
    """What a decoder carries from step to step: an argument and a result, so that it can be donated or looped over.

    Attributes:
      own: the memory of self-attention for T tokens, zeros behind the last one decoded; cross: that of the encoder's output,
        made once. Each is a tuple with a `Memory` a layer, or one with a leading layer axis for scanned layers.
      key_bias: `[B, M]` of cross-attention.
    """

    own: Any
    cross: Any
    key_bias: Float[Array, "B M"]

    @property
    def slots(self) -> int:
        """T, tokens that self-attention has room for."""
        return jax.tree.leaves(self.own)[0].shape[-2]


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and gated MLP; sizes as in `T5`. Returns the features and the signals asked for.

    `score_excess` asks for the signal of that name at every call; `parts` builds projections and MLP.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    epsilon: float
    dtype: Any
    score_excess: bool = False
    parts: Parts = Parts()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        bias: Array | PositionBias,
        key_bias: Array,
        signals: tuple[str, ...],
        deterministic: bool,
    ) -> tuple[Float[Array, "B N D"], Signals]:
        """`x` after the layer; `bias [1 or B, H, N, N]`, or what it is made from; `key_bias [B, N]`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        signals += _own_signals(self)
        attended, found = _attention(self, "attention")(
            _norm(self, "attention_norm")(x), bias=bias, key_bias=key_bias, signals=signals
        )
        x = x + drop(attended)
        return x + drop(_mlp(self)(_norm(self, "mlp_norm")(x), deterministic=deterministic)), found


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and gated MLP; sizes as in `T5`.

    Returns the features, and with `score_excess` that signal of cross-attention, else None; `parts` builds projections and MLP.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    epsilon: float
    dtype: Any
    score_excess: bool = False
    parts: Parts = Parts()

    def setup(self) -> None:
        """Creates all parts, which scoring a whole sequence and decoding a token share."""
        self.drop = nn.Dropout(self.dropout)
        self.attention_norm = _norm(self)
        self.attention = _attention(self, "attention")
        self.cross_norm = _norm(self)
        self.cross_attention = _attention(self, "cross_attention")
        self.mlp_norm = _norm(self)
        self.mlp = _mlp(self)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B M D"],
        bias: Array | PositionBias,
        key_bias: Array,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"] | None]:
        """`x` after the layer; `encoded` is attended to with `key_bias [B, M]`."""
        own, _ = self.attention(self.attention_norm(x), bias=bias, causal=True)
        x = x + self.drop(own, deterministic=deterministic)
        cross, found = self.cross_attention(self.cross_norm(x), encoded, key_bias=key_bias, signals=_own_signals(self))
        x = x + self.drop(cross, deterministic=deterministic)
        mlp = self.mlp(self.mlp_norm(x), deterministic=deterministic)
        return x + self.drop(mlp, deterministic=deterministic), found.score_excess

    def remember(self, encoded: Float[Array, "B M D"]) -> Memory:
        """Keys and values of cross-attention."""
        return self.cross_attention.project(encoded)

    def step(
        self, x: Float[Array, "B 1 D"], own: Memory, cross: Memory, bias: Array, key_bias: Array, position: Array
    ) -> tuple[Float[Array, "B 1 D"], Memory]:
        """The token at `position` after the layer, and the self-attention memory with it; `bias [1, H, 1, T]`."""
        normed = self.attention_norm(x)
        own = own.write(self.attention.project(normed), position)
        x = x + self.attention.attend(normed, own, bias=bias)
        x = x + self.cross_attention.attend(self.cross_norm(x), cross, key_bias=key_bias)
        return x + self.mlp(self.mlp_norm(x), deterministic=True), own


def _own_signals(layer: EncoderLayer | DecoderLayer) -> tuple[str, ...]:
    return ("score_excess",) if layer.score_excess else ()


def _norm(layer: EncoderLayer | DecoderLayer, name: str | None = None) -> RMSNorm:
    return RMSNorm(layer.epsilon, dtype=layer.dtype, name=name)


def _attention(layer: EncoderLayer | DecoderLayer, name: str) -> Attention:
    return Attention(
        heads=layer.heads,
        head_dim=layer.head_dim,
        use_bias=False,
        # T5 does not scale the logits; its query initialiser does instead.
        scale=1.0,
        softmax=layer.softmax,
        dtype=layer.dtype,
        query_init=_fan_in(layer.head_dim),
        kernel_init=_fan_in(),
        parts=layer.parts,
        name=name,
    )


def _mlp(layer: EncoderLayer | DecoderLayer) -> nn.Module:
    return layer.parts.gated_mlp(
        layer.mlp_dim,
        activation="gelu_tanh",
        dropout=layer.dropout,
        dtype=layer.dtype,
        kernel_init=_fan_in(),
        name="mlp",
    )


def _fan_in(factor: int = 1) -> Initializer:
    """Normal with variance 1 / (inputs factor)."""

    def init(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        return nn.initializers.normal((shape[0] * factor) ** -0.5)(key, shape, dtype)

    return init


class ScannedEncoderLayer(nn.Module):
    """An encoder layer in the form that `nn.scan` wants: the second result is the score excess, or None."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(
        self, x: Array, bias: Array | PositionBias, key_bias: Array, deterministic: bool
    ) -> tuple[Array, Array | None]:
        x, found = EncoderLayer(**self.layer, name="layer")(x, bias, key_bias, (), deterministic)
        return x, found.score_excess


class ScannedDecoderLayer(nn.Module):
    """A decoder layer in the form that `nn.scan` wants: what goes from layer to layer comes first, the score excess second."""

    layer: dict[str, Any]

    def setup(self) -> None:
        self.single = DecoderLayer(**self.layer, name="layer")

    def __call__(
        self, x: Array, encoded: Array, bias: Array | PositionBias, key_bias: Array, deterministic: bool
    ) -> tuple[Array, Array | None]:
        return self.single(x, encoded, bias, key_bias, deterministic)

    def remember(self, encoded: Array) -> tuple[Array, Memory]:
        """What every layer remembers of the same `encoded`, which goes on as it came."""
        return encoded, self.single.remember(encoded)

    def step(
        self, x: Array, own: Memory, cross: Memory, bias: Array, key_bias: Array, position: Array
    ) -> tuple[Array, Memory]:
        """The token after the layer, and the layer's own memory."""
        return self.single.step(x, own, cross, bias, key_bias, position)
