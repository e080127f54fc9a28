# SPDX-License-Identifier: Apache-2.0
"""Pairs on the TPU: ranks by comparing every even token with every other, in one kernel without a sort or a gather.

Sequences lie across the lanes and tokens down, so that a token of up to 128 sequences meets the others of its own in one
comparison of a register. That is less than the dozens of small operations that sorting and gathering take.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bipartite_match import pairs_xla

# Even tokens above which comparisons of all with all cost more than a sort.
_LONGEST = 640
# Sequences of a step, one a lane; tokens whose sums stay in registers while all others pass by; passes in a row.
_LANES, _DOWN, _UNROLL = 128, 64, 8


def pair_up(
    similarity: Float[Array, "B A"],
    partner: Int[Array, "B A"],
    mass: Float[Array, "B N"],
    above: Bool[Array, "B A"] | None = None,
    *,
    removed: int,
    ordered: bool,
    interpret: bool = False,
) -> tuple[Int[Array, "B M"], Int[Array, "B N"], Float[Array, "B N"]]:
    """Heads, slots of tokens, and their weights; what is `above` a threshold merges in any case.

    Raises:
      NotImplementedError: more even tokens than all pairs of which are compared.
    """
    (batch, even), length = similarity.shape, mass.shape[1]
    if even > _LONGEST:
        raise NotImplementedError(f"pair_up takes at most {2 * _LONGEST} tokens; got {length}")
    odd_mass = jnp.pad(mass[:, 1::2], ((0, 0), (0, even - length // 2)))
    arrays = [similarity, partner, mass[:, ::2], odd_mass, *(() if above is None else (above,))]
    arrays = [jnp.swapaxes(x, 0, 1).astype(jnp.float32) for x in arrays]
    block = pl.BlockSpec((even, min(batch, _LANES)), lambda b: (0, b))
    down = pltpu.VMEM(block.block_shape, jnp.float32)
    row = pl.BlockSpec((1, block.block_shape[1]), lambda b: (0, b))
    slot, weight, odd_weight, order, unmerged = pl.pallas_call(
        functools.partial(_kernel, removed=removed, ordered=ordered, limited=above is not None),
        out_shape=[jax.ShapeDtypeStruct((size, batch), jnp.float32) for size in (even, even, even, even, 1)],
        grid=(pl.cdiv(batch, _LANES),),
        in_specs=[block] * len(arrays),
        out_specs=[block] * 4 + [row],
        scratch_shapes=[down, down],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="pair_up",
    )(*arrays)
    order, unmerged = (jnp.swapaxes(x, 0, 1).astype(jnp.int32) for x in (order, unmerged))
    odd_slot = unmerged + jnp.arange(length // 2, dtype=jnp.int32)
    assign = pairs_xla.interleave(jnp.swapaxes(slot, 0, 1).astype(jnp.int32), odd_slot)
    weight = pairs_xla.interleave(*(jnp.swapaxes(x, 0, 1) for x in (weight, odd_weight[: length // 2])))
    return pairs_xla.heads_of(order, unmerged, length - removed, length), assign, weight


def _kernel(similarity_ref, partner_ref, mass_ref, odd_mass_ref, *refs, removed, ordered, limited):
    above_ref, refs = (refs[0], refs[1:]) if limited else (None, refs)
    slot_ref, weight_ref, odd_weight_ref, order_ref, unmerged_ref, join_ref, total_ref = refs
    even, lanes = similarity_ref.shape
    blocks = [slice(start, min(start + _DOWN, even)) for start in range(0, even, _DOWN)]

    def places(block):
        return block.start + jax.lax.broadcasted_iota(jnp.int32, (block.stop - block.start, lanes), 0).astype(
            jnp.float32
        )

    def passing(body, start):
        return jax.lax.fori_loop(
            0, even, lambda i, state: body(pl.ds(i, 1), i.astype(jnp.float32), state), start, unroll=_UNROLL
        )

    joined = jnp.zeros((1, lanes), jnp.float32)
    for block in blocks:
        own, index = similarity_ref[block, :], places(block)

        def count(row, i, total, own=own, index=index):
            other = similarity_ref[row, :]
            return total + jnp.where((other > own) | ((other == own) & (i < index)), 1.0, 0.0)

        place = passing(count, jnp.zeros_like(own))
        merged = place < removed
        if limited:
            merged |= above_ref[block, :] > 0
        join_ref[block, :] = jnp.where(merged, partner_ref[block, :], -1.0)
        slot_ref[block, :] = place
        joined += jnp.sum(jnp.where(merged, 1.0, 0.0), axis=0, keepdims=True)
    unmerged = even - joined
    unmerged_ref[...] = unmerged

    def settle(row, _, before):
        join = join_ref[row, :]
        # Among those that stay: by index, or by similarity, where all that merge come first.
        slot_ref[row, :] = jnp.where(join < 0, before if ordered else slot_ref[row, :] - joined, unmerged + join)
        return before + jnp.where(join < 0, 1.0, 0.0)

    passing(settle, jnp.zeros_like(joined))
    for block in blocks:
        index = places(block)

        def gather(row, i, state, index=index):
            total, order = state
            total += jnp.where(index == join_ref[row, :], mass_ref[row, :], 0.0)
            return total, jnp.where(index == slot_ref[row, :], i, order)

        total, order_ref[block, :] = passing(gather, (odd_mass_ref[block, :], jnp.zeros_like(index)))
        total_ref[block, :] = total
        odd_weight_ref[block, :] = odd_mass_ref[block, :] / jnp.where(total > 0, total, 1.0)
    for block in blocks:
        join = join_ref[block, :]

        def take(row, i, own, join=join):
            return jnp.where(join == i, total_ref[row, :], own)

        own = passing(take, mass_ref[block, :])
        weight_ref[block, :] = mass_ref[block, :] / jnp.where(own > 0, own, 1.0)
