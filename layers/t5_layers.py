# SPDX-License-Identifier: Apache-2.0
"""The layers of T5's encoder and decoder. Shapes: B batch, N or M encoder tokens, T decoder tokens, D width, H heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive.tokens import Reduction, Signals, TokenSet
from layers.attention import Attention
from layers.mlp import GatedMlp
from layers.norms import RMSNorm
from layers.sharding import along_batch


@flax.struct.dataclass
class EncoderState:
    """The encoder between two layers.

    Attributes:
      tokens: the token set; gate: `[B, N]` values that fade keys, or None; reduction: all that hooks did so far, or None.
      chunk: `[B, N]` number of the chunk that each token sees and no other, or None; gone after a reduction.
      moved: static; True once the rows' positions may differ.
      proportional: static; keys count as often as tokens they stand for.
    """

    tokens: TokenSet
    gate: Any = None
    reduction: Any = None
    chunk: Any = None
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
            moved=True,
        )


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
        attended, found = _attention(self, "attention", x.shape[-1])(
            RMSNorm(dtype=self.dtype, name="attention_norm")(x), bias=bias, key_bias=key_bias, signals=signals
        )
        x = x + drop(attended)
        return x + drop(
            _mlp(self, x.shape[-1])(RMSNorm(dtype=self.dtype, name="mlp_norm")(x), deterministic=deterministic)
        ), found


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and gated MLP; sizes as in `T5`."""

    heads: int
    head_dim: int
    mlp_dim: int
    softmax: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B M D"],
        bias: Array,
        key_bias: Array,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        """`x` after the layer; `encoded` is attended to with `key_bias [B, M]`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        own, _ = _attention(self, "attention", x.shape[-1])(
            RMSNorm(dtype=self.dtype, name="attention_norm")(x), bias=bias, causal=True
        )
        x = x + drop(own)
        cross, _ = _attention(self, "cross_attention", x.shape[-1])(
            RMSNorm(dtype=self.dtype, name="cross_norm")(x), encoded, key_bias=key_bias
        )
        x = x + drop(cross)
        return x + drop(
            _mlp(self, x.shape[-1])(RMSNorm(dtype=self.dtype, name="mlp_norm")(x), deterministic=deterministic)
        )


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
    """An encoder layer in the form that `nn.scan` wants."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, bias: Array, key_bias: Array, deterministic: bool) -> tuple[Array, None]:
        return EncoderLayer(**self.layer, name="layer")(x, bias, key_bias, (), deterministic)[0], None


class ScannedDecoderLayer(nn.Module):
    """A decoder layer in the form that `nn.scan` wants."""

    layer: dict[str, Any]

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array, bias: Array, key_bias: Array, deterministic: bool
    ) -> tuple[Array, None]:
        return DecoderLayer(**self.layer, name="layer")(x, encoded, bias, key_bias, deterministic), None
