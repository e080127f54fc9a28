# SPDX-License-Identifier: Apache-2.0
"""Pairs on the TPU, in one kernel: sequences down, tokens across the lanes as they come in and go out.

Where unmerged tokens stay in their order no sort is needed: the similarity that the last of those that join has is found digit
by digit, and the others close ranks. By falling similarity every token is compared with every other. What those that join bring
is added one of them at a time, to all odd tokens of all sequences at once.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots, S sequences of a step, L lanes for the even tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import across

# Even tokens above which comparisons of all with all cost more than a sort.
_LONGEST = 640
# Numbers of a step: chains of dependent work are long, and several sequences hide them.
_STEP = 16384


def pair_up(
    similarity: Float[Array, "B A"],
    partner: Int[Array, "B A"],
    mass: Float[Array, "B N"],
    above: Bool[Array, "B A"] | None = None,
    *,
    removed: int,
    ordered: bool,
    protected: bool,
    interpret: bool = False,
) -> tuple[Int[Array, "B M"], Int[Array, "B N"], Float[Array, "B N"]]:
    """Heads, slots of tokens, and their weights; what is `above` a threshold merges in any case.

    Raises:
      NotImplementedError: more even tokens than all pairs of which are compared.
    """
    (batch, even), length = similarity.shape, mass.shape[1]
    if even > _LONGEST:
        raise NotImplementedError(f"pair_up takes at most {2 * _LONGEST} tokens; got {length}")
    arrays = [similarity, partner, mass, *(() if above is None else (above.astype(jnp.float32),))]
    # Rows past the end of the batch may be anything and are never written.
    group = min(batch, max(_STEP // across.whole(even) // 8 * 8, 8))

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((group, size), lambda b: (b, 0))

    sizes, kinds = (length - removed, length, length), (jnp.int32, jnp.int32, jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, removed=removed, ordered=ordered, protected=protected, limited=above is not None),
        out_shape=[jax.ShapeDtypeStruct((batch, size), kind) for size, kind in zip(sizes, kinds, strict=True)],
        grid=(pl.cdiv(batch, group),),
        in_specs=[block(array.shape[1]) for array in arrays],
        out_specs=[block(size) for size in sizes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="pair_up",
    )(*arrays)


def _kernel(similarity_ref, partner_ref, mass_ref, *refs, removed, ordered, protected, limited):
    above_ref, (heads_ref, assign_ref, weight_ref) = (refs[0], refs[1:]) if limited else (None, refs)
    even, length = similarity_ref.shape[1], mass_ref.shape[1]
    lanes, slots = across.whole(even), heads_ref.shape[1]
    partner = across.padded(partner_ref[...], lanes)
    masses = across.halves(across.padded(mass_ref[...], 2 * lanes))
    token = across.number(partner.shape)
    least = token >= even
    least = least | (token == 0) if protected else least
    padding = (masses[0] == 0) & ~least
    similarity = jnp.where(padding, jnp.inf, across.padded(similarity_ref[...], lanes))
    similarity = jnp.where(least, -jnp.inf, similarity)
    rank = None if ordered else _ranks(similarity, even)
    joins = _most_similar(similarity, removed) if ordered else rank < removed
    if limited:
        joins |= ((across.padded(above_ref[...], lanes) > 0) & ~least) | padding
    before = across.count_before(jnp.where(joins, 1.0, 0.0)).astype(jnp.int32)
    joined = jnp.sum(jnp.where(joins, 1.0, 0.0), axis=1, keepdims=True).astype(jnp.int32) if limited else removed
    unmerged, most = even - joined, even if limited else removed
    # All that join are more similar than those that stay.
    place = token - before if ordered else rank - joined
    order = across.packed(token, jnp.where(joins, 0, before), most) if ordered else _inverse(place, even)
    totals = _totals(joins, token - before, partner, masses, joined)
    wholes = jnp.where(joins, across.take(totals, partner), masses[0]), totals
    weights = [mass / jnp.where(total > 0, total, 1.0) for mass, total in zip(masses, wholes, strict=True)]
    weight_ref[...] = across.interleaved(*weights)[:, :length]
    assign = across.interleaved(jnp.where(joins, unmerged + partner, place), unmerged + token)
    assign_ref[...] = assign[:, :length]
    room = max(across.whole(slots), lanes)
    behind = across.number((token.shape[0], room)) - unmerged
    last = jnp.where(behind < length // 2, 2 * behind + 1, -1)
    heads_ref[...] = jnp.where(behind < 0, 2 * across.padded(order, room), last)[:, :slots]


def _most_similar(similarity: Float[Array, "S L"], removed: int) -> Bool[Array, "S L"]:
    """True for the `removed` largest, of equals those that come first."""
    if removed == 0:
        return jnp.zeros(similarity.shape, jnp.bool_)
    # Whole numbers in the order of the floating-point ones; both zeros are equal.
    bits = jax.lax.bitcast_convert_type(jnp.where(similarity == 0, 0.0, similarity), jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # The largest number that enough keys reach, two bits at a time.
    least = jnp.full((key.shape[0], 1), np.iinfo(np.int32).min, jnp.int32)
    for shift in range(30, -1, -2):
        steps = [np.uint32(digit << shift).astype(np.int32) for digit in (1, 2, 3)]
        reached = (_count(key >= least + step) >= removed for step in steps)
        least += sum(jnp.where(enough, np.int32(1 << shift), 0) for enough in reached)
    equal = key == least
    free = removed - _count(key > least)
    return (key > least) | (equal & (across.count_before(jnp.where(equal, 1.0, 0.0)) < free))


def _count(where: Bool[Array, "S L"]) -> Float[Array, "S 1"]:
    return jnp.sum(jnp.where(where, 1.0, 0.0), axis=1, keepdims=True)


def _ranks(similarity: Float[Array, "S L"], even: int) -> Int[Array, "S L"]:
    """How many even tokens are more similar than each, or as similar and before it."""
    token = across.number(similarity.shape)

    def count(place, columns, rank):
        passing = across.spread(columns[0], similarity.shape[1])
        ahead = (passing > similarity) | ((passing == similarity) & (place < token))
        return rank + jnp.where(ahead, 1, 0)

    return across.fold((similarity,), even, count, jnp.zeros(token.shape, jnp.int32))


def _inverse(place: Int[Array, "S L"], even: int) -> Int[Array, "S L"]:
    """Which token stands at each place; 0 where none does."""
    slot = across.number(place.shape)

    def stand(token, columns, order):
        return order + jnp.where(across.spread(columns[0], slot.shape[1]) == slot, token, 0)

    return across.fold((place,), even, stand, jnp.zeros_like(place))


def _totals(
    joins: Bool[Array, "S L"],
    stay: Int[Array, "S L"],
    partner: Int[Array, "S L"],
    masses: tuple[Float[Array, "S L"], Float[Array, "S L"]],
    joined: Int[Array, "S 1"] | int,
) -> Float[Array, "S L"]:
    """Masses of odd tokens with those of the even ones that join them; `stay` of these stand before each."""
    odd, known = across.number(joins.shape), isinstance(joined, int)
    if known and joined == 0:
        return masses[1]
    # Those that join stand close, so that there is a pass for each of them only.
    joining = across.packed(odd, jnp.where(joins, stay, 0), joins.shape[1] - 1)
    joining = joining[:, : across.whole(joined)] if known else joining
    to, mass = across.take(partner, joining), across.take(masses[0], joining)
    to = jnp.where(across.number(to.shape) < joined, to, -1)

    def add(_, columns, total):
        own, more = (across.spread(column, total.shape[1]) for column in columns)
        return total + jnp.where(own == odd, more, 0.0)

    return across.fold((to, mass), joined if known else jnp.max(joined), add, masses[1])
