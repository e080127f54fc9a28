# SPDX-License-Identifier: Apache-2.0
"""Layers of a decoder language model, over whole sequences and token by token.

Shapes: B batch, N tokens, K slots of a cache, D width, H heads, G key heads, d head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.sparsity.decoding import SinkWindow
from layers.attention import Attention, Memory
from layers.norms import RMSNorm
from layers.parts import Parts
from layers.rotary import Llama3Scaling
from layers.rows import update_rows


@flax.struct.dataclass
class Stream:
    """Where the tokens of a batch stand, the same for all layers.

    Attributes:
      positions: `[B, N]` for rotary embedding; tokens stand in rising order.
      valid: `[B, N]` True for real tokens, or None where all are real.
    """

    positions: Int[Array, "B N"]
    valid: Bool[Array, "B N"] | None = None

    @classmethod
    def create(cls, input_ids: Int[Array, "B N"], attention_mask: Array | None = None) -> Stream:
        """Positions count the real tokens of each row, so that padding on either side moves nothing.

        Raises:
          ValueError: ids that are not `[B, N]`, or a mask of another shape.
        """
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            mask = "" if attention_mask is None else f" and {attention_mask.shape}"
            raise ValueError(f"input_ids and attention_mask must be [B, N], alike; got {input_ids.shape}{mask}")
        if attention_mask is None:
            return cls(jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape))
        valid = attention_mask.astype(bool)
        return cls(jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0), valid)

    @property
    def key_bias(self) -> Float[Array, "B N"] | None:
        """0 for real tokens, -inf for padding; None without padding."""
        return None if self.valid is None else jnp.where(self.valid, 0.0, -jnp.inf)


@flax.struct.dataclass
class Place:
    """Where the one token of each row stands that a decode step reads.

    Attributes:
      slot: of the memories, the same for all rows; positions: `[B, 1]` for rotary embedding.
      key_bias: `[B, K]` 0 for slots that the tokens may attend to, theirs included, else -inf.
    """

    slot: Int[Array, ""]
    positions: Int[Array, "B 1"]
    key_bias: Float[Array, "B K"]


class FeedForward(Protocol):
    """A hashable value that makes the feed-forward part of each block, in place of a gated MLP."""

    def build(self, layer: int, *, dtype: Any, param_dtype: Any) -> nn.Module:
        """The module of `layer`: `(x [B, N, D], inputs, deterministic) -> (y [B, N, D], aux)`.

        `inputs` is the layer's own part of the model's `feed_forward_inputs` (None when there are none), and `aux` a dict of
        arrays that the model hands out.
        """
        ...


class Block(nn.Module):
    """`x + attention(norm x)`, then `x + feed_forward(norm x)`.

    Attributes:
      layer: index from 0.
      heads, kv_heads, head_dim: H, G, d.
      mlp_dim: inner width of the gated MLP.
      qkv_bias: biases of the projections to queries, keys and values (Qwen2).
      rotary_base, rotary_scaling: see `layers.rotary`.
      feed_forward: what stands in place of the gated MLP; None for that.
      parts: builds projections and the gated MLP.
      reads: which pages of its memory a decode step reads; all of it when None.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    activation: str = "silu"
    qkv_bias: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: Llama3Scaling | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    feed_forward: FeedForward | None = None
    parts: Parts = Parts()
    reads: SinkWindow | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self) -> None:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention_norm = RMSNorm(self.epsilon, **common)
        self.attention = Attention(
            self.heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            use_bias=self.qkv_bias,
            out_bias=False,
            rotary=True,
            rotary_base=self.rotary_base,
            rotary_scaling=self.rotary_scaling,
            parts=self.parts,
            implementation=self.implementation,
            **common,
        )
        self.mlp_norm = RMSNorm(self.epsilon, **common)
        if self.feed_forward is None:
            self.mlp = self.parts.gated_mlp(self.mlp_dim, activation=self.activation, dropout=self.dropout, **common)
        else:
            self.mlp = self.feed_forward.build(self.layer, **common)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, x: Float[Array, "B N D"], stream: Stream, inputs: Any = None, deterministic: bool = True
    ) -> tuple[Float[Array, "B N D"], dict[str, Any]]:
        """Features `[B, N, D]` after the block, and what its feed-forward part hands out."""
        x, _, aux = self._run(x, stream, inputs, deterministic)
        return x, aux

    def prefill(self, x: Float[Array, "B N D"], stream: Stream, slots: int) -> tuple[Float[Array, "B N D"], Memory]:
        """Features after the block, and a memory of `slots` slots whose first N hold the tokens."""
        x, memory, _ = self._run(x, stream, None, True)
        return x, self.empty(x, slots).write(memory, 0)

    def empty(self, x: Float[Array, "B N D"], slots: int) -> Memory:
        """A memory without tokens for the rows of `x`."""
        shape = (x.shape[0], self.kv_heads, slots, self.head_dim)
        return Memory(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def step(
        self, x: Float[Array, "B 1 D"], memory: Memory, place: Place
    ) -> tuple[Float[Array, "B 1 D"], Memory, Bool[Array, " B"]]:
        """One token a row: features, the memory with it, and the rows for which the block ran (all)."""
        memory = memory.write(self.attention.project(self.attention_norm(x), place.positions), place.slot)
        return self.attend_and_feed(x, memory, place), memory, jnp.ones(x.shape[0], bool)

    def step_rows(
        self, x: Float[Array, "B 1 D"], memory: Memory, place: Place, runs: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], Memory, Bool[Array, " B"]]:
        """As `step`, for the rows of `runs` alone, packed on about as many (`layers.rows`).

        Other rows keep their features; the keys and values that those have in this layer are stored all the same, so that
        later tokens find a complete memory.
        """
        memory = memory.write(self.attention.project(self.attention_norm(x), place.positions), place.slot)
        return update_rows(self, Block.attend_and_feed, runs, x, memory, place), memory, runs

    def attend_and_feed(self, x: Float[Array, "R 1 D"], memory: Memory, place: Place) -> Float[Array, "R 1 D"]:
        """What follows the write of a step's tokens into the memory, for the rows of `x`."""
        pages = None if self.reads is None else self.reads.pages(place.key_bias, place.slot)
        attended = self.attention.attend(
            self.attention_norm(x), memory, key_bias=place.key_bias, positions=place.positions, pages=pages
        )
        return self._finish(x + attended, None, True)[0]

    def _run(self, x: Array, stream: Stream, inputs: Any, deterministic: bool) -> tuple[Array, Memory, dict[str, Any]]:
        normed = self.attention_norm(x)
        memory = self.attention.project(normed, stream.positions)
        y = self.attention.attend(normed, memory, key_bias=stream.key_bias, causal=True, positions=stream.positions)
        x = x + self.drop(y, deterministic=deterministic)
        x, aux = self._finish(x, inputs, deterministic)
        return x, memory, aux

    def _finish(self, x: Array, inputs: Any, deterministic: bool) -> tuple[Array, dict[str, Any]]:
        normed = self.mlp_norm(x)
        if self.feed_forward is None:
            y, aux = self.mlp(normed, deterministic=deterministic), {}
        else:
            y, aux = self.mlp(normed, inputs, deterministic)
        return x + self.drop(y, deterministic=deterministic), aux
