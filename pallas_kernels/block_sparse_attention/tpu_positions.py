# SPDX-License-Identifier: Apache-2.0
"""The bias by relative positions in the TPU kernels: found for each square of logits, summed for the table's gradient.

Positions are data with gaps, so a square's relative positions are a difference of a column and a row, and the bias is a table
lookup. A register holds 128 of them: one shuffle of lanes serves all relative positions of a window, in which nearly all
buckets change, and a comparison and a select each of the few other changes. Items whose pairs all lie in the first or in the
last bucket, as most do in long sequences, get a scalar.

Shapes: B batch, L rows, M rows with padding, C blocks, q rows of a block, k x c a square of keys by queries, H heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.tpu_plan import LANES, LOG2E, Plan
from pallas_kernels.position_bias import PositionBias, Steps

# Sublanes and lanes.
REGISTER = (8, LANES)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """How a kernel finds the bias; relative positions count from `first`, the start of the window.

    Attributes:
      steps: where the bucket changes. own_queries: whether the own side is that of queries.
    """

    steps: Steps
    first: int
    own_queries: bool

    @property
    def places(self) -> list[int]:
        """Places as differences of a kernel's positions."""
        return [place - self.first for place in self.steps.places]


def add(
    args: dict[str, Any],
    specs: dict[str, Any],
    bias: PositionBias | None,
    plan: Plan,
    *,
    own_queries: bool,
    table_gradient: bool = False,
) -> Lookup | None:
    """Adds to a kernel's arguments what it needs for a bias by positions, or for its table's gradient too; None for none."""
    if bias is None:
        return None
    steps = bias.steps()
    lookup = Lookup(steps, steps.window(LANES), own_queries)
    # The window starts at 0 when its start is taken off the keys.
    queries, keys = bias.query_positions.astype(jnp.int32), bias.key_positions.astype(jnp.int32) - lookup.first
    own, listed = (queries, keys) if own_queries else (keys, queries)
    own, listed = _filled(own, plan.own_length), _filled(listed, plan.listed_length)
    if own_queries:
        args["query_positions"] = own[:, None]
        args["key_positions"] = _columns(listed, plan.listed)
        specs["query_positions"] = pl.BlockSpec((None, 1, plan.step_rows), lambda i, j, s: (_at(own, i), 0, s))
    else:
        args["query_positions"] = listed.reshape(listed.shape[0], -1, 1, plan.listed)
        args["key_positions"] = _columns(own, plan.step_rows)
        block = (None, None, plan.step_rows, LANES)
        specs["key_positions"] = pl.BlockSpec(block, lambda i, j, s: (_at(own, i), s, 0, 0))
    whole = args["key_positions" if own_queries else "query_positions"]
    specs["key_positions" if own_queries else "query_positions"] = pl.BlockSpec(
        (None, *whole.shape[1:]), lambda i, j, s: (_at(whole, i), 0, 0, 0)
    )
    for name, rows, size in (("own_ranges", own, plan.own), ("listed_ranges", listed, plan.listed)):
        _add_ranges(args, specs, name, rows, size)
        if table_gradient:
            _add_ranges(args, specs, "square_" + name, rows, LANES)
    # Softmax is in base 2.
    table = bias.table.astype(jnp.float32).T * LOG2E
    numbers = np.searchsorted(steps.places, lookup.first + np.arange(LANES), side="right")
    window = table[:, np.asarray(steps.buckets)[numbers]]
    args["window"] = jnp.broadcast_to(window[:, None], (window.shape[0], *REGISTER))
    specs["window"] = pl.BlockSpec((None, *REGISTER), lambda i, j, s: (j, 0, 0))
    args["table"], specs["table"] = table, pl.BlockSpec(memory_space=pltpu.SMEM)
    return lookup


def _add_ranges(args: dict[str, Any], specs: dict[str, Any], name: str, rows: Int[Array, "b M"], size: int) -> None:
    """Adds the least and the greatest position of every `size` rows, in scalar memory."""
    pieces = rows.reshape(rows.shape[0], -1, size)
    ranges = jnp.stack([jnp.min(pieces, axis=-1), jnp.max(pieces, axis=-1)], axis=-1)
    args[name] = ranges.reshape(rows.shape[0], 1, -1)
    specs[name] = pl.BlockSpec(
        (None, 1, args[name].shape[-1]), lambda i, j, s: (_at(rows, i), 0, 0), memory_space=pltpu.SMEM
    )


def far(inputs: Any, lookup: Lookup, own: Any, listed: Any, size: str = "") -> tuple[Any, Any]:
    """Whether all pairs of an own piece and a listed one lie in the first bucket, and whether in the last.

    `size` is "" for blocks, or the prefix of finer pieces.
    """
    ends = [
        (inputs[size + name][0, 2 * piece], inputs[size + name][0, 2 * piece + 1])
        for name, piece in (("own_ranges", own), ("listed_ranges", listed))
    ]
    (least_query, most_query), (least_key, most_key) = ends if lookup.own_queries else ends[::-1]
    return most_key - least_query < lookup.places[0], least_key - most_query >= lookup.places[-1]


def opens(inputs: Any, lookup: Lookup | None, seen: Any, own: Any, listed: Any) -> Any:
    """Whether two blocks whose pairs are all `seen` need no square of a bias either."""
    if lookup is None:
        return seen
    return jnp.logical_and(seen, jnp.logical_or(*far(inputs, lookup, own, listed)))


