# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention that takes token mass and explicit positions, and hands out signals without changing its output.

Shapes: B batch, N tokens, Q queries, K keys, D features, H heads, G key heads, d head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from adaptive.rates.masked import masked_attention
from adaptive.sparsity.decoding import Pages
from adaptive.tokens import Signals
from layers.linear import Initializer
from layers.parts import Parts
from layers.rotary import Llama3Scaling, rotate
from pallas_kernels.biased_flash_attention import (
    attention_column_stats,
    attention_map,
    attention_score_excess,
    biased_attention,
)
from pallas_kernels.block_sparse_attention import BlockIndex, block_sparse_attention
from pallas_kernels.position_bias import PositionBias
from pallas_kernels.sparse_decode_attention import sparse_decode_attention

# Signals that attention can hand out; all but "attention" without a map of all queries by all keys.
SIGNALS = ("keys", "queries", "values", "cls_attention", "column_sums", "score_excess", "attention")
# Those that are made from the dense map.
_OF_THE_MAP = {"cls_attention", "column_sums", "score_excess", "attention"}


@flax.struct.dataclass
class Memory:
    """Keys and values that later queries attend to: the cache of one attention layer.

    Attributes:
      keys, values: `[B, G, K, d]`. Heads stand before tokens, as the products want them: with one query a step, turning all
        keys and values around would cost more than attending to them.
    """

    keys: Float[Array, "B G K d"]
    values: Float[Array, "B G K d"]

    def write(self, other: Memory, position: int | Int[Array, ""]) -> Memory:
        """This memory with the tokens of `other` in the slots from `position` on.

        Raises:
          ValueError: a Python position at which `other` does not fit (a traced one cannot be checked).
        """
        slots, length = self.keys.shape[-2], other.keys.shape[-2]
        if length > slots or (isinstance(position, int) and not 0 <= position <= slots - length):
            raise ValueError(f"{length} token(s) at position {position} do not fit into a memory of {slots} slots")
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=-2), self, other
        )

    def write_each(self, other: Memory, slots: Int[Array, " b"], rows: Int[Array, " b"] | None = None) -> Memory:
        """This memory with the single tokens of `other [b, G, 1, d]` in a slot of each row; a slot past the end is none.

        `rows` are those of this memory that the tokens belong to; all, in order, when None.
        """
        rows = jnp.arange(self.keys.shape[0]) if rows is None else rows
        return jax.tree.map(
            lambda old, new: old.at[rows, :, slots].set(new[:, :, 0].astype(old.dtype), mode="drop"), self, other
        )


