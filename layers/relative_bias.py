# SPDX-License-Identifier: Apache-2.0
"""T5's relative position bias from arbitrary positions, so that survivors of a reduction keep theirs.

Shapes: B batch, Q queries, K keys, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from layers.linear import Initializer


def relative_buckets(
    relative: Int[Array, "..."], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "..."]:
    """Bucket of each relative position `key - query`: exact for small distances, logarithmic up to `max_distance`.

    Args:
      relative: any shape, int.
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
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    # Thresholds in plain Python make the buckets independent of how a device rounds a float32 logarithm.
    steps = side - exact
    edges = [math.ceil(exact * (max_distance / exact) ** (i / steps) - 1e-9) for i in range(1, steps)]
    far = exact + jnp.searchsorted(jnp.asarray(edges, jnp.int32), distance, side="right", method="compare_all")
    bucket = jnp.where(distance < exact, distance, far)
    return (bucket + jnp.where(relative > 0, side, 0) if bidirectional else bucket).astype(jnp.int32)


class RelativeBias(nn.Module):
    """A learned bias for each bucket and head: `(query_positions, key_positions) -> [B or 1, H, Q, K]`.

    Attributes:
      heads: H.
      bidirectional: see `relative_buckets`.
      dtype: of the result; the table stays in `param_dtype`.
    """

    heads: int
    bidirectional: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, query_positions: Num[Array, "b Q"], key_positions: Num[Array, "b K"]) -> Float[Array, "b H Q K"]:
        """Positions are `[B or 1, Q]` and `[B or 1, K]`; floats (means of merged tokens) are rounded."""
        table = self.param(
            "embedding",
            nn.with_logical_partitioning(self.embedding_init, ("buckets", "heads")),
            (self.num_buckets, self.heads),
            self.param_dtype,
        )
        relative = _integers(key_positions)[:, None, :] - _integers(query_positions)[:, :, None]
        buckets = relative_buckets(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(jnp.take(table.astype(self.dtype), buckets, axis=0), -1, 1)


def _integers(positions: Num[Array, "b N"]) -> Int[Array, "b N"]:
    if jnp.issubdtype(positions.dtype, jnp.floating):
        positions = jnp.round(positions)
    return positions.astype(jnp.int32)
