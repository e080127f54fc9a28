# SPDX-License-Identifier: Apache-2.0
"""Pairs in plain JAX: places by sorting, weights by a sum over segments.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def shares(mass: Float[Array, "B N"], assign: Int[Array, "B N"], slots: int) -> Float[Array, "B N"]:
    """The share of each token in the mass of its slot."""
    total = jax.vmap(lambda own, place: jnp.zeros(slots).at[place].add(own))(mass, assign)
    total = jnp.take_along_axis(total, assign, axis=1)
    return mass / jnp.where(total > 0, total, 1.0)


def pair_up(
    similarity: Float[Array, "B A"],
    partner: Int[Array, "B A"],
    mass: Float[Array, "B N"],
    above: Bool[Array, "B A"] | None = None,
    *,
    removed: int,
    ordered: bool,
    protected: bool,
) -> tuple[Int[Array, "B M"], Int[Array, "B N"], Float[Array, "B N"]]:
    """Heads, slots of tokens, and their weights; what is `above` a threshold merges in any case."""
    even, length = similarity.shape[1], mass.shape[1]
    first = protected & (jnp.arange(even) == 0)
    padding = (mass[:, ::2] == 0) & ~first
    similarity = jnp.where(first, -jnp.inf, jnp.where(padding, jnp.inf, similarity))
    order = jnp.argsort(-similarity, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)
    merged = place < removed
    if above is not None:
        merged |= (above & ~first) | padding
    joined = jnp.sum(merged, axis=-1, keepdims=True, dtype=jnp.int32)
    position = jnp.cumsum(~merged, axis=-1, dtype=jnp.int32) - 1 if ordered else place - joined
    assign = jnp.where(merged, even - joined + partner, position)
    own = jnp.argsort(jnp.where(merged, even, position), axis=-1).astype(jnp.int32)
    heads = heads_of(own, even - joined, length - removed, length)
    assign = interleave(assign, even - joined + jnp.arange(length // 2, dtype=jnp.int32))
    return heads, assign, shares(mass, assign, length - removed)


def heads_of(own: Int[Array, "B A"], unmerged: Int[Array, "B 1"], slots: int, length: int) -> Int[Array, "B M"]:
    """Token at the head of each slot, from the even tokens in the order of their slots and how many of them have one."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    own = jnp.pad(own, ((0, 0), (0, max(0, slots - own.shape[1]))))[:, :slots]
    odd = slot - unmerged
    return jnp.where(slot < unmerged, 2 * own, jnp.where(odd < length // 2, 2 * odd + 1, -1))


def interleave(even: Array, odd: Array) -> Array:
    """`[B, N]` from the values at even and at odd tokens (one even token more when N is odd)."""
    odd = jnp.broadcast_to(odd, (even.shape[0], odd.shape[-1]))
    padded = jnp.pad(odd, ((0, 0), (0, even.shape[1] - odd.shape[1])))
    return jnp.stack([even, padded], axis=-1).reshape(even.shape[0], -1)[:, : even.shape[1] + odd.shape[1]]
