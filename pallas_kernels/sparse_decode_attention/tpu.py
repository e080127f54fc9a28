# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding on the TPU: each step copies several listed pages into on-chip memory and works on them as one block.

The list is prefetched into scalar memory and the index maps read it, one input for each page of a step, so that all copies
of the next step are under way during this one. Steps past a list's end ask for the pages that are there already: no copy, no
work.

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

# Slots a step: at 128 x 2 bytes, keys and values are 512 KiB, a copy long enough to hide its latency on v5e.
_SLOTS = 1024
# Inputs of the kernel are twice as many as pages a step.
_MOST_PAGES = 16


def sparse_decode_attention(
    query: Float[Array, "B T H d"],
    key_pages: Float[Array, "G P S d"],
    value_pages: Float[Array, "G P S d"],
    pages: Int[Array, "B g L"],
    lengths: Int[Array, "B g"],
    *,
    bias: Float[Array, "G P S"] | None,
    sinks: Float[Array, " H"] | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Online softmax over steps of several pages."""
    groups, _, slots, width = key_pages.shape
    stacked = xla.stack(query, groups)
    batch, _, rows, _ = stacked.shape
    many = block_pages(slots, pages.shape[2])
    _check(query, key_pages, pages, rows, many)
    heads, listed = pages.shape[1], pages.shape[2]
    steps = pl.cdiv(listed, many)

    def own(b, g):
        return b * heads + (g if heads > 1 else 0)

    def page_index(position, b, g, s, pages, lengths):
        last = jnp.maximum(pl.cdiv(lengths[own(b, g)], slots) - 1, 0)
        place = jnp.minimum(jnp.minimum(s, last // many) * many + position, last)
        return g, pages[own(b, g) * listed + place], 0, 0

    def page_spec(position):
        return pl.BlockSpec((1, 1, slots, width), functools.partial(page_index, position))

    fixed = [
        (stacked, pl.BlockSpec((1, 1, rows, width), lambda b, g, s, *_: (b, g, 0, 0))),
        *(
            (state, pl.BlockSpec((1, 1, rows, 1), lambda b, g, s, *_: (b, g, 0, 0)))
            for state in xla.start(sinks, stacked.shape)
        ),
    ]
    if bias is not None:
        # A hundredth of the keys' bytes: gathered outside, where it makes one row of lanes.
        own_bias = reference.gather(bias.astype(jnp.float32), pages).reshape(batch, groups, 1, -1)
        own_bias = jnp.pad(own_bias, ((0, 0), (0, 0), (0, 0), (0, steps * many * slots - listed * slots)))
        fixed.append((own_bias, pl.BlockSpec((1, 1, 1, many * slots), lambda b, g, s, *_: (b, g, 0, s))))
    specs = [spec for _, spec in fixed] + 2 * [page_spec(position) for position in range(many)]
    kernel = functools.partial(_kernel, own=own, many=many, slots=slots, scale=scale, biased=bias is not None)
    out, lse = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(stacked.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, groups, rows, 1), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, steps),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((1, 1, rows, width), lambda b, g, s, *_: (b, g, 0, 0)),
                pl.BlockSpec((1, 1, rows, 1), lambda b, g, s, *_: (b, g, 0, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32) for size in (1, 1, width)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="sparse_decode_attention",
    )(
        pages.reshape(-1),
        lengths.reshape(-1),
        *(array for array, _ in fixed),
        *many * [key_pages],
        *many * [value_pages],
    )
    return xla.unstack(out, query.shape), xla.unstack(lse, (*query.shape[:3], 1))[..., 0]


def block_pages(slots: int, listed: int) -> int:
    """Pages a step: `_SLOTS` slots' worth, at most `_MOST_PAGES`, and no more than are listed."""
    return max(min(_SLOTS // slots, _MOST_PAGES, listed), 1)


def _check(query: Array, key_pages: Array, pages: Array, rows: int, many: int) -> None:
    """Raises `NotImplementedError` for what the kernel cannot take."""
    groups, _, slots, width = key_pages.shape
    if query.dtype != key_pages.dtype or query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"sparse_decode_attention takes a query and a cache both of float32 or both of bfloat16; got {query.dtype} and "
            f"{key_pages.dtype}"
        )
    tile = 16 if query.dtype == jnp.bfloat16 else 8
    if slots % tile:
        nearest = (groups, key_pages.shape[1], -(-slots // tile) * tile, width)
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
    own = 6 * vmem.size((rows, max(width, 128)), jnp.float32)
    vmem.check("sparse_decode_attention", blocks + scores + own, "use smaller pages or fewer query rows")


def _kernel(pages_ref, lengths_ref, query_ref, peak_ref, total_ref, *refs, own, many, slots, scale, biased):
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    key_refs, value_refs, (out_ref, lse_ref, peak, total, sums) = refs[:many], refs[many : 2 * many], refs[2 * many :]
    step, length = pl.program_id(2), lengths_ref[own(pl.program_id(0), pl.program_id(1))]
    first = step * many * slots

    @pl.when(step == 0)
    def _():
        peak[...], total[...], sums[...] = peak_ref[0, 0], total_ref[0, 0], jnp.zeros_like(sums)

    @pl.when(first < length)
    def _():
        keys, values = (jnp.concatenate([ref[0, 0] for ref in group], axis=0) for group in (key_refs, value_refs))
        logits = _dot(query_ref[0, 0], keys, 1) * scale
        if biased:
            logits += bias_ref[0, 0]
        live = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < length
        logits = jnp.where(live, logits, -jnp.inf)
        new_peak = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
        # Without any key so far the peak is -inf, and -inf less -inf is nan.
        safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights, kept = jnp.exp(logits - safe), jnp.exp(peak[...] - safe)
        # The end of the last page may hold anything, nan too, and 0 * nan is nan.
        row = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(row < length, values.astype(jnp.float32), 0.0).astype(values.dtype)
        total[...] = total[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
        sums[...] = sums[...] * kept + _dot(weights.astype(values.dtype), values, 0)
        peak[...] = new_peak

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        out_ref[0, 0] = (sums[...] / safe).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some, peak[...] + jnp.log(safe), -jnp.inf)


def _dot(left: Array, right: Array, contract: int) -> Array:
    """A product summed in float32 over the last axis of `left` and axis `contract` of `right`."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
