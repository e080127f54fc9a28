# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding on the TPU: a step copies a block of listed pages into on-chip memory while the block before it is worked.

The list is prefetched into scalar memory and every page is a copy of its own, all of a block under way at once; the next block
may belong to the next key head, or the next sequence, so that only the very first one is waited for. Blocks past a list's end
do not exist: neither copies nor work. Copies are started by hand, as the grid's own pipeline would need an input for every page
and spends more than a hundred cycles on each in every step.

Shapes: B batch, G key heads, R rows that share keys, d head width, P pages, S slots of a page, L pages listed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem
from pallas_kernels.sparse_decode_attention import reference, xla

# Slots a block: at 128 x 2 bytes, keys and values are 1 MiB, a copy long enough to hide its latency and a block's fixed work.
_SLOTS = 2048
# Pages whose copies are started and waited for without a loop.
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
    many = block_pages(slots, listed)
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

    kernel = functools.partial(_kernel, heads=heads, listed=listed, many=many, scale=scale, biased=bias is not None)
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
    )(pages.reshape(-1), lengths.reshape(-1), *fixed, key_pages, value_pages)
    return xla.unstack(out, query.shape), xla.unstack(lse, (*query.shape[:3], 1))[..., 0]


def block_pages(slots: int, listed: int) -> int:
    """Pages a block: about `_SLOTS` slots' worth, so that the blocks of a full list are alike."""
    return pl.cdiv(listed, pl.cdiv(listed, max(_SLOTS // slots, 1)))


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


def _kernel(pages_ref, lengths_ref, query_ref, peak_ref, total_ref, *refs, heads, listed, many, scale, biased):
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    key_pages, value_pages, out_ref, lse_ref, key_buffer, value_buffer, arrived, turn = refs
    row, groups = pl.program_id(0), query_ref.shape[1]
    slots = key_buffer.shape[1] // many

    def own(b, g):
        return b * heads + (g if heads > 1 else 0)

    def blocks(b, g):
        # An empty list has one block without a page.
        return jnp.maximum(pl.cdiv(lengths_ref[own(b, g)], many * slots), 1)

    def copies(b, g, place, buffer, page):
        """Of the keys and the values of a page of a block."""
        number = pages_ref[own(b, g) * listed + place * many + page]
        source = (b, g, number) if len(key_pages.shape) == 5 else (g, number)
        target = (buffer, pl.ds(pl.multiple_of(page * slots, slots), slots))
        return [
            pltpu.make_async_copy(pool.at[source], held.at[target], arrived.at[kind, buffer])
            for kind, (pool, held) in enumerate(((key_pages, key_buffer), (value_pages, value_buffer)))
        ]

    def for_pages(b, g, place, work, several):
        """`several(first, end)` for runs of pages of a block, `work(page)` for those of a run that is cut short."""
        count = pl.cdiv(lengths_ref[own(b, g)], slots) - place * many
        for first in range(0, many, _RUN):
            end = min(first + _RUN, many)
            pl.when(count >= end)(functools.partial(several, first, end))

            @pl.when((count > first) & (count < end))
            def _(first=first):
                jax.lax.fori_loop(first, count, lambda page, _: work(page), None)

    def start(b, g, place, buffer):
        def work(page):
            for copy in copies(b, g, place, buffer, page):
                copy.start()

        def several(first, end):
            for page in range(first, end):
                work(page)

        for_pages(b, g, place, work, several)

    def wait(b, g, place, buffer):
        def work(page):
            for copy in copies(b, g, place, buffer, page):
                copy.wait()

        def several(first, end):
            # A semaphore counts bytes, so that a run is waited for in one piece.
            run = pl.ds(first * slots, (end - first) * slots)
            for kind, held in enumerate((key_buffer, value_buffer)):
                pltpu.make_async_copy(held.at[buffer, run], held.at[buffer, run], arrived.at[kind, buffer]).wait()

        for_pages(b, g, place, work, several)

    @pl.when(row == 0)
    def _():
        turn[0] = 0
        start(0, 0, 0, 0)

    def one_list(g, _):
        length, last = lengths_ref[own(row, g)], blocks(row, g) - 1

        def block(place, state):
            peak, total, sums = state
            buffer = turn[0]
            turn[0] = 1 - buffer
            ended = place == last
            after = jnp.where(ended, g + 1, g)
            b, g_next = jnp.where(after == groups, row + 1, row), jnp.where(after == groups, 0, after)

            @pl.when(b < pl.num_programs(0))
            def _():
                start(b, g_next, jnp.where(ended, 0, place + 1), 1 - buffer)

            wait(row, g, place, buffer)
            first = place * many * slots

            @pl.when(first + many * slots > length)
            def _():
                # The end of the last page, and what no page was copied to, may hold anything, nan too, and 0 * nan is nan.
                values = value_buffer[buffer]
                real = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < length
                value_buffer[buffer] = jnp.where(real, values.astype(jnp.float32), 0.0).astype(values.dtype)

            logits = _dot(query_ref[0, g], key_buffer[buffer], 1) * scale
            if biased:
                logits += bias_ref[0, g, pl.ds(place, 1), :]
            live = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < length
            logits = jnp.where(live, logits, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
            # Without any key so far the peak is -inf, and -inf less -inf is nan.
            safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights, kept = jnp.exp(logits - safe), jnp.exp(peak - safe)
            values = value_buffer[buffer]
            total = total * kept + jnp.sum(weights, axis=1, keepdims=True)
            return new_peak, total, sums * kept + _dot(weights.astype(values.dtype), values, 0)

        state = (peak_ref[0, g], total_ref[0, g], jnp.zeros(query_ref.shape[2:], jnp.float32))
        peak, total, sums = jax.lax.fori_loop(0, last + 1, block, state)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[0, g] = (sums / safe).astype(out_ref.dtype)
        lse_ref[0, g] = jnp.where(some, peak + jnp.log(safe), -jnp.inf)

    jax.lax.fori_loop(0, groups, one_list, None)


def _dot(left: Array, right: Array, contract: int) -> Array:
    """A product summed in float32 over the last axis of `left` and axis `contract` of `right`."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
