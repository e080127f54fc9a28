# SPDX-License-Identifier: Apache-2.0
"""T5's relative position bias as a table and positions, from which a kernel makes the bias of the pairs that it works.

Shapes: B batch, Q queries, K keys, H heads, N buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def relative_buckets(
    relative: Int[Array, "..."], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "..."]:
    """Bucket of each relative position `key - query`: exact for small distances, logarithmic up to `max_distance`.

    Args:
      relative: any shape, int; NumPy in, NumPy out.
      bidirectional: half of the buckets are for keys after the query; else such keys share bucket 0.

    Raises:
      ValueError: fewer than two exact buckets' worth of buckets, or a `max_distance` that the exact ones already reach.

    Source: Raffel et al. 2020 (T5), section 2.1; `_relative_position_bucket` of the public code.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"num_buckets={num_buckets} and max_distance={max_distance} leave no logarithmic range: needs "
            f"{'4' if bidirectional else '2'} buckets or more and max_distance over {exact}"
        )
    xp = np if isinstance(relative, np.ndarray) else jnp
    distance = xp.abs(relative) if bidirectional else xp.maximum(-relative, 0)
    # Edges in plain Python make the buckets independent of how a device rounds a float32 logarithm.
    steps = side - exact
    edges = [math.ceil(exact * (max_distance / exact) ** (i / steps) - 1e-9) for i in range(1, steps)]
    far = sum((distance >= edge for edge in edges), xp.full_like(distance, exact))
    bucket = xp.where(distance < exact, distance, far)
    return (bucket + xp.where(relative > 0, side, 0) if bidirectional else bucket).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The bias as a step function of the relative position `key - query`.

    Attributes:
      places: ascending relative positions at which the bucket changes.
      buckets: one more than places: the bucket below the first place, then the one from each place on.
    """

    places: tuple[int, ...]
    buckets: tuple[int, ...]

    def window(self, width: int) -> int:
        """The relative position from which on `width` positions hold the most places behind their first one."""
        return max((place - 1 for place in self.places), key=lambda first: len(self.inside(first, width)))

    def inside(self, first: int, width: int) -> list[int]:
        """Places behind `first` and before `first + width`."""
        return [place for place in self.places if first < place < first + width]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "query_positions", "key_positions"],
    meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class PositionBias:
    """A learned bias for each bucket of relative positions and each head; an immutable pytree.

    Attributes:
      table: `[N, H]`.
      query_positions, key_positions: `[B or 1, Q]`, `[B or 1, K]` int32, in any order and with gaps.
      bidirectional, max_distance: see `relative_buckets`; static.
    """

    table: Float[Array, "N H"]
    query_positions: Int[Array, "b Q"]
    key_positions: Int[Array, "b K"]
    bidirectional: bool = True
    max_distance: int = 128

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B or 1, H, Q, K)`, the shape of `dense()`."""
        batch = max(self.query_positions.shape[0], self.key_positions.shape[0])
        return batch, self.table.shape[1], self.query_positions.shape[1], self.key_positions.shape[1]

    def dense(self) -> Float[Array, "b H Q K"]:
        """The bias of all pairs, in the dtype of the table."""
        relative = self.key_positions[:, None, :] - self.query_positions[:, :, None]
        buckets = relative_buckets(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(jnp.take(self.table, buckets, axis=0), -1, 1)

    def queries(self, rows: slice) -> PositionBias:
        """The bias of some of the queries."""
        return dataclasses.replace(self, query_positions=self.query_positions[:, rows])

    def split(self, batch: int) -> tuple[tuple[Array | None, Array | None], PositionBias]:
        """Positions that each of `batch` rows has for itself, None where rows share them; and the rest, for `joined`."""
        own = tuple(x if x.shape[0] == batch else None for x in (self.query_positions, self.key_positions))
        names = ("query_positions", "key_positions")
        rest = {name: None for name, x in zip(names, own, strict=True) if x is not None}
        return own, dataclasses.replace(self, **rest)

    def joined(self, query_positions: Array | None, key_positions: Array | None) -> PositionBias:
        """The bias that was `split`."""
        given = {"query_positions": query_positions, "key_positions": key_positions}
        return dataclasses.replace(self, **{name: x for name, x in given.items() if x is not None})

    def gradient(self, table: Float[Array, "N H"]) -> PositionBias:
        """A cotangent with the gradient of the table; positions have none."""
        table = table.astype(self.table.dtype)
        return dataclasses.replace(self, table=table, query_positions=None, key_positions=None)

    def steps(self) -> Steps:
        """Where the bucket changes.

        Raises:
          ValueError: as `relative_buckets`.
        """
        relative = np.arange(-self.max_distance - 1, self.max_distance + 2)
        buckets = relative_buckets(
            relative, bidirectional=self.bidirectional, num_buckets=self.table.shape[0], max_distance=self.max_distance
        )
        changes = np.flatnonzero(np.diff(buckets)) + 1
        return Steps(tuple(relative[changes].tolist()), tuple(buckets[[0, *changes]].tolist()))
