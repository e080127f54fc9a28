# SPDX-License-Identifier: Apache-2.0
"""Pairs on the TPU: ranks by comparing every even token with every other, in one kernel without a sort or a gather.

Tokens lie down and sequences across the lanes, so that a token of each sequence meets another one of its own in one comparison
of a register. Where there are fewer sequences than lanes, these are repeated, and each copy meets another part of the other
tokens: what the copies count is added up by rotations. Rows come in and go out as they are, tokens across, and are turned here.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots, P parts of the even tokens, each of C.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

# Even tokens above which comparisons of all with all cost more than a sort.
_LONGEST = 640
# Lanes; tokens whose sums stay in registers while all others pass by; passes in a row.
_LANES, _DOWN, _UNROLL = 128, 64, 8


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """How lanes are used: lane `part * group + sequence` holds a sequence's copy that meets the tokens of a part.

    Attributes:
      even: tokens. group: sequences. parts: copies of each. chunk: tokens of a part, the last ones past the end.
    """

    even: int
    group: int
    parts: int
    chunk: int

    @classmethod
    def plan(cls, batch: int, even: int) -> _Lanes:
        """As many copies as the lanes hold of at least eight sequences, and no copy without a register of tokens."""
        group = min(max(pl.next_power_of_2(batch), 8), _LANES)
        parts = min(_LANES // group, pl.next_power_of_2(pl.cdiv(even, 8)))
        return cls(even, _LANES // parts, parts, 8 * pl.cdiv(even, 8 * parts))

    @property
    def rows(self) -> int:
        """Tokens of all parts, padding included."""
        return self.parts * self.chunk

    @property
    def part(self) -> Int[Array, "1 lanes"]:
        return jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) // self.group

    def blocks(self) -> list[slice]:
        return [slice(start, min(start + _DOWN, self.even)) for start in range(0, self.even, _DOWN)]

    def down(self, rows: Float[Array, "group N"]) -> Float[Array, "N lanes"]:
        """Tokens down, every sequence once for each part."""
        return jnp.concatenate([rows.astype(jnp.float32)] * self.parts, axis=0).T

    def others(self, ref: jax.Ref) -> Float[Array, "C lanes"]:
        """For each copy its own part of the tokens."""
        found = ref[: self.chunk]
        for part in range(1, self.parts):
            found = jnp.where(self.part == part, ref[part * self.chunk : (part + 1) * self.chunk], found)
        return found

    def everyone(self, values: Float[Array, "n lanes"]) -> Float[Array, "n lanes"]:
        """The sum over all copies, in each of them."""
        shift = self.group
        while shift < _LANES:
            values, shift = values + pltpu.roll(values, shift, 1), 2 * shift
        return values

    def before(self, values: Float[Array, "1 lanes"]) -> Float[Array, "1 lanes"]:
        """The sum over the copies that come before."""
        total, shift = values, 1
        while shift < self.parts:
            total += jnp.where(self.part >= shift, pltpu.roll(total, shift * self.group, 1), 0.0)
            shift *= 2
        return total - values

    def passing(self, body: Callable[..., Array], start: Array) -> Array:
        """`body(row, number, state)` for every other token, as a row and by its number in each copy."""
        offset = (self.part * self.chunk).astype(jnp.float32)
        return jax.lax.fori_loop(
            0, self.chunk, lambda i, state: body(pl.ds(i, 1), i + offset, state), start, unroll=_UNROLL
        )


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
    lanes = _Lanes.plan(batch, even)
    arrays = [similarity, partner, mass, *(() if above is None else (above.astype(jnp.float32),))]
    arrays = [jnp.pad(x, ((0, -batch % lanes.group), (0, 0))) for x in arrays]

    def row(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((lanes.group, size), lambda b: (b, 0))

    sizes, kinds = (length - removed, length, length), (jnp.int32, jnp.int32, jnp.float32)
    tall = max(lanes.rows, -(-(length - removed) // 8) * 8)
    outputs = pl.pallas_call(
        functools.partial(_kernel, lanes=lanes, removed=removed, ordered=ordered, limited=above is not None),
        out_shape=[jax.ShapeDtypeStruct((arrays[0].shape[0], n), kind) for n, kind in zip(sizes, kinds, strict=True)],
        grid=(arrays[0].shape[0] // lanes.group,),
        in_specs=[row(x.shape[1]) for x in arrays],
        out_specs=[row(size) for size in sizes],
        scratch_shapes=[
            *[pltpu.VMEM((lanes.rows, _LANES), jnp.float32)] * 4,
            *[pltpu.VMEM((lanes.chunk, _LANES), jnp.float32)] * 3,
            pltpu.VMEM((tall, _LANES), jnp.float32),
            *[pltpu.VMEM((2 * lanes.rows, _LANES), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="pair_up",
    )(*arrays)
    return tuple(x[:batch] for x in outputs)


def _kernel(similarity_ref, partner_ref, mass_ref, *refs, lanes, removed, ordered, limited):
    above_ref, refs = (refs[0], refs[1:]) if limited else (None, refs)
    heads_ref, assign_ref, weight_ref, own, join, mass, total, other, place, value, order, *pairs = refs
    length, even, odd = mass_ref.shape[1], lanes.even, mass_ref.shape[1] // 2
    # Both halves of the tokens, by rows that are two apart.
    evens, odds = pl.ds(0, even, stride=2), pl.ds(1, odd, stride=2)
    pairs[0][:length] = lanes.down(mass_ref[...])
    mass[...], total[...] = jnp.zeros_like(mass), jnp.zeros_like(total)
    mass[:even], total[:odd] = pairs[0][evens], pairs[0][odds]
    own[...] = jnp.full_like(own, -jnp.inf)
    own[:even] = lanes.down(similarity_ref[...])
    join[...] = jnp.full_like(join, -1.0)
    join[:even] = lanes.down(partner_ref[...])
    above = lanes.down(above_ref[...]) > 0 if limited else None
    unmerged = even - _choose(own, join, other, above, lanes, removed)
    other[...], place[...] = lanes.others(join), lanes.others(own)
    _settle(other, place, unmerged, lanes, ordered)
    value[...] = lanes.others(mass)
    _sum(total, order, other, place, value, lanes)
    for part in range(lanes.parts):
        # Similarities are used up: their room takes slots.
        rows = slice(part * lanes.chunk, (part + 1) * lanes.chunk)
        own[rows] = lanes.everyone(jnp.where(lanes.part == part, place[...], 0.0))
    value[...] = lanes.others(total)
    _share(mass, join, value, lanes)
    whole = total[:odd]
    pairs[1][evens], pairs[1][odds] = mass[:even], pairs[0][odds] / jnp.where(whole > 0, whole, 1.0)
    pairs[0][evens], pairs[0][odds] = own[:even], unmerged + _count(odd)
    slot = _count(heads_ref.shape[1])
    behind = slot - unmerged
    last = jnp.where(behind < odd, 2 * behind + 1, -1.0)
    heads = jnp.where(behind < 0, 2 * order[: heads_ref.shape[1]], last)
    for ref, rows in ((heads_ref, heads), (assign_ref, pairs[0][:length]), (weight_ref, pairs[1][:length])):
        ref[...] = rows.T[: lanes.group].astype(ref.dtype)


def _count(rows: int, start: int = 0) -> Float[Array, "rows lanes"]:
    return start + jax.lax.broadcasted_iota(jnp.int32, (rows, _LANES), 0).astype(jnp.float32)


def _choose(own, join, other, above, lanes, removed):
    """Puts ranks in the place of similarities, and -1 in `join` for tokens that stay; how many do not."""
    other[...] = lanes.others(own)
    joined = jnp.zeros((1, _LANES), jnp.float32)
    for block in lanes.blocks():
        mine, index = own[block], _count(block.stop - block.start, block.start)

        def count(row, number, total, mine=mine, index=index):
            passing = other[row]
            return total + jnp.where((passing > mine) | ((passing == mine) & (number < index)), 1.0, 0.0)

        rank = lanes.everyone(lanes.passing(count, jnp.zeros_like(mine)))
        merged = rank < removed
        if above is not None:
            merged |= above[block]
        join[block] = jnp.where(merged, join[block], -1.0)
        own[block] = rank
        joined += jnp.sum(jnp.where(merged, 1.0, 0.0), axis=0, keepdims=True)
    return joined


def _settle(join, place, unmerged, lanes, ordered):
    """Slots in the place of ranks: among those that stay by index, or by similarity, where all that merge come first."""
    if not ordered:
        joined = lanes.even - unmerged
        place[...] = jnp.where(join[...] < 0, place[...] - joined, unmerged + join[...])
        return

    def settle(row, _, before):
        stays = join[row] < 0
        place[row] = jnp.where(stays, before, unmerged + join[row])
        return before + jnp.where(stays, 1.0, 0.0)

    stay = jnp.sum(jnp.where(join[...] < 0, 1.0, 0.0), axis=0, keepdims=True)
    lanes.passing(settle, lanes.before(stay))


def _sum(total, order, join, place, mass, lanes):
    """Adds the masses of those that join an odd token to its own; which even token stands in each slot."""
    for block in lanes.blocks():
        index = _count(block.stop - block.start, block.start)

        def gather(row, number, state, index=index):
            found, standing = state
            found += jnp.where(index == join[row], mass[row], 0.0)
            return found, standing + jnp.where(index == place[row], number, 0.0)

        found, standing = lanes.passing(gather, (jnp.zeros_like(index), jnp.zeros_like(index)))
        total[block] += lanes.everyone(found)
        order[block] = lanes.everyone(standing)


def _share(mass, join, totals, lanes):
    """Shares of even tokens in their slots in the place of their masses."""
    for block in lanes.blocks():
        joins = join[block]

        def take(row, number, found, joins=joins):
            return found + jnp.where(joins == number, totals[row], 0.0)

        whole = jnp.where(joins < 0, mass[block], lanes.everyone(lanes.passing(take, jnp.zeros_like(joins))))
        mass[block] = mass[block] / jnp.where(whole > 0, whole, 1.0)