class Attention(nn.Module):
    """Self- or cross-attention, `(out [B, Q, D], Signals)`, whole or in two parts: `project` keys and values, then `attend`.

    Attributes:
      heads: H.
      head_dim: d; D / H when None.
      kv_heads: G, which divides H; H when None.
      use_bias: biases of the four projections; out_bias: of the last one, as the others when None.
      scale: factor of the logits; `d ** -0.5` when None (T5: 1.0).
      softmax: "standard" or "off_by_one".
      rotary: turns queries and keys by their positions; rotary_base, rotary_scaling: see `layers.rotary`.
      dtype: of the computation; parameters stay in `param_dtype`.
      kernel_init: of all projections, unless `query_init` or `out_init` is given.
      parts: builds the four projections.
      implementation: of the attention kernel; None for the best available.
    """

    heads: int
    head_dim: int | None = None
    kv_heads: int | None = None
    use_bias: bool = True
    out_bias: bool | None = None
    scale: float | None = None
    softmax: str = "standard"
    rotary: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: Llama3Scaling | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    query_init: Initializer | None = None
    out_init: Initializer | None = None
    parts: Parts = Parts()
    implementation: str | None = None

    def setup(self) -> None:
        """Creates the projections; their sizes come with the calls, since D and d may follow from the input."""
        into, out = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.query = self._linear(into, self.use_bias, self.query_init)
        self.key = self._linear(into, self.use_bias)
        self.value = self._linear(into, self.use_bias)
        self.out = self._linear(out, self.use_bias if self.out_bias is None else self.out_bias, self.out_init)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        context: Float[Array, "B K D"] | None = None,
        *,
        key_bias: Float[Array, "B K"] | None = None,
        key_mask: Float[Array, "B K"] | None = None,
        bias: Float[Array, "b H Q K"] | PositionBias | None = None,
        causal: bool = False,
        block_index: BlockIndex | None = None,
        positions: Num[Array, "b Q"] | None = None,
        context_positions: Num[Array, "b K"] | None = None,
        signals: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B Q D"], Signals]:
        """Attends from `x` to `context`, or to `x` itself.

        Args:
          x, context: `[B, Q, D]`, `[B, K, D]`.
          key_bias: `[B, K]` added to the logits of each key: log mass, gate values; -inf removes a key.
          key_mask: `[B, K]` in {0, 1}, a mask of keys that a gradient reaches (`adaptive.rates.masked`): plain self-attention
            with the whole map in memory, for learning rates. Signals see the keys at 1.
          bias: `[1 or B, H, Q, K]` added to the logits, or what it is made from where it is used.
          causal: queries see no later keys.
          block_index: blocks of keys that each block of queries attends to; all when None. It takes no `bias` and hands out no
            signal that is a part of the dense map.
          positions, context_positions: `[B or 1, Q]`, `[B or 1, K]` for rotary embedding; 0, 1, ... when None.
          signals: what to hand out, of `SIGNALS`; other fields of the result are None. Keys, queries and values are means
            over heads, before any rotation. Column sums leave out the queries of removed keys in self-attention, and so
            does the score excess, whose logits are those before `key_bias`.

        Raises:
          ValueError: an unknown signal, a class row under a causal mask, a bias or a signal that lists of blocks exclude, or
            shapes that do not fit.
        """
        _check_signals(signals, causal)
        if block_index is not None:
            _check_sparse(signals, bias)
        if key_mask is not None and (context is not None or bias is not None or causal or block_index is not None):
            raise ValueError("key_mask is for plain self-attention: without context, bias, causal or block_index")
        source = x if context is None else context
        query = self.query(x, self._sizes(x, self.heads))
        key, value = self._keys_values(source)
        turned_query = self._rotate(query, positions)
        turned_key = self._rotate(key, positions if context is None else context_positions)
        common = {"key_bias": key_bias, "causal": causal, "softmax": self.softmax, "scale": self.scale}
        options, arrays, lse = {**common, "bias": bias}, (turned_query, turned_key, value), None
        if key_mask is not None:
            out = masked_attention(*arrays, key_mask, key_bias=key_bias, scale=self.scale)
            options["key_bias"] = key_bias = jnp.where(key_mask > 0, 0.0 if key_bias is None else key_bias, -jnp.inf)
        elif block_index is None:
            # Column sums start from the log-sum-exp that attention makes anyway.
            out, lse = biased_attention(*arrays, return_lse=True, implementation=self.implementation, **options)
        else:
            out = block_sparse_attention(*arrays, block_index, implementation=self.implementation, **common)
        handed = {
            name: jnp.mean(values, axis=2)
            for name, values in (("keys", key), ("queries", query), ("values", value))
            if name in signals
        }
        weight = jnp.isfinite(key_bias) if key_bias is not None and context is None else None
        handed |= _attention_signals(turned_query, turned_key, signals, weight, lse, self.implementation, options)
        if "score_excess" in signals:
            handed["score_excess"] = attention_score_excess(
                turned_query,
                turned_key,
                bias=bias,
                scale=self.scale,
                query_mask=weight,
                key_mask=None if key_bias is None else jnp.isfinite(key_bias),
                implementation=self.implementation,
            )
        return self.out(out, x.shape[-1:]), Signals(**handed)

    def project(self, context: Float[Array, "B K D"], positions: Num[Array, "b K"] | None = None) -> Memory:
        """Keys and values of `context`, rotated by `positions [B or 1, K]` (0, 1, ... when None) where the layer rotates."""
        key, value = self._keys_values(context)
        return Memory(jnp.swapaxes(self._rotate(key, positions), 1, 2), jnp.swapaxes(value, 1, 2))

    def attend(
        self,
        x: Float[Array, "B Q D"],
        memory: Memory,
        *,
        key_bias: Float[Array, "B K"] | None = None,
        bias: Float[Array, "b H Q K"] | PositionBias | None = None,
        causal: bool = False,
        positions: Num[Array, "b Q"] | None = None,
        pages: Pages | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attends from `x` to a memory that `project` made; arguments as in the call, -inf in `bias` removes a pair.

        With `pages` all queries see the listed pages of the memory, and no others.

        Raises:
          ValueError: a `bias` or causal order beside `pages`, or a memory that is not of whole pages.
        """
        query = self._rotate(self.query(x, self._sizes(x, self.heads)), positions)
        if pages is not None:
            if bias is not None or causal:
                raise ValueError("listed pages take a key_bias, and neither a bias on pairs nor causal order")
            return self.out(self._attend_pages(query, memory, pages, key_bias), x.shape[-1:])
        out = biased_attention(
            query,
            jnp.swapaxes(memory.keys, 1, 2),
            jnp.swapaxes(memory.values, 1, 2),
            key_bias=key_bias,
            bias=bias,
            causal=causal,
            softmax=self.softmax,
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.out(out, x.shape[-1:])

    def _attend_pages(
        self, query: Array, memory: Memory, pages: Pages, key_bias: Float[Array, "B K"] | None
    ) -> Float[Array, "B Q H d"]:
        batch, groups, slots, width = memory.keys.shape
        if slots % pages.size:
            raise ValueError(f"a memory of {slots} slots is not made of pages of {pages.size}")
        # Pages of a row are its cache in another shape; nothing is copied.
        shape = (batch, groups, slots // pages.size, pages.size)
        bias = None
        if key_bias is not None:
            bias = jnp.broadcast_to(key_bias[:, None], (batch, groups, slots)).reshape(shape)
        return sparse_decode_attention(
            query,
            memory.keys.reshape(*shape, width),
            memory.values.reshape(*shape, width),
            pages.numbers,
            pages.lengths,
            bias=bias,
            sinks=jnp.zeros(query.shape[2]) if self.softmax == "off_by_one" else None,
            scale=self.scale,
            implementation=self.implementation,
        )[0]

    def _linear(self, axes: tuple[str, ...], use_bias: bool, init: Initializer | None = None) -> nn.Module:
        return self.parts.projection(
            axes,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=init or self.kernel_init,
        )

    def _keys_values(self, context: Float[Array, "B K D"]) -> tuple[Float[Array, "B K G d"], Float[Array, "B K G d"]]:
        sizes = self._sizes(context, self.kv_heads or self.heads)
        return self.key(context, sizes), self.value(context, sizes)

    def _sizes(self, x: Array, heads: int) -> tuple[int, int]:
        """Heads and head width."""
        if self.head_dim is None and x.shape[-1] % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {x.shape[-1]}; set head_dim")
        return heads, self.head_dim or x.shape[-1] // self.heads

    def _rotate(self, x: Float[Array, "B N H d"], positions: Num[Array, "b N"] | None) -> Float[Array, "B N H d"]:
        if not self.rotary:
            return x
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        return rotate(x, positions, base=self.rotary_base, scaling=self.rotary_scaling)


def _check_signals(signals: tuple[str, ...], causal: bool) -> None:
    if unknown := sorted(set(signals) - set(SIGNALS)):
        raise ValueError(f"attention cannot hand out {unknown}; it has {SIGNALS}")
    if causal and "cls_attention" in signals:
        raise ValueError("cls_attention is the row of token 0, which sees only itself under a causal mask")


def _check_sparse(signals: tuple[str, ...], bias: Array | PositionBias | None) -> None:
    if bias is not None:
        raise ValueError(f"lists of blocks take a bias on keys (key_bias) and none on pairs; got bias {bias.shape}")
    if dense := sorted(_OF_THE_MAP & set(signals)):
        raise ValueError(
            f"{dense} are parts of the dense map, of which lists of blocks compute a part; ask without block_index"
        )


def _attention_signals(
    query: Array,
    key: Array,
    signals: tuple[str, ...],
    weight: Array | None,
    lse: Array | None,
    implementation: str | None,
    options: dict,
) -> dict[str, Array]:
    """The signals that come from the map itself, each with as much of the map as it needs."""
    handed = {}
    if "cls_attention" in signals:
        bias = options["bias"]
        if bias is not None:
            bias = bias.queries(slice(1)) if isinstance(bias, PositionBias) else bias[:, :, :1]
        first = {**options, "bias": bias}
        row = attention_column_stats(query[:, :1], key, implementation=implementation, **first)
        handed["cls_attention"] = jnp.mean(row, axis=1)
    if "column_sums" in signals:
        given = {"query_weight": weight, "lse": lse, "implementation": implementation}
        sums = attention_column_stats(query, key, **given, **options)
        handed["column_sums"] = jnp.mean(sums, axis=1)
    if "attention" in signals:
        handed["attention"] = attention_map(query, key, **options)
    return handed
