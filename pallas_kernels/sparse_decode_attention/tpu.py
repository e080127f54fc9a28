# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding on the TPU: a step copies a block of listed pages into on-chip memory while the block before it is worked.

The list is prefetched into scalar memory and every page is a copy of its own, all of a block under way at once; the next block
may belong to the next key head, or the next sequence, so that only the very first one is waited for. Blocks past a list's end
do not exist: neither copies nor work. Copies are started by hand, as the grid's own pipeline would need an input for every page
and spends more than a hundred cycles on each in every step.

Shapes: B batch, G key heads, R rows that share keys, d head width, P pages, S slots of a page, L pages listed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem
from pallas_kernels.sparse_decode_attention import reference, xla

# Keys of a block: a copy long enough to hide its latency and a block's fixed work, twice for values, twice for the next block.
BLOCK_BYTES = 2**20
# Slots whose values are cleared at a time, as much as a list ends in.
_CLEARED = 256
# Pages whose copies are started and waited for without a loop.
_RUN = 32


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
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Online softmax over blocks of several pages."""
    groups, _, slots, width = key_pages.shape[-4:]
    stacked = xla.stack(query, groups)
    batch, _, rows, _ = stacked.shape
    heads, listed = pages.shape[1], pages.shape[2]
    many = block_pages(slots, width, key_pages.dtype, listed)
    _check(query, key_pages, pages, rows, many)
    fixed = [stacked, *(jnp.broadcast_to(state, (batch, groups, rows, 1)) for state in xla.start(sinks, stacked.shape))]
    if bias is not None:
        # A hundredth of the keys' bytes: gathered outside, where it makes one row of lanes for each block.
        own_bias = reference.gather(bias.astype(jnp.float32), pages, key_pages.ndim == 5).reshape(batch, groups, 1, -1)
        blocks = pl.cdiv(listed, many)
        own_bias = jnp.pad(own_bias, ((0, 0), (0, 0), (0, 0), (0, (blocks * many - listed) * slots)))
        fixed.append(own_bias.reshape(batch, groups, blocks, many * slots))

    def row(shape):
        return pl.BlockSpec((1, *shape[1:]), lambda b, *_: (b, 0, 0, 0))

    lists = _Lists(heads, groups, listed, many, slots, key_pages.shape[-3])
    kernel = functools.partial(_kernel, lists=lists, scale=scale, biased=bias is not None)
    pools = [pool.reshape(-1, slots, width) for pool in (key_pages, value_pages)]
    buffer = pltpu.VMEM((2, many * slots, width), key_pages.dtype)
    out, lse = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(stacked.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, groups, rows, 1), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[row(array.shape) for array in fixed] + 2 * [pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[row(stacked.shape), row((batch, groups, rows, 1))],
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2)), pltpu.SMEM((1,), jnp.int32)],
        ),
        # Blocks go over from one sequence to the next, so that sequences are worked in order.
        # Page numbers within a length are the caller's promise, as for every listed page: checks of them cost half of a copy.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="sparse_decode_attention",
    )(_places(pages, key_pages).reshape(-1), lengths.reshape(-1), *fixed, *pools)
    return xla.unstack(out, query.shape), xla.unstack(lse, (*query.shape[:3], 1))[..., 0]


def block_pages(slots: int, width: int, dtype: Any, listed: int) -> int:
    """Pages a block: about `BLOCK_BYTES` of keys, so that the blocks of a full list are alike."""
    return pl.cdiv(listed, pl.cdiv(listed, max(BLOCK_BYTES // vmem.size((slots, width), dtype), 1)))


def _places(pages: Int[Array, "B g L"], pool: Array) -> Int[Array, "B g L"]:
    """Pages by their place in the whole cache, as every operation on scalars counts; that of key head 0 for shared lists."""
    groups, there = pool.shape[-4:-2]
    rows = jnp.arange(pages.shape[0])[:, None, None] * groups if pool.ndim == 5 else 0
    return pages + there * (rows + jnp.arange(pages.shape[1])[:, None])


def _check(query: Array, key_pages: Array, pages: Array, rows: int, many: int) -> None:
    """Raises `NotImplementedError` for what the kernel cannot take."""
    groups, _, slots, width = key_pages.shape[-4:]
    if query.dtype != key_pages.dtype or query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"sparse_decode_attention takes a query and a cache both of float32 or both of bfloat16; got {query.dtype} and "
            f"{key_pages.dtype}"
        )
    tile = 16 if query.dtype == jnp.bfloat16 else 8
    if slots % tile:
        nearest = (*key_pages.shape[:-2], -(-slots // tile) * tile, width)
        raise NotImplementedError(
            f"sparse_decode_attention needs pages of a multiple of {tile} slots in {query.dtype}; got {key_pages.shape}, the "
            f"nearest is {nearest}"
        )
    table = 4 * pages.size
    if table > vmem.SCALAR_BUDGET:
        raise NotImplementedError(
            f"a list of {pages.shape} pages takes {table} bytes of scalar memory, more than {vmem.SCALAR_BUDGET}; the nearest "
            f"that fits lists {vmem.SCALAR_BUDGET // (4 * pages.shape[0] * pages.shape[1])} pages for each head"
        )
    blocks = 6 * many * vmem.size((slots, width), query.dtype)
    scores = 4 * vmem.size((rows, many * slots), jnp.float32)
    own = 6 * groups * vmem.size((rows, max(width, 128)), jnp.float32)
    vmem.check("sparse_decode_attention", blocks + scores + own, "use smaller pages or fewer query rows")


def _kernel(pages_ref, lengths_ref, query_ref, peak_ref, total_ref, *refs, lists, scale, biased):
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    *pools, out_ref, lse_ref, key_buffer, value_buffer, arrived, turn = refs
    row, groups = pl.program_id(0), query_ref.shape[1]
    copies = _Copies(lists, pages_ref, lengths_ref, tuple(pools), (key_buffer, value_buffer), arrived)

    @pl.when(row == 0)
    def _():
        turn[0] = 0
        copies.start(0, 0, 0, 0)

    def one_list(g, _):
        length, last = copies.length(row, g), copies.blocks(row, g) - 1

        def block(place, state):
            buffer = turn[0]
            turn[0] = 1 - buffer
            _start_next(copies, row, g, place, last, 1 - buffer)
            copies.wait(row, g, place, buffer)
            first = place * lists.block
            _clear_end(value_buffer, buffer, length - first, lists)
            bias = bias_ref[0, g, pl.ds(place, 1), :] if biased else None
            return _attend(
                state, query_ref[0, g], key_buffer[buffer], value_buffer[buffer], bias, length - first, scale
            )

        state = (peak_ref[0, g], total_ref[0, g], jnp.zeros(query_ref.shape[2:], jnp.float32))
        peak, total, sums = jax.lax.fori_loop(0, last + 1, block, state)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[0, g] = (sums / safe).astype(out_ref.dtype)
        lse_ref[0, g] = jnp.where(some, peak + jnp.log(safe), -jnp.inf)

    jax.lax.fori_loop(0, groups, one_list, None)


@dataclasses.dataclass(frozen=True)
class _Lists:
    """Sizes of lists.

    Attributes:
      heads: lists of a sequence, one for each key head or one for all. groups: key heads. listed: pages of a list.
      many: pages of a block. slots: of a page. there: pages of a key head in the cache.
    """

    heads: int
    groups: int
    listed: int
    many: int
    slots: int
    there: int

    @property
    def block(self) -> int:
        """Slots of a block."""
        return self.many * self.slots


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Copies of listed pages into on-chip memory, one of two buffers at a time.

    Sequence `b`, key head `g` and block `place` of its list say which pages.
    """

    lists: _Lists
    pages: Any
    lengths: Any
    pools: tuple[Any, Any]
    buffers: tuple[Any, Any]
    arrived: Any

    def _list(self, b, g):
        return b * self.lists.heads + (g if self.lists.heads > 1 else 0)

    def length(self, b, g):
        """Tokens listed."""
        return self.lengths[self._list(b, g)]

    def blocks(self, b, g):
        """Blocks of a list: an empty one has one without a page."""
        return jnp.maximum(pl.cdiv(self.length(b, g), self.lists.block), 1)

    def start(self, b, g, place, buffer):
        """Starts all copies of a block."""
        first = self._list(b, g) * self.lists.listed + place * self.lists.many

        def one(page):
            number = self.pages[first + page]
            if self.lists.heads == 1:
                number += g * self.lists.there
            target = pl.ds(page * self.lists.slots, self.lists.slots)
            for kind in range(2):
                held = self.buffers[kind].at[buffer, target]
                pltpu.make_async_copy(self.pools[kind].at[number], held, self.arrived.at[kind, buffer]).start()

        def several(begin, end):
            for page in range(begin, end):
                one(page)

        self._for_pages(b, g, place, one, several)

    def wait(self, b, g, place, buffer):
        """Waits for all copies of a block."""

        def pages(begin, count):
            # A semaphore counts bytes, so that several pages are waited for in one piece.
            piece = pl.ds(begin * self.lists.slots, count * self.lists.slots)
            for kind, held in enumerate(self.buffers):
                pltpu.make_async_copy(
                    held.at[buffer, piece], held.at[buffer, piece], self.arrived.at[kind, buffer]
                ).wait()

        self._for_pages(b, g, place, lambda page: pages(page, 1), lambda begin, end: pages(begin, end - begin))

    def _for_pages(self, b, g, place, one, several):
        """`several(begin, end)` for runs of pages of a block, `one(page)` for those of a run that is cut short."""
        count = pl.cdiv(self.length(b, g), self.lists.slots) - place * self.lists.many
        for begin in range(0, self.lists.many, _RUN):
            end = min(begin + _RUN, self.lists.many)
            pl.when(count >= end)(functools.partial(several, begin, end))

            @pl.when((count > begin) & (count < end))
            def _(begin=begin):
                jax.lax.fori_loop(begin, count, lambda page, _: one(page), None)


