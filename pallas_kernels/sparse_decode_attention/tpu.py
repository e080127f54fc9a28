# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding on the TPU: listed pages are copied into on-chip memory block by block, two blocks ahead of the work.

The list is prefetched into scalar memory and every page is a copy of its own, all of a block under way at once; a later block
may belong to the next key head, or the next sequence, so that only the very first one is waited for. Blocks past a list's end
do not exist: neither copies nor work. Copies are started by hand, as the grid's own pipeline would need an input for every page
and spends more than a hundred cycles on each in every step. To start one takes half a dozen scalar operations; those of a whole
block stand in one region with the products of another, whose vector work they leave alone.

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

# Keys of a block: a copy long enough to hide its latency and a block's fixed work; as much for values.
BLOCK_BYTES = 2**20
# Blocks in on-chip memory: one that is worked, one that arrives, and one whose copies are started in the shadow of the work.
_BUFFERS = 3
# Slots whose values are cleared at a time, as much as a list ends in.
_CLEARED = 256
# Pages of a block that is not whole whose copies are started without a loop.
_RUN = 8


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
    buffers = [pltpu.VMEM((many * slots, width), key_pages.dtype)] * _BUFFERS
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
            scratch_shapes=[
                buffers,
                buffers,
                pltpu.SemaphoreType.DMA((2, _BUFFERS)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SMEM((3,), jnp.int32),
            ],
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
    blocks = 2 * (_BUFFERS + 1) * many * vmem.size((slots, width), query.dtype)
    scores = 4 * vmem.size((rows, many * slots), jnp.float32)
    own = 6 * groups * vmem.size((rows, max(width, 128)), jnp.float32)
    vmem.check("sparse_decode_attention", blocks + scores + own, "use smaller pages or fewer query rows")


def _kernel(pages_ref, lengths_ref, query_ref, peak_ref, total_ref, *refs, lists, scale, biased):
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    *pools, out_ref, lse_ref, key_buffers, value_buffers, arrived, turn, ahead = refs
    row, groups = pl.program_id(0), query_ref.shape[1]
    copies = _Copies(lists, pages_ref, lengths_ref, tuple(pools), (key_buffers, value_buffers), arrived, ahead)

    @pl.when(row == 0)
    def _():
        turn[0] = 0
        copies.rewind()
        for buffer in range(_BUFFERS - 1):
            copies.start(buffer)
            copies.advance()

    def one_list(g, _):
        length = copies.length(row, g)

        def block(place, state):
            live = length - place * lists.block
            bias = bias_ref[0, g, pl.ds(place, 1), :] if biased else None

            def from_buffer(buffer, state):
                copies.wait(live, buffer)
                keys, values = key_buffers[buffer], value_buffers[buffer]
                _clear_end(values, live, lists)

                def attend(start, state):
                    # The buffer of the block before this one is free.
                    start((buffer + _BUFFERS - 1) % _BUFFERS)
                    return _attend(state, query_ref[0, g], keys[...], values[...], bias, live, scale)

                beside, before = (functools.partial(attend, start) for start in (copies.start_whole, copies.start))
                return jax.lax.cond(copies.whole(), beside, before, state)

            own = turn[0]
            turn[0] = jnp.where(own == _BUFFERS - 1, 0, own + 1)
            # A buffer that is named in the program is known to be another one than that which copies go to.
            state = jax.lax.switch(own, [functools.partial(from_buffer, buffer) for buffer in range(_BUFFERS)], state)
            copies.advance()
            return state

        state = (peak_ref[0, g], total_ref[0, g], jnp.zeros(query_ref.shape[2:], jnp.float32))
        peak, total, sums = jax.lax.fori_loop(0, copies.blocks(row, g), block, state)
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
    """Copies of listed pages into on-chip memory, a buffer for each block under way.

    `ahead` holds the sequence, the key head and the place in its list of the block that is copied next.
    """

    lists: _Lists
    pages: Any
    lengths: Any
    pools: tuple[Any, Any]
    buffers: tuple[Any, Any]
    arrived: Any
    ahead: Any

    def _list(self, b, g):
        return b * self.lists.heads + (g if self.lists.heads > 1 else 0)

    def length(self, b, g):
        """Tokens listed."""
        return self.lengths[self._list(b, g)]

    def blocks(self, b, g):
        """Blocks of a list: an empty one has one without a page."""
        return jnp.maximum(pl.cdiv(self.length(b, g), self.lists.block), 1)

    def rewind(self):
        """The very first block comes next."""
        for state in range(3):
            self.ahead[state] = 0

    def advance(self):
        """The block after the next one comes next; it may be another key head's, or another sequence's."""
        b, g, place = (self.ahead[state] for state in range(3))
        ended = (b < pl.num_programs(0)) & (place + 1 >= self.blocks(jnp.minimum(b, pl.num_programs(0) - 1), g))
        over = ended & (g + 1 == self.lists.groups)
        self.ahead[0] = jnp.where(over, b + 1, b)
        self.ahead[1] = jnp.where(over, 0, jnp.where(ended, g + 1, g))
        self.ahead[2] = jnp.where(ended, 0, place + 1)

    def _count(self):
        """Pages of the next block, more than a block's where others follow; none after the last sequence."""
        b, g, place = (self.ahead[state] for state in range(3))
        there = b < pl.num_programs(0)
        length = self.length(jnp.where(there, b, 0), g)
        return jnp.where(there, pl.cdiv(length, self.lists.slots) - place * self.lists.many, 0)

    def whole(self):
        """Whether the next block is a whole one."""
        return self._count() >= self.lists.many

    def start_whole(self, buffer):
        """Starts all copies of a whole block, which the compiler can put beside other work: there is no branch."""
        one = self._page(buffer)
        for page in range(self.lists.many):
            one(page)

    def start(self, buffer):
        """Starts all copies of the next block."""
        one, count = self._page(buffer), jnp.minimum(self._count(), self.lists.many)

        def several(run, _):
            for page in range(_RUN):
                one(run * _RUN + page)

        jax.lax.fori_loop(0, count // _RUN, several, None)
        jax.lax.fori_loop(count // _RUN * _RUN, count, lambda page, _: one(page), None)

    def _page(self, buffer):
        """What starts the copies of one page of the next block."""
        b, g, place = (self.ahead[state] for state in range(3))
        first = self._list(b, g) * self.lists.listed + place * self.lists.many

        def one(page):
            number = self.pages[first + page]
            if self.lists.heads == 1:
                number += g * self.lists.there
            target = pl.ds(page * self.lists.slots, self.lists.slots)
            for kind in range(2):
                held = self.buffers[kind][buffer].at[target]
                pltpu.make_async_copy(self.pools[kind].at[number], held, self.arrived.at[kind, buffer]).start()

        return one

    def wait(self, live, buffer):
        """Waits for all copies of a block of `live` tokens and more."""

        def pages(begin, count):
            # A semaphore counts bytes, so that several pages are waited for in one piece.
            piece = pl.ds(begin * self.lists.slots, count * self.lists.slots)
            for kind, held in enumerate(self.buffers):
                part = held[buffer].at[piece]
                pltpu.make_async_copy(part, part, self.arrived.at[kind, buffer]).wait()

        count, many = pl.cdiv(live, self.lists.slots), self.lists.many
        pl.when(count >= many)(functools.partial(pages, 0, many))

        @pl.when(count < many)
        def _():
            jax.lax.fori_loop(0, count, lambda page, _: pages(page, 1), None)


def _clear_end(values, live, lists):
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
        held = values[pl.ds(start, piece)]
        real = start + jax.lax.broadcasted_iota(jnp.int32, held.shape, 0) < live
        values[pl.ds(start, piece)] = jnp.where(real, held.astype(jnp.float32), 0.0).astype(held.dtype)

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
