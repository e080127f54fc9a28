# SPDX-License-Identifier: Apache-2.0
"""Biased attention and its column statistics by the kernels of block-sparse attention, over the list of all blocks.

A dense kernel of its own would do the same work: lists cost a few scalar instructions a block, and a causal mask is the list of
blocks up to the diagonal. The column statistics are a second pass over the keys, with weights computed again from the
log-sum-exp of the first, since a weight is only known when its row is done.

Shapes: B batch, Q queries, K keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import partition
from pallas_kernels.biased_flash_attention import xla
from pallas_kernels.biased_flash_attention.settings import Settings
from pallas_kernels.block_sparse_attention.autodiff import Passes, attend
from pallas_kernels.block_sparse_attention.index import BlockIndex, from_block_mask
from pallas_kernels.position_bias import PositionBias

LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a platform.

    Attributes:
      platform: for messages.
      forward, backward: of block-sparse attention.
      columns: `(query, key, index, key_bias, lse, query_weight, *, causal, scale, statistic, bias, interpret)`, statistics
        `[B, H, K]` of the weights given the log-sum-exp `[B, H, Q]` of rows in base 2.
      block: number of rows, or of keys, to the size of their blocks.
    """

    platform: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    columns: Callable[..., Array]
    block: Callable[[int], int]

    def biased_attention(
        self,
        query: Float[Array, "B Q H d"],
        key: Float[Array, "B K G d"],
        value: Float[Array, "B K G d"],
        settings: Settings,
        interpret: Any = False,
    ) -> tuple[Float[Array, "B Q H d"], Float[Array, "B H Q"]]:
        """Outputs and log-sum-exp. Softmax in float32; products in the dtype of `query` with float32 accumulation.

        Raises:
          NotImplementedError: a `bias` of all pairs, values of another width than keys, or shapes that kernels cannot take.
        """
        self._refuse(settings.bias)
        if value.shape != key.shape:
            raise NotImplementedError(f"values {value.shape} must be as wide as keys {key.shape}")
        positions, whole = _split(settings.bias, query.shape[0])
        static = (settings.causal, settings.softmax, settings.scale, interpret)
        attended = partition.by_batch(functools.partial(self._attend, static))
        return attended(query, key, value, settings.key_bias, positions, whole=whole)

    def _attend(
        self,
        static: tuple,
        query: Array,
        key: Array,
        value: Array,
        key_bias: Array | None,
        positions: Any,
        whole: PositionBias | None = None,
    ) -> tuple[Array, Array]:
        causal, softmax, scale, interpret = static
        index = self.all_blocks(query.shape[1], key.shape[1], causal)
        bias = None if whole is None else whole.joined(*positions)
        options = (key_bias, _sinks(query, softmax), bias)
        return attend(_passes(self, interpret), causal, scale, query, key, value, index, *options)

    def attention_column_stats(
        self,
        query: Float[Array, "B Q H d"],
        key: Float[Array, "B K G d"],
        settings: Settings,
        query_weight: Float[Array, "B Q"] | None,
        statistic: str,
        lse: Float[Array, "B H Q"] | None,
        interpret: Any = False,
    ) -> Float[Array, "B H K"]:
        """A pass over the columns, after one for the log-sum-exp of rows where it is not given.

        The gradient is that of the plain form, all of it with respect to what the log-sum-exp is made from.

        Raises:
          NotImplementedError: a `bias` of all pairs, or shapes that the kernels cannot take.
        """
        self._refuse(settings.bias)
        static = (self, settings.causal, settings.softmax, settings.scale, statistic, interpret)

        def stats(*arrays: Any, whole: PositionBias | None = None) -> Array:
            *arrays, positions = arrays
            return _column_stats(static, *arrays, None if whole is None else whole.joined(*positions))

        positions, whole = _split(settings.bias, query.shape[0])
        return partition.by_batch(stats)(query, key, settings.key_bias, query_weight, lse, positions, whole=whole)

    def all_blocks(self, queries: int, keys: int, causal: bool) -> BlockIndex:
        """The list of all blocks, or of those up to the diagonal when `causal`, in the block sizes that suit the lengths."""
        block_q, block_k = self.block(queries), self.block(keys)
        first = np.arange(-(-keys // block_k))[None, :] * block_k
        last = np.minimum(np.arange(1, -(-queries // block_q) + 1)[:, None] * block_q, queries) - 1 + keys - queries
        mask = (first <= last) | (not causal)
        return from_block_mask(mask[None, None], queries=queries, keys=keys, block_q=block_q, block_k=block_k)

    def _refuse(self, bias: Array | PositionBias | None) -> None:
        if isinstance(bias, jax.Array | np.ndarray):
            raise NotImplementedError(
                f"a bias of all queries by all keys, {bias.shape}, has no {self.platform} kernel; key_bias and a "
                "PositionBias have"
            )


def _split(bias: PositionBias | None, batch: int) -> tuple[Any, PositionBias | None]:
    return (None, None) if bias is None else bias.split(batch)


def _sinks(query: Array, softmax: str) -> Array | None:
    return jnp.zeros(query.shape[2]) if softmax == "off_by_one" else None


@functools.cache
def _passes(kernels: Kernels, interpret: Any) -> Passes:
    """One object for each way to run, as the gradient rule is looked up by it."""
    return Passes(*(functools.partial(one, interpret=interpret) for one in (kernels.forward, kernels.backward)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _column_stats(
    static: tuple,
    query: Array,
    key: Array,
    key_bias: Array | None,
    query_weight: Array | None,
    lse: Array | None,
    bias: PositionBias | None,
) -> Array:
    kernels, causal, softmax, scale, statistic, interpret = static
    index = kernels.all_blocks(query.shape[1], key.shape[1], causal)
    options = dict(causal=causal, scale=scale, bias=bias, interpret=interpret)
    if lse is None:
        # The output of the first pass is not used; keys stand in for values.
        _, lse = kernels.forward(query, key, key, index, key_bias, _sinks(query, softmax), **options)
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E
    return kernels.columns(query, key, index, key_bias, lse, query_weight, statistic=statistic, **options)


def _stats_forward(static: tuple, *args: Any) -> tuple[Array, Any]:
    return _column_stats(static, *args), args


def _stats_backward(static: tuple, args: Any, cotangent: Array) -> tuple[Any, ...]:
    _, causal, softmax, scale, statistic, _ = static
    *arrays, _, bias = args

    def plain(table: Array | None, query: Array, key: Array, key_bias: Array | None, weight: Array | None) -> Array:
        own = None if bias is None else dataclasses.replace(bias, table=table)
        return xla.attention_column_stats(
            query, key, Settings(key_bias, own, causal, softmax, scale), weight, statistic, None
        )

    dtable, *grads = jax.vjp(plain, None if bias is None else bias.table, *arrays)[1](cotangent)
    return (*grads, None, None if bias is None else bias.gradient(dtable))


_column_stats.defvjp(_stats_forward, _stats_backward)
