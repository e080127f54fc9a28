# SPDX-License-Identifier: Apache-2.0
"""The layers of T5's encoder and decoder. Shapes: B batch, N or M encoder tokens, T decoder tokens, D width, H heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.tokens import Signals
from layers.attention import Attention, Memory
from layers.linear import Initializer
from layers.mlp import GatedMlp
from layers.norms import RMSNorm


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
    """Pre-norm self-attention and gated MLP; sizes as in `T5`. Returns the features and the signals asked for."""

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], bias: Array, key_bias: Array, signals: tuple[str, ...], deterministic: bool
    ) -> tuple[Float[Array, "B N D"], Signals]:
        """`x` after the layer; `bias [1 or B, H, N, N]`, `key_bias [B, N]`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        attended, found = _attention(self, "attention")(
            RMSNorm(dtype=self.dtype, name="attention_norm")(x), bias=bias, key_bias=key_bias, signals=signals
        )
        x = x + drop(attended)
        return x + drop(_mlp(self)(RMSNorm(dtype=self.dtype, name="mlp_norm")(x), deterministic=deterministic)), found


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and gated MLP; sizes as in `T5`."""

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    dtype: Any

    def setup(self) -> None:
        """Creates all parts, which scoring a whole sequence and decoding a token share."""
        self.drop = nn.Dropout(self.dropout)
        self.attention_norm = RMSNorm(dtype=self.dtype)
        self.attention = _attention(self, "attention")
        self.cross_norm = RMSNorm(dtype=self.dtype)
        self.cross_attention = _attention(self, "cross_attention")
        self.mlp_norm = RMSNorm(dtype=self.dtype)
        self.mlp = _mlp(self)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B M D"],
        bias: Array,
        key_bias: Array,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        """`x` after the layer; `encoded` is attended to with `key_bias [B, M]`."""
        own, _ = self.attention(self.attention_norm(x), bias=bias, causal=True)
        x = x + self.drop(own, deterministic=deterministic)
        cross, _ = self.cross_attention(self.cross_norm(x), encoded, key_bias=key_bias)
        x = x + self.drop(cross, deterministic=deterministic)
        mlp = self.mlp(self.mlp_norm(x), deterministic=deterministic)
        return x + self.drop(mlp, deterministic=deterministic)

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
        name=name,
    )


def _mlp(layer: EncoderLayer | DecoderLayer) -> GatedMlp:
    return GatedMlp(
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
    """An encoder layer in the form that `nn.scan` wants."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, bias: Array, key_bias: Array, deterministic: bool) -> tuple[Array, None]:
        return EncoderLayer(**self.layer, name="layer")(x, bias, key_bias, (), deterministic)[0], None


class ScannedDecoderLayer(nn.Module):
    """A decoder layer in the form that `nn.scan` wants: what goes from layer to layer comes first."""

    layer: dict[str, Any]

    def setup(self) -> None:
        self.single = DecoderLayer(**self.layer, name="layer")

    def __call__(
        self, x: Array, encoded: Array, bias: Array, key_bias: Array, deterministic: bool
    ) -> tuple[Array, None]:
        return self.single(x, encoded, bias, key_bias, deterministic), None

    def remember(self, encoded: Array) -> tuple[Array, Memory]:
        """What every layer remembers of the same `encoded`, which goes on as it came."""
        return encoded, self.single.remember(encoded)

    def step(
        self, x: Array, own: Memory, cross: Memory, bias: Array, key_bias: Array, position: Array
    ) -> tuple[Array, Memory]:
        """The token after the layer, and the layer's own memory."""
        return self.single.step(x, own, cross, bias, key_bias, position)
