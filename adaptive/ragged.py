# SPDX-License-Identifier: Apache-2.0
"""Adaptive amounts of work under static shapes: compaction, the bucket ladder, the ragged prefix.

Shapes: B batch, N tokens, M slots (a static capacity), R rows, D features.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.tokens import Reduction
from pallas_kernels import compact as compaction
from pallas_kernels import ragged_prefix_mlp as prefix

# --- Compaction ---------------------------------------------------------------------------------------------------


def compact(
    keep: Bool[Array, "B N"], capacity: int, *, overflow: str, scores: Float[Array, "B N"] | None = None
) -> Reduction:
    """Left-packs the kept tokens into `capacity` slots, in their order; slots that stay empty have index -1 and mass 0.

    Args:
      keep: `[B, N]` bool.
      capacity: M, static.
      overflow: what happens in a row that keeps more than M tokens. "forbid": cannot happen, since M = N is demanded at trace
        time; "best": the M highest `scores` stay; "checked": the caller has made sure that every row fits (the ladder does).
      scores: `[B, N]`, for "best".

    Raises:
      ValueError: unknown policy, capacity outside 1..N, "forbid" with M < N, "best" without scores.
    """
    length = keep.shape[-1]
    if not 1 <= capacity <= length:
        raise ValueError(f"the capacity must lie in 1..{length} (the tokens there are); got {capacity}")
    if overflow == "forbid" and capacity < length:
        raise ValueError(
            f"overflow='forbid' needs a capacity of {length}, so that no row can overflow; got {capacity}. "
            f"Choose 'best' (keeps the highest scores) or run on a ladder."
        )
    if overflow == "best":
        if scores is None:
            raise ValueError("overflow='best' needs scores [B, N] to choose by")
        keep &= rank(jnp.where(keep, scores, -jnp.inf)) < capacity
    elif overflow not in ("forbid", "checked"):
        raise ValueError(f"unknown overflow policy {overflow!r}; one of 'forbid', 'best', 'checked'")
    packing = compaction.pack(keep, capacity)
    weight = (packing.place >= 0).astype(jnp.float32)
    return Reduction(packing.source, packing.place, weight, merges=False, packed=True)


def rank(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """`[B, N]` place of each token by falling score, 0 for the highest; ties go to the lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def overflowing(keep: Bool[Array, "B N"], capacity: int) -> Int[Array, " B"]:
    """`[B]` tokens that do not fit into `capacity` slots."""
    return jnp.maximum(jnp.sum(keep, axis=-1, dtype=jnp.int32) - capacity, 0)


# --- Bucket ladder ------------------------------------------------------------------------------------------------


