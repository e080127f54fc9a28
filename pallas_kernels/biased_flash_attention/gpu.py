# SPDX-License-Identifier: Apache-2.0
"""Biased attention and its column statistics for GPUs: the kernels of block-sparse attention over the list of all blocks.

A list costs one scalar load a block, and a causal mask is the list of blocks up to the diagonal, with a mask on the last ones
only. The column statistics are a second pass in which a program owns keys and walks the queries, with weights computed again
from the log-sum-exp of the first pass: half the products of that.

Shapes: B batch, Q queries, K keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.biased_flash_attention import xla
from pallas_kernels.block_sparse_attention import gpu as sparse
from pallas_kernels.block_sparse_attention import gpu_backward
from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention.autodiff import Passes, attend
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex, from_block_mask

# The tallest tile of the kernels.
_LARGEST = 128


def biased_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b H Q K"] | None,
    causal: bool,
    softmax: str,
    scale: float,
    interpret: Any = False,
) -> Float[Array, "B Q H d"]:
    """Softmax in float32; products in the dtype of `query` with float32 accumulation.

    Raises:
      NotImplementedError: a `bias`, values of another width than the keys, or heads wider than 256.
    """
    _refuse_bias(bias)
    if value.shape != key.shape:
        raise NotImplementedError(f"values {value.shape} must be as wide as keys {key.shape}")
    index = all_blocks(query.shape[1], key.shape[1], causal)
    return attend(_passes(interpret), causal, scale, query, key, value, index, key_bias, _sinks(query, softmax))[0]


def attention_column_stats(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b H Q K"] | None,
    causal: bool,
    softmax: str,
    scale: float,
    query_weight: Float[Array, "B Q"] | None,
    statistic: str,
    interpret: Any = False,
) -> Float[Array, "B H K"]:
    """Two passes, one for the log-sum-exp of rows and one for the columns; the gradient is that of the plain form.

    Raises:
      NotImplementedError: a `bias`, or heads wider than 256.
    """
    _refuse_bias(bias)
    return _column_stats((causal, softmax, scale, statistic, interpret), query, key, key_bias, query_weight)


def all_blocks(queries: int, keys: int, causal: bool) -> BlockIndex:
    """The list of all blocks, or of those up to the diagonal when `causal`, in blocks as large as tiles and lengths allow."""
    block_q, block_k = (min(_LARGEST, max(parts.SMALLEST, pl.next_power_of_2(length))) for length in (queries, keys))
    first = np.arange(-(-keys // block_k))[None, :] * block_k
    last = np.minimum(np.arange(1, -(-queries // block_q) + 1)[:, None] * block_q, queries) - 1 + keys - queries
    mask = (first <= last) | (not causal)
    return from_block_mask(mask[None, None], queries=queries, keys=keys, block_q=block_q, block_k=block_k)


def _refuse_bias(bias: Array | None) -> None:
    if bias is not None:
        raise NotImplementedError(f"a bias of all queries by all keys, {bias.shape}, has no GPU kernel; key_bias has")


def _sinks(query: Array, softmax: str) -> Array | None:
    return jnp.zeros(query.shape[2]) if softmax == "off_by_one" else None


@functools.cache
def _passes(interpret: Any) -> Passes:
    """One object for each way to run, as the gradient rule is looked up by it."""
    forward, backward = sparse.forward, gpu_backward.backward
    return Passes(*(functools.partial(one, interpret=interpret) for one in (forward, backward)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _column_stats(static: tuple, query: Array, key: Array, key_bias: Array | None, query_weight: Array | None) -> Array:
    causal, softmax, scale, statistic, interpret = static
    index = all_blocks(query.shape[1], key.shape[1], causal)
    options = dict(causal=causal, scale=scale, interpret=interpret)
    # The output of the first pass is not used; keys stand in for values.
    _, lse = sparse.forward(query, key, key, index, key_bias, _sinks(query, softmax), **options)
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E
    return _columns(query, key, index.transposed(), key_bias, lse, query_weight, statistic=statistic, **options)


def _stats_forward(static: tuple, *args: Any) -> tuple[Array, Any]:
    return _column_stats(static, *args), args


def _stats_backward(static: tuple, args: Any, cotangent: Array) -> tuple[Any, ...]:
    causal, softmax, scale, statistic, _ = static

    def plain(query: Array, key: Array, key_bias: Array | None, query_weight: Array | None) -> Array:
        options = dict(bias=None, causal=causal, softmax=softmax, scale=scale, statistic=statistic)
        return xla.attention_column_stats(query, key, key_bias=key_bias, query_weight=query_weight, **options)

    return jax.vjp(plain, *args)[1](cotangent)


_column_stats.defvjp(_stats_forward, _stats_backward)


def _columns(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    back: BlockIndex,
    key_bias: Float[Array, "B K"] | None,
    lse: Float[Array, "B H Q"],
    query_weight: Float[Array, "B Q"] | None,
    *,
    causal: bool,
    scale: float,
    statistic: str,
    interpret: Any,
) -> Float[Array, "B H K"]:
    """Statistics of the weights given the log-sum-exp of rows in base 2; `back` lists the queries of keys."""
    (batch, rows, heads, width), (_, length, groups, _), dtype = query.shape, key.shape, query.dtype
    plan = parts.make_plan(back, *parts.sizes("forward", width, dtype))
    share = heads // groups
    weight = jnp.ones((batch, rows)) if query_weight is None else query_weight
    args = {
        "key": parts.padded(key, plan.own_length, dtype),
        "query": parts.padded(query, plan.listed_length, dtype),
        # Queries that fill up the last block have no weights.
        "lse": parts.last_padded(lse, plan.listed_length, jnp.inf),
        "weight": parts.last_padded(weight, plan.listed_length),
        **parts.lists(back, causal, own_queries=False),
    }
    wide = args["key"].shape[3]
    specs = {
        "key": pl.BlockSpec((None, plan.own, None, wide), lambda tile, head, i: (i, tile, head // share, 0)),
        "query": pl.BlockSpec((None, plan.listed_length, None, wide), lambda tile, head, i: (i, 0, head, 0)),
        "lse": pl.BlockSpec((None, None, plan.listed_length), lambda tile, head, i: (i, head, 0)),
        "weight": pl.BlockSpec((None, plan.listed_length), lambda tile, head, i: (i, 0)),
    }
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.own_length)
        specs["bias"] = pl.BlockSpec((None, plan.own), lambda tile, head, i: (i, tile))
    out = parts.call(
        functools.partial(_kernel, plan=plan, causal=causal, factor=scale * LOG2E, statistic=statistic),
        args,
        specs,
        plan,
        grid=(plan.tiles, heads, batch),
        out_specs=pl.BlockSpec((None, None, plan.own), lambda tile, head, i: (i, head, tile)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, plan.own_length), jnp.float32),
        interpret=interpret,
        name="attention_column_stats",
    )
    return out[..., :length]


def _kernel(refs: dict[str, Any], out_ref: Any, *, plan: Plan, causal: bool, factor: float, statistic: str) -> None:
    tile, head, row = (pl.program_id(axis) for axis in range(3))
    place = parts.place(refs["ids"], row, head, pl.num_programs(1), tile, plan)
    key = refs["key"][...]

    def work(number: Any, start: Any, mask: Any, masked: bool, total: Any) -> Any:
        rows = pl.ds(number * plan.listed_block + start, plan.listed)
        logits = parts.product(key, refs["query"][rows, :], 1, 1) * factor
        if "bias" in refs:
            logits += refs["bias"][...][:, None]
        if masked:
            pairs = parts.seen(refs, plan, tile * plan.own, number, start, mask, causal, False)
            logits = jnp.where(pairs, logits, -jnp.inf)
        weights = jnp.exp2(logits - refs["lse"][rows][None, :]) * refs["weight"][rows][None, :]
        if statistic == "max":
            return jnp.maximum(total, jnp.max(weights, axis=1))
        return total + jnp.sum(weights, axis=1)

    out_ref[...] = parts.walk(refs, place, plan, work, jnp.zeros((plan.own,), jnp.float32))
