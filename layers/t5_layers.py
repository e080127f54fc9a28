# SPDX-License-Identifier: Apache-2.0
"""The layers of T5's encoder and decoder. Shapes: B batch, N or M encoder tokens, T decoder tokens, D width, H heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from adaptive.tokens import Signals
from layers.attention import Attention
from layers.mlp import GatedMlp
from layers.norms import RMSNorm


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and gated MLP; sizes as in `T5`. Returns the features and the signals asked for.

    `score_excess` asks for the signal of that name at every call.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    epsilon: float
    dtype: Any
    score_excess: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], bias: Array, key_bias: Array, signals: tuple[str, ...], deterministic: bool
    ) -> tuple[Float[Array, "B N D"], Signals]:
        """`x` after the layer; `bias [1 or B, H, N, N]`, `key_bias [B, N]`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        signals += _own_signals(self)
        attended, found = _attention(self, "attention", x.shape[-1])(
            _norm(self, "attention_norm")(x), bias=bias, key_bias=key_bias, signals=signals
        )
        x = x + drop(attended)
        return x + drop(_mlp(self, x.shape[-1])(_norm(self, "mlp_norm")(x), deterministic=deterministic)), found


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and gated MLP; sizes as in `T5`.

    Returns the features, and with `score_excess` that signal of cross-attention, else None.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    epsilon: float
    dtype: Any
    score_excess: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B M D"],
        bias: Array,
        key_bias: Array,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, " B"] | None]:
        """`x` after the layer; `encoded` is attended to with `key_bias [B, M]`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        own, _ = _attention(self, "attention", x.shape[-1])(_norm(self, "attention_norm")(x), bias=bias, causal=True)
        x = x + drop(own)
        cross, found = _attention(self, "cross_attention", x.shape[-1])(
            _norm(self, "cross_norm")(x), encoded, key_bias=key_bias, signals=_own_signals(self)
        )
        x = x + drop(cross)
        x = x + drop(_mlp(self, x.shape[-1])(_norm(self, "mlp_norm")(x), deterministic=deterministic))
        return x, found.score_excess


def _own_signals(layer: EncoderLayer | DecoderLayer) -> tuple[str, ...]:
    return ("score_excess",) if layer.score_excess else ()


def _norm(layer: EncoderLayer | DecoderLayer, name: str) -> RMSNorm:
    return RMSNorm(layer.epsilon, dtype=layer.dtype, name=name)


def _attention(layer: EncoderLayer | DecoderLayer, name: str, width: int) -> Attention:
    inner = layer.heads * layer.head_dim
    return Attention(
        heads=layer.heads,
        head_dim=layer.head_dim,
        use_bias=False,
        # T5 does not scale the logits; its query initialiser does instead.
        scale=1.0,
        softmax=layer.softmax,
        dtype=layer.dtype,
        query_init=nn.initializers.normal((width * layer.head_dim) ** -0.5),
        kernel_init=nn.initializers.normal(width**-0.5),
        out_init=nn.initializers.normal(inner**-0.5),
        name=name,
    )


def _mlp(layer: EncoderLayer | DecoderLayer, width: int) -> GatedMlp:
    return GatedMlp(
        layer.mlp_dim,
        activation="gelu_tanh",
        dropout=layer.dropout,
        dtype=layer.dtype,
        kernel_init=nn.initializers.normal(width**-0.5),
        out_init=nn.initializers.normal(layer.mlp_dim**-0.5),
        name="mlp",
    )


class ScannedEncoderLayer(nn.Module):
    """An encoder layer in the form that `nn.scan` wants: the second result is the score excess, or None."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, bias: Array, key_bias: Array, deterministic: bool) -> tuple[Array, Array | None]:
        x, found = EncoderLayer(**self.layer, name="layer")(x, bias, key_bias, (), deterministic)
        return x, found.score_excess


class ScannedDecoderLayer(nn.Module):
    """A decoder layer in the form that `nn.scan` wants: the second result is the score excess, or None."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array, bias: Array, key_bias: Array, deterministic: bool
    ) -> tuple[Array, Array | None]:
        return DecoderLayer(**self.layer, name="layer")(x, encoded, bias, key_bias, deterministic)