def make_rungs(length: int, *, steps: int = 4, multiple: int = 128) -> tuple[int, ...]:
    """Static lengths for at most `steps` compiled programs: equal steps up to `length`, each rounded up to `multiple`.

    The last rung is `length` itself, so that every count fits.

    Raises:
      ValueError: a number is not positive.
    """
    if min(length, steps, multiple) < 1:
        raise ValueError(f"length, steps and multiple must be positive; got {length}, {steps}, {multiple}")
    rounded = {-(-length * step // steps // multiple) * multiple for step in range(1, steps + 1)}
    return (*sorted(rung for rung in rounded if rung < length), length)


def check_rungs(rungs: Sequence[int], length: int) -> tuple[int, ...]:
    """The rungs that sequences of `length` tokens can need, the last of them cut to `length`.

    Raises:
      ValueError: rungs that do not rise, or a sequence longer than the ladder.
    """
    rungs = tuple(int(rung) for rung in rungs)
    if not rungs or rungs[0] < 1 or any(low >= high for low, high in itertools.pairwise(rungs)):
        raise ValueError(f"the rungs of a ladder rise and are positive; got {rungs}")
    if length > rungs[-1]:
        raise ValueError(
            f"the sequence has {length} tokens but the ladder ends at {rungs[-1]}; add a rung of at least {length}, "
            f"or cut the sequence"
        )
    lower = [rung for rung in rungs if rung < length]
    return (*lower, length)


def choose_rung(counts: Int[Array, " B"], rungs: Sequence[int]) -> Int[Array, ""]:
    """Index of the smallest rung that holds every row of the batch; `counts [B]` tokens a row."""
    # lax.switch clamps silently, so the last rung must hold every possible count: check_rungs sees to that.
    return jnp.searchsorted(jnp.asarray(rungs), jnp.max(counts)).astype(jnp.int32)


def on_ladder(
    work: Callable[..., Any],
    keep: Bool[Array, "B N"],
    rungs: Sequence[int],
    *operands: Any,
    reduce: Callable[[Any, int], Reduction] | None = None,
    source: Any = None,
    switch: Callable = jax.lax.switch,
) -> Any:
    """Runs `work(reduction, *operands)` at the smallest rung that holds every row's kept tokens.

    The rung is chosen on the device, with no host round trip; only its branch runs. Do not put it under `vmap`: every branch
    would run. Under automatic sharding the slowest row of the global batch sets the rung; under `shard_map` each device
    picks its own, and `work` may then hold no collective.

    Args:
      work: gets the reduction to the rung's length; its outputs must have the same shapes at every rung.
      keep: `[B, N]` bool, tokens that head a slot: those that survive, or the starts of chunks.
      rungs: rising static lengths, the last at least N.
      operands: arrays for `work`.
      reduce: `(source, rung) -> Reduction` to that many slots; the compaction of the kept tokens when None.
      source: pytree of arrays that `reduce` reads; `keep` when None.
      switch: `jax.lax.switch`, or a bound lifted form of it for Linen modules.

    Raises:
      ValueError: the sequence is longer than the ladder.
    """
    rungs = check_rungs(rungs, keep.shape[-1])
    reduce = functools.partial(compact, overflow="checked") if reduce is None else reduce
    source = keep if source is None else source

    def branch(rung: int, source: Any, *operands: Any) -> Any:
        return work(reduce(source, rung), *operands)

    if len(rungs) == 1:
        return branch(rungs[0], source, *operands)
    index = choose_rung(jnp.sum(keep, axis=-1), rungs)
    return switch(index, [functools.partial(branch, rung) for rung in rungs], source, *operands)


def padding_waste(counts: Int[Array, " B"], rungs: Sequence[int]) -> Float[Array, ""]:
    """Share of the chosen rung's slots that hold no token, in 0..1."""
    rung = jnp.asarray(rungs)[choose_rung(counts, rungs)]
    return 1.0 - jnp.mean(counts.astype(jnp.float32)) / rung


# --- Ragged prefix ------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Staircase:
    """Rows sorted by how many units of work they need, most first.

    Attributes:
      order: `[R]` row at each sorted place; inverse: `[R]` sorted place of each row.
      counts: `[K]` rows that need unit k; it never rises with k.
    """

    order: Int[Array, " R"]
    inverse: Int[Array, " R"]
    counts: Int[Array, " K"]

    @classmethod
    def create(cls, need: Int[Array, " R"], units: int) -> Staircase:
        """The staircase of rows that need `need [R]` units each, in 0..`units`."""
        return cls(*prefix.counting_sort(need, units))

    def sort(self, rows: Array) -> Array:
        """`rows [R, ...]` in the order of the staircase."""
        return prefix.permute(rows, self.order, self.inverse)

    def unsort(self, rows: Array) -> Array:
        """Sorted `rows [R, ...]` back where they came from."""
        return prefix.permute(rows, self.inverse, self.order)


def ragged_prefix(
    unit: Callable[[Any, Float[Array, "T D"]], Float[Array, "T E"]],
    params: Any,
    rows: Float[Array, "R D"],
    count: Int[Array, ""],
    *,
    tile: int = 128,
) -> Float[Array, "R E"]:
    """`unit(params, rows)` on the first `count` rows, zeros below; work grows with `count`, in steps of `tile` rows.

    Plain XLA: a loop over tiles with a trip count known only on the device. The backward pass runs the same loop, computing
    each tile again, so nothing but the inputs is kept.

    Args:
      unit: works on each row by itself: `[T, D] -> [T, E]`.
      params: pytree of float arrays.
      rows: `[R, D]`, sorted so that those with work come first.
      count: scalar in 0..R, may be traced (a traced count cannot be checked).
      tile: rows a step.

    Raises:
      ValueError: the tile is not positive, rows is not a matrix, or a Python count lies outside 0..R.
    """
    if tile < 1:
        raise ValueError(f"the tile must hold at least one row; got {tile}")
    if rows.ndim != 2:
        raise ValueError(f"rows must be [R, D]; got shape {rows.shape}")
    length = rows.shape[0]
    if isinstance(count, int) and not 0 <= count <= length:
        raise ValueError(f"count must lie in 0..{length} (the rows there are); got {count}")
    return prefix.prefix_loop(unit, params, rows, count, tile=tile)


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    stairs: Staircase,
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str = "gelu_tanh",
    base: Float[Array, "R E"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R E"]:
    """An MLP whose hidden layer is divided into K units, of which each row runs the first that it needs: `[R, E]`.

    Rows stand in any order, and so does the result. Arguments, cost and errors are those of
    `pallas_kernels.ragged_prefix_mlp`.
    """
    options = {"activation": activation, "base": base, "implementation": implementation}
    places = (stairs.order, stairs.inverse)
    return prefix.ragged_prefix_mlp(rows, stairs.counts, up, bias, down, places=places, **options)