def constant(inputs: Any, lookup: Lookup, own: Any, listed: Any) -> Any:
    """The bias, in base 2, of two blocks whose pairs all lie in the first or all in the last bucket."""
    head = pl.program_id(1)
    first, last = (inputs["table"][head, lookup.steps.buckets[end]] for end in (0, -1))
    return jnp.where(far(inputs, lookup, own, listed)[1], last, first)


def square(inputs: Any, lookup: Lookup, number: Any, listed: Any, own: Any) -> Float[Array, "k c"]:
    """The bias, in base 2, of `own` rows of a step and the `listed` rows of a listed block; keys are rows, queries columns."""
    if lookup.own_queries:
        keys, queries = inputs["key_positions"][number, listed, :], inputs["query_positions"][:, own]
    else:
        keys, queries = inputs["key_positions"][own, :], inputs["query_positions"][number, :, listed]
    window, head = jnp.broadcast_to(inputs["window"][:1], keys.shape), pl.program_id(1)
    inside = set(lookup.steps.inside(lookup.first, LANES))
    changes = list(
        zip(lookup.places, lookup.steps.places, lookup.steps.buckets, lookup.steps.buckets[1:], strict=False)
    )

    def piece(place: Int[Array, "k 128"]) -> Float[Array, "k 128"]:
        lanes = jnp.clip(place, 0, LANES - 1)
        found = jnp.take_along_axis(window, lanes, axis=1, mode="promise_in_bounds")
        # Changes behind the window, then those before it, each from the nearest on.
        for at, step, _, after in changes:
            if step > lookup.first and step not in inside:
                found = jnp.where(place >= at, inputs["table"][head, after], found)
        for at, step, before, _ in reversed(changes):
            if step <= lookup.first:
                found = jnp.where(place < at, inputs["table"][head, before], found)
        return found

    pieces = [piece(keys - queries[:, lane : lane + LANES]) for lane in range(0, queries.shape[1], LANES)]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def sum_buckets(
    inputs: Any, lookup: Lookup, plan: Plan, dlogits: Any, sums: Any, step: Any, row: Any, start: Any
) -> None:
    """Adds an item's `dlogits [own / c, W, q, c]` to their buckets' `sums [N, 8, 128]`, square by square.

    Squares whose pairs share a bucket are the most, and cost little; of the others each bucket is a difference of two sums.
    """
    row_squares, listed_squares, chunk = plan.own // LANES, plan.listed // LANES, plan.chunk

    def add_square(turn: Any, _: None) -> None:
        t, w, k = turn % row_squares, turn // row_squares // listed_squares, turn // row_squares % listed_squares
        number = inputs["lists"][0][0, row * plan.capacity + start + w]
        rows, lane = pl.ds(pl.multiple_of(k * LANES, LANES), LANES), pl.multiple_of(t * LANES % chunk, LANES)
        x = dlogits[t * LANES // chunk, w, rows, pl.ds(lane, LANES)]
        own, listed = (step * plan.rows + row) * row_squares + t, number * listed_squares + k
        first, last = far(inputs, lookup, own, listed, "square_")

        def far_square() -> None:
            end = jnp.where(last, len(lookup.places), 0)
            sums[end] += _folded(x)

        def near_square() -> None:
            columns = pl.ds(pl.multiple_of(row * plan.own + t * LANES, LANES), LANES)
            place = inputs["key_positions"][number, rows] - inputs["query_positions"][:, columns]
            above = _folded(x)
            for bucket, at in enumerate(lookup.places):
                rest = _folded(jnp.where(place >= at, x, 0.0))
                sums[bucket] += above - rest
                above = rest
            sums[len(lookup.places)] += above

        jax.lax.cond(jnp.logical_or(first, last), far_square, near_square)

    # What idle items leave is no gradient.
    turns = jnp.where(row < plan.rows, row_squares * plan.width * listed_squares, 0)
    jax.lax.fori_loop(0, turns, add_square, None)


def sum_bucket(inputs: Any, lookup: Lookup, dlogits: list[Array], sums: Any, own: Any, listed: Any, real: Any) -> None:
    """Adds all `dlogits` to the one bucket in which two blocks lie."""
    bucket = jnp.where(far(inputs, lookup, own, listed)[1], len(lookup.places), 0)
    pieces = [x[:, lane : lane + LANES] for x in dlogits for lane in range(0, x.shape[1], LANES)]
    total = _folded(sum(pieces[1:], pieces[0]))
    sums[bucket] += jnp.where(real, total, 0.0)


def _folded(x: Float[Array, "k 128"]) -> Float[Array, "8 128"]:
    return jnp.sum(x.reshape(-1, *REGISTER), axis=0)


def table_gradient(sums: Float[Array, "B H N 8 128"], bias: PositionBias) -> Float[Array, "N H"]:
    """The gradient of the table from what `sum_buckets` left."""
    found = jnp.sum(sums, axis=(0, 3, 4)).T
    return jnp.zeros(bias.table.shape, jnp.float32).at[np.asarray(bias.steps().buckets)].set(found)


def _filled(positions: Int[Array, "b L"], length: int) -> Int[Array, "b M"]:
    """Rows that fill up the last block stand where the last one does, so that ranges stay narrow."""
    return jnp.pad(positions, ((0, 0), (0, length - positions.shape[1])), mode="edge")


def _columns(positions: Int[Array, "b M"], block: int) -> Int[Array, "b C q 128"]:
    positions = positions.reshape(positions.shape[0], -1, block, 1)
    return jnp.broadcast_to(positions, (*positions.shape[:3], LANES))


def _at(rows: Array, row: Any) -> Any:
    """The batch row of an array that rows may share."""
    return row if rows.shape[0] > 1 else 0