def _start_next(copies, row, g, place, last, buffer):
    """Starts the copies of the block after this one, which may be the next key head's or the next sequence's."""
    ended = place == last
    after = jnp.where(ended, g + 1, g)
    over = after == copies.lists.groups
    b, g = jnp.where(over, row + 1, row), jnp.where(over, 0, after)

    @pl.when(b < pl.num_programs(0))
    def _():
        copies.start(b, g, jnp.where(ended, 0, place + 1), buffer)


def _clear_end(value_buffer, buffer, live, lists):
    """Zeros for values past the `live` ones of a block, some pages at a time."""
    pages = max(
        count
        for count in range(1, lists.many + 1)
        if lists.many % count == 0 and count <= max(_CLEARED // lists.slots, 1)
    )
    piece = pages * lists.slots

    def clear(index, _):
        # The end of the last page, and what no page was copied to, may hold anything, nan too, and 0 * nan is nan.
        start = pl.multiple_of(index * piece, piece)
        values = value_buffer[buffer, pl.ds(start, piece)]
        real = start + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < live
        value_buffer[buffer, pl.ds(start, piece)] = jnp.where(real, values.astype(jnp.float32), 0.0).astype(
            values.dtype
        )

    jax.lax.fori_loop(live // piece, lists.many // pages, clear, None)


def _attend(state, query, keys, values, bias, live, scale):
    """Peak, total and sums of an online softmax after one more block, of which `live` slots count."""
    peak, total, sums = state
    logits = _dot(query, keys, 1) * scale
    if bias is not None:
        logits += bias
    logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < live, logits, -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
    # Without any key so far the peak is -inf, and -inf less -inf is nan.
    safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
    weights, kept = jnp.exp(logits - safe), jnp.exp(peak - safe)
    total = total * kept + jnp.sum(weights, axis=1, keepdims=True)
    return new_peak, total, sums * kept + _dot(weights.astype(values.dtype), values, 0)


def _dot(left: Array, right: Array, contract: int) -> Array:
    """A product summed in float32 over the last axis of `left` and axis `contract` of `right`."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
