# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding for GPUs, through Triton: lists are split, so that all processors read a share of them, and joined again.

A program owns the query rows of one key head and a run of its listed slots, and gathers a tile of them a turn by their numbers,
so that pages may have any number of slots, one included. Runs divide the length of a list, not its capacity, so the bytes read
follow the sum of all lists. Partial outputs are joined by their log-sum-exp in plain JAX.

Shapes: B batch, T query rows, H heads, G key heads, R = T H / G rows that share keys (Q with padding), d head width, P pages, S
slots of a page, L pages listed, C runs of a list.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import guarded
from pallas_kernels.block_sparse_attention.gpu_parts import LN2, LOG2E, LOWEST, SMALLEST, product
from pallas_kernels.sparse_decode_attention.xla import stack, unstack

# Slots of a turn: 32 KB at a width of 128 in bfloat16. Page numbers travel before what they point to, so five stages are two
# turns on their way; times three programs that fit a processor, that is several times its share of what the memory of an H200
# delivers in its latency of a microsecond, 36 KB.
_TILE = 64
_STAGES, _WARPS = 5, 4
# Programs that are wanted: as many as run at once, three on each of 132 processors; and the fewest slots of a run, so that
# writing and joining its output is little beside reading them.
_PROGRAMS, _RUN = 396, 256
# Rows and widths that fit the registers.
_ROWS, _WIDTH = 64, 256


def sparse_decode_attention(
    query: Float[Array, "B T H d"],
    key_pages: Float[Array, "*b G P S d"],
    value_pages: Float[Array, "*b G P S d"],
    pages: Int[Array, "B g L"],
    lengths: Int[Array, "B g"],
    *,
    bias: Float[Array, "*b G P S"] | None,
    sinks: Float[Array, " H"] | None,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Online softmax in float32; products in the dtype of the pages.

    Raises:
      NotImplementedError: heads wider than 256, more than 64 query rows that share a key head, or 2^31 numbers in the cache.
    """
    (groups, count, slots, width), (batch, _, listed) = key_pages.shape[-4:], pages.shape
    if width > _WIDTH:
        raise NotImplementedError(f"the GPU kernel takes heads of up to {_WIDTH}; got pages {key_pages.shape}")
    stacked = stack(query, groups).astype(key_pages.dtype)
    rows = stacked.shape[2]
    if rows > _ROWS:
        raise NotImplementedError(f"the GPU kernel takes up to {_ROWS} query rows that share a key head; got {rows}")
    tall, wide = (max(SMALLEST, pl.next_power_of_2(size)) for size in (rows, width))
    runs = max(1, min(_PROGRAMS // (batch * groups), listed * slots // _RUN))
    args = {
        "query": jnp.pad(stacked, ((0, 0), (0, 0), (0, tall - rows), (0, wide - width))),
        "key": key_pages.reshape(-1, groups, count * slots, width),
        "value": value_pages.reshape(-1, groups, count * slots, width),
        "pages": pages,
        "lengths": lengths,
    }
    guarded.addressable("sparse_decode_attention", args)
    own = 1 if pages.shape[1] > 1 else 0
    # A cache of each row's own, or one pool for all.
    apart = 1 if key_pages.ndim == 5 else 0
    # Wider than the pages where their width is no power of two; what lies beyond is never read.
    pool = pl.BlockSpec((None, None, count * slots, wide), lambda run, group, row: (row * apart, group, 0, 0))
    specs = {
        "query": pl.BlockSpec((None, None, tall, wide), lambda run, group, row: (row, group, 0, 0)),
        "key": pool,
        "value": pool,
        "pages": pl.BlockSpec((None, None, listed), lambda run, group, row: (row, group * own, 0)),
        "lengths": pl.BlockSpec(lengths.shape, lambda run, group, row: (0, 0)),
    }
    if bias is not None:
        args["bias"] = bias.astype(jnp.float32).reshape(-1, groups, count * slots) * LOG2E
        specs["bias"] = pl.BlockSpec((None, None, count * slots), lambda run, group, row: (row * apart, group, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, slots=slots, rows=rows, width=width, own=own, factor=scale * LOG2E),
        grid=(runs, groups, batch),
        in_specs=[specs],
        out_specs=[
            pl.BlockSpec((None, None, None, tall, wide), lambda run, group, row: (row, group, run, 0, 0)),
            pl.BlockSpec((None, None, None, tall), lambda run, group, row: (row, group, run, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, runs, tall, wide), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, runs, tall), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="sparse_decode_attention",
    )(args)
    out, lse = _join(out[:, :, :, :rows, :width], lse[:, :, :, :rows], sinks)
    return unstack(out, query.shape).astype(query.dtype), unstack(lse, (*query.shape[:3], 1))[..., 0]


def _kernel(
    refs: dict[str, Any], out_ref: Any, lse_ref: Any, *, slots: int, rows: int, width: int, own: int, factor: float
) -> None:
    run, group, row = (pl.program_id(axis) for axis in range(3))
    length = refs["lengths"][row, group * own]
    turns = jax.lax.div(length + _TILE - 1, _TILE)
    share = jax.lax.div(turns + pl.num_programs(0) - 1, pl.num_programs(0))
    query = refs["query"][...]
    tall, wide = query.shape

    def turn(step: Any, state: Any) -> Any:
        peak, total, out = state
        slot = step * _TILE + jax.lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
        live = slot < length
        # What is listed past the length may be any number: nothing is read there.
        page = jnp.where(live, refs["pages"][jnp.where(live, jax.lax.div(slot, slots), 0)], 0)
        place = page * slots + jax.lax.rem(slot, slots)
        columns = jax.lax.broadcasted_iota(jnp.int32, (_TILE, wide), 1)
        mask = jnp.broadcast_to(live[:, None], columns.shape)
        if width < wide:
            mask &= columns < width
        at = jnp.broadcast_to(place[:, None], columns.shape), columns
        key, value = (guarded.take(refs[name].at[at], mask) for name in ("key", "value"))
        logits = product(query, key, 1, 1) * factor
        if "bias" in refs:
            logits += refs["bias"][place][None, :]
        logits = jnp.where(live[None, :], logits, -jnp.inf)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(peak - higher)
        fresh = product(weights.astype(value.dtype), value, 1, 0)
        return higher, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + fresh

    state = (
        jnp.full((tall,), LOWEST, jnp.float32),
        jnp.zeros((tall,), jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    peak, total, out = jax.lax.fori_loop(run * share, jnp.minimum((run + 1) * share, turns), turn, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    real = jax.lax.broadcasted_iota(jnp.int32, (tall,), 0) < rows
    guarded.put(out_ref, out / total[:, None], jnp.broadcast_to(real[:, None], out.shape))
    guarded.put(lse_ref, jnp.where(some, (peak + jnp.log2(total)) * LN2, -jnp.inf), real)


def _join(
    out: Float[Array, "B G C R d"], lse: Float[Array, "B G C R"], sinks: Float[Array, " H"] | None
) -> tuple[Float[Array, "B G R d"], Float[Array, "B G R 1"]]:
    """The output over all runs, and its log-sum-exp with the sinks."""
    total = jax.nn.logsumexp(lse, axis=2)
    if sinks is not None:
        own = sinks.astype(jnp.float32).reshape(lse.shape[1], -1)
        total = jnp.logaddexp(total, jnp.tile(own, (1, lse.shape[3] // own.shape[1])))
    # A run without a key has weight 0, and so has a row without any.
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(total), 0.0, total)[:, :, None])
    return jnp.sum(out * weights[..., None], axis=2), total[..., None]
