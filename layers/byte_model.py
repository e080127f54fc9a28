# SPDX-License-Identifier: Apache-2.0
"""A small causal model of bytes, whose uncertainty says where patches start. Shapes: B batch, N bytes, V vocabulary."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops
from adaptive.chunking import boundary_predictor
from layers.attention import Attention
from layers.linear import Linear
from layers.mlp import GatedMlp
from layers.norms import RMSNorm
from layers.sharding import along_batch


class ByteModel(nn.Module):
    """A small causal transformer over bytes: the entropy of its prediction of the next one.

    Nothing flows back from the main model into it or from it into the main model: it learns from its own cross-entropy alone.

    Attributes:
      vocab_size, width, layers, heads: sizes; the MLPs are four times as wide.

    Source: Pagnoni et al. 2025 (entropy model).

    Differs: trained along with the main model, where BLT trains 14 layers of width 768 beforehand; attention to all earlier
    bytes, not to the last 512.
    """

    vocab_size: int = 384
    width: int = 64
    layers: int = 2
    heads: int = 2

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B N"], valid: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B N"], tuple[Array, Array]]:
        """`(entropies [B, N] in nats, loss)`; the loss is `(sum of the rows' mean cross-entropies, rows)`."""
        embedding_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        x = along_batch(nn.Embed(self.vocab_size, self.width, embedding_init=embedding_init, name="embedding")(ids))
        key_bias = jnp.where(valid, 0.0, -jnp.inf)
        for layer in range(self.layers):
            attention = Attention(self.heads, use_bias=False, rotary=True, name=f"attention_{layer}")
            normed = RMSNorm(name=f"attention_norm_{layer}")(x)
            x = x + attention(normed, key_bias=key_bias, causal=True)[0]
            mlp = GatedMlp(4 * self.width, activation="silu", name=f"mlp_{layer}")
            x = x + mlp(RMSNorm(name=f"mlp_norm_{layer}")(x))
        logits = Linear((self.vocab_size,), ("embed", "vocab"), use_bias=False, name="head")(RMSNorm(name="norm")(x))
        log_shares = jax.nn.log_softmax(logits.astype(jnp.float32))
        entropies = -jnp.sum(jnp.exp(log_shares) * log_shares, axis=-1)
        return jax.lax.stop_gradient(entropies), _next_byte_loss(log_shares, ids, valid)

    def macs(self, tokens: float) -> float:
        """Multiply-accumulates for one sequence."""
        layer = flops.attention_macs(tokens, tokens, self.width, self.width)
        layer += flops.mlp_macs(tokens, self.width, 4 * self.width, gated=True)
        return self.layers * layer + flops.linear_macs(tokens, self.width, self.vocab_size)


def _next_byte_loss(log_shares: Array, ids: Array, valid: Array) -> tuple[Array, Array]:
    """`(sum, rows)` of each row's mean cross-entropy of the byte after each real one."""
    losses = -jnp.take_along_axis(log_shares[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    counted = valid[:, :-1] & valid[:, 1:]
    total = jnp.sum(jnp.where(counted, losses, 0.0), axis=-1)
    return boundary_predictor.row_mean(total / jnp.maximum(jnp.sum(counted, axis=-1), 1), valid)
