# SPDX-License-Identifier: Apache-2.0
"""Masses, coordinates and pointers of merged tokens on the TPU: sequences down, tokens across the lanes.

A slot takes the numbers of its head by shuffles of lanes. The other tokens close ranks and are added one of them at a time, to
the slots of all sequences at once.

Shapes: B batch, N tokens, M slots, C coordinates, N0 tokens of the original sequence, S sequences of a step, L lanes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import across

# Tokens of which every register of slots looks at every register.
_LONGEST = 1280
# Numbers of a step: chains of dependent work are long, and several sequences hide them.
_STEP = 20480


def merge_facts(
    mass: Float[Array, "B N"],
    coords: Float[Array, "B N C"],
    weight: Float[Array, "B N"],
    origin: Int[Array, "B N0"],
    heads: Int[Array, "B M"],
    assign: Int[Array, "B N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B M"], Float[Array, "B M C"], Int[Array, "B N0"]]:
    """Sums of masses and of weighted coordinates, and where original tokens are.

    Raises:
      NotImplementedError: too many tokens.
    """
    (batch, length), slots, width = assign.shape, heads.shape[1], coords.shape[2]
    longest = max(length, slots, origin.shape[1])
    if longest > _LONGEST:
        raise NotImplementedError(f"merge_facts takes at most {_LONGEST} tokens and slots; got {longest}")
    # Rows past the end of the batch may be anything and are never written.
    group = min(batch, max(_STEP // across.whole(longest) // 8 * 8, 8))

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((group, size), lambda b: (b, 0))

    def blocks(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((width, group, size), lambda b: (0, b, 0))

    mass, merged, origin = pl.pallas_call(
        _kernel,
        out_shape=[
            jax.ShapeDtypeStruct((batch, slots), jnp.float32),
            jax.ShapeDtypeStruct((width, batch, slots), jnp.float32),
            jax.ShapeDtypeStruct(origin.shape, jnp.int32),
        ],
        grid=(pl.cdiv(batch, group),),
        in_specs=[block(length), blocks(length), block(length), block(origin.shape[1]), block(slots), block(length)],
        out_specs=[block(slots), blocks(slots), block(origin.shape[1])],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_facts",
    )(mass, jnp.moveaxis(coords, 2, 0), weight, origin, heads, assign)
    return mass, jnp.moveaxis(merged, 0, 2), origin


def _kernel(mass_ref, coords_ref, weight_ref, origin_ref, heads_ref, assign_ref, *outputs):
    mass_out, coords_out, origin_out = outputs
    lanes, room, slots = across.whole(assign_ref.shape[1]), across.whole(heads_ref.shape[1]), heads_ref.shape[1]
    assign, heads = across.padded(assign_ref[...], lanes, -1), across.padded(heads_ref[...], room, -1)
    weight = across.padded(weight_ref[...], lanes)
    numbers = [across.padded(coords_ref[c], lanes) * weight for c in range(coords_ref.shape[0])]
    numbers = [across.padded(mass_ref[...], lanes), *numbers]
    # A head counts where it joins its slot.
    leads = (heads >= 0) & (across.take(assign, heads) == across.number(heads.shape))
    totals = [jnp.where(leads, across.take(number, heads), 0.0) for number in numbers]
    total, *sums = _add_others(totals, numbers, assign, heads)
    mass_out[...] = total[:, :slots]
    for c, one in enumerate(sums):
        coords_out[c] = one[:, :slots]
    length = origin_ref.shape[1]
    origin = across.padded(origin_ref[...], across.whole(length), -1)
    origin_out[...] = jnp.where(origin >= 0, across.take(assign, origin), -1)[:, :length]


def _add_others(
    totals: list[Float[Array, "S L"]], numbers: list[Float[Array, "S L"]], assign: Array, heads: Array
) -> list[Float[Array, "S L"]]:
    """The sums of slots with the tokens that do not head theirs."""
    token, slot = across.number(assign.shape), across.number(heads.shape)
    joins = (assign >= 0) & (across.take(heads, assign) != token)
    ones = jnp.where(joins, 1.0, 0.0)
    free = token - across.count_before(ones).astype(jnp.int32)
    joining = across.packed(token, jnp.where(joins, free, 0), assign.shape[1] - 1)
    count = jnp.sum(ones, axis=1, keepdims=True).astype(jnp.int32)
    most = jnp.max(count)

    def add(_, columns, totals):
        to, *more = (across.spread(column, slot.shape[1]) for column in columns)
        return [total + jnp.where(to == slot, one, 0.0) for total, one in zip(totals, more, strict=True)]

    def register(start, totals):
        own = joining[:, start : start + across.LANES]
        to = jnp.where(start + across.number(own.shape) < count, across.take(assign, own), -1)
        return across.fold((to, *(across.take(number, own) for number in numbers)), most - start, add, totals)

    for start in range(0, assign.shape[1], across.LANES):
        totals = jax.lax.cond(most > start, functools.partial(register, start), lambda totals: totals, totals)
    return totals
