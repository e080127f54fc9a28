# SPDX-License-Identifier: Apache-2.0
"""Chunks of a byte sequence: where they start, how long they are, and the reduction that pools them.

A chunk is a run of neighbouring tokens. A method says where chunks start; everything else follows from that. Methods whose
papers mark the ends of chunks are turned around with `from_ends`. Real tokens stand together, with padding around them.

Shapes: B batch, N tokens, M slots (chunks, padded), D features.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import ragged, relaxations
from adaptive.tokens import Reduction, TokenSet

POOLS = ("mean", "first")


@flax.struct.dataclass
class Chunks:
    """Where the chunks of each row start.

    Attributes:
      starts: `[B, N]` bool; True at the first real token, never in padding.
      probability: `[B, N]` float32, the belief that a chunk starts there, with the method's gradient; the starts themselves
        where nothing is learned. 0 in padding.
      valid: `[B, N]` bool, real tokens.
    """

    starts: Bool[Array, "B N"]
    probability: Float[Array, "B N"]
    valid: Bool[Array, "B N"]

    @classmethod
    def create(
        cls, starts: Bool[Array, "B N"], tokens: TokenSet, probability: Float[Array, "B N"] | None = None
    ) -> Chunks:
        """Chunks that start where `starts` says, and at the first real token whatever it says there; none in padding."""
        first = first_token(tokens.valid)
        starts = (starts & tokens.valid) | first
        if probability is None:
            return cls(starts, starts.astype(jnp.float32), tokens.valid)
        probability = jnp.where(first, 1.0, probability.astype(jnp.float32))
        return cls(starts, jnp.where(tokens.valid, probability, 0.0), tokens.valid)

    @classmethod
    def from_ends(
        cls, ends: Bool[Array, "B N"], tokens: TokenSet, probability: Float[Array, "B N"] | None = None
    ) -> Chunks:
        """Chunks that end where `ends` says: the next token starts one. The last real token ends one whatever it says."""
        return cls.create(shifted(ends), tokens, None if probability is None else shifted(probability))

    @property
    def count(self) -> Int[Array, " B"]:
        """`[B]` number of chunks."""
        return jnp.sum(self.starts, axis=-1, dtype=jnp.int32)

    @property
    def boundaries(self) -> Float[Array, "B N"]:
        """`[B, N]` the starts as numbers, with the gradient of `probability` (straight-through)."""
        return relaxations.straight_through(self.starts.astype(jnp.float32), self.probability)


def first_token(valid: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
    """`[B, N]` True at the first real token of each row."""
    return valid & (jnp.cumsum(valid, axis=-1) == 1)


def shifted(values: Array, fill: float = 0) -> Array:
    """`values [B, N]` moved one place on, with `fill` in front."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)), constant_values=fill)


def split_long(starts: Bool[Array, "B N"], tokens: TokenSet, longest: int | None) -> Bool[Array, "B N"]:
    """`starts [B, N]` with more of them, so that no chunk has more than `longest` tokens; no limit when None.

    Raises:
      ValueError: the limit is not positive.
    """
    if longest is None:
        return starts
    if longest < 1:
        raise ValueError(f"a chunk has at least one token; got a limit of {longest}")
    starts = (starts & tokens.valid) | first_token(tokens.valid)
    index = jnp.arange(starts.shape[1])
    begin = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return starts | (tokens.valid & ((index - begin) % longest == 0))


def segments(chunks: Chunks, capacity: int | None = None) -> Int[Array, "B N"]:
    """`[B, N]` number of the chunk that each token is in, from 0; -1 in padding.

    Starts beyond a `capacity` are ignored: the last chunk keeps growing.
    """
    number = jnp.cumsum(chunks.starts, axis=-1, dtype=jnp.int32) - 1
    if capacity is not None:
        number = jnp.minimum(number, capacity - 1)
    return jnp.where(chunks.valid, number, -1)


def lengths(chunks: Chunks, capacity: int | None = None) -> Int[Array, "B M"]:
    """`[B, M]` tokens in each chunk, with M = `capacity` (N when None); 0 in slots without a chunk."""
    capacity = chunks.starts.shape[1] if capacity is None else capacity
    return segment_sum(chunks.valid.astype(jnp.int32), segments(chunks, capacity), capacity)


def segment_sum(values: Array, number: Int[Array, "B N"], slots: int) -> Array:
    """`values [B, N, ...]` summed over the tokens of each chunk: `[B, slots, ...]`; tokens numbered -1 are left out."""

    def row(values: Array, number: Array) -> Array:
        # A slot of its own for what is left out: segment numbers may not be negative.
        return jax.ops.segment_sum(values, jnp.where(number < 0, slots, number), slots + 1)[:slots]

    return jax.vmap(row)(values, number)


def max_pool(features: Float[Array, "B N D"], reduction: Reduction) -> Float[Array, "B M D"]:
    """The largest value of each feature over the tokens that join a slot; 0 in slots that nothing joins."""

    def row(values: Array, number: Array) -> Array:
        slots = reduction.num_slots
        return jax.ops.segment_max(values, jnp.where(number < 0, slots, number), slots + 1)[:slots]

    pooled = jax.vmap(row)(features, reduction.assign)
    return jnp.where((reduction.slots >= 0)[..., None], pooled, 0)


def overflowing(chunks: Chunks, capacity: int) -> Int[Array, " B"]:
    """`[B]` starts that `capacity` slots leave out."""
    return ragged.overflowing(chunks.starts, capacity)


def to_reduction(chunks: Chunks, capacity: int, *, pool: str = "mean") -> Reduction:
    """The reduction to one slot for each chunk, at the position of its first token and with the mass of all its tokens.

    Args:
      chunks: where chunks start.
      capacity: M, static. In a row with more chunks the extra starts are ignored: the last chunk keeps growing.
      pool: "mean" of a chunk's tokens, whose weights carry the gradient of `chunks.probability`; or "first", the first token's
        features alone.

    Raises:
      ValueError: an unknown pool, or a capacity outside 1..N.

    Source: Nawrot et al. 2023 (dynamic pooling); the gradient is that of the public `shortening.py`: moving a
    boundary moves every later token's chunk number g, and a token weighs `1 - (s - g)` in the mean of its chunk s.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}; one of {POOLS}")
    slots = ragged.compact(chunks.starts, capacity, overflow="checked").slots
    number = segments(chunks, capacity)
    if pool == "first":
        heads = chunks.starts & (jnp.cumsum(chunks.starts, axis=-1) <= capacity)
        return Reduction(slots, number, heads.astype(jnp.float32), merges=False, stands_at_head=True)
    boundaries = chunks.boundaries
    kept = jnp.cumsum(chunks.starts, axis=-1) <= capacity
    # A start that is ignored moves no token to another chunk.
    moved = jnp.cumsum(jnp.where(kept, boundaries, jax.lax.stop_gradient(boundaries)), axis=-1)
    one = relaxations.straight_through(chunks.valid.astype(jnp.float32), moved)
    total = segment_sum(one, number, capacity)
    total = jnp.take_along_axis(jnp.where(total > 0, total, 1.0), jnp.maximum(number, 0), axis=1)
    return Reduction(slots, number, jnp.where(chunks.valid, one / total, 0.0), stands_at_head=True)
