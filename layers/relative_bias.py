# SPDX-License-Identifier: Apache-2.0
"""T5's relative position bias from arbitrary positions, so that survivors of a reduction keep theirs.

Shapes: B batch, Q queries, K keys, H heads.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from layers.linear import Initializer
from pallas_kernels import dispatch
from pallas_kernels.position_bias import PositionBias


class RelativeBias(nn.Module):
    """A learned bias for each bucket and head: `(query_positions, key_positions) -> [B or 1, H, Q, K]`.

    Attributes:
      heads: H.
      bidirectional, num_buckets, max_distance: see `pallas_kernels.position_bias.relative_buckets`.
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
    def __call__(
        self, query_positions: Num[Array, "b Q"], key_positions: Num[Array, "b K"], *, dense: bool = True
    ) -> Float[Array, "b H Q K"] | PositionBias:
        """Positions are `[B or 1, Q]` and `[B or 1, K]`; floats (means of merged tokens) are rounded.

        The bias of all pairs, or when not `dense` what attention makes it from where it is used.
        """
        table = self.param(
            "embedding",
            nn.with_logical_partitioning(self.embedding_init, ("buckets", "heads")),
            (self.num_buckets, self.heads),
            self.param_dtype,
        )
        positions = _integers(query_positions), _integers(key_positions)
        bias = PositionBias(table.astype(self.dtype), *positions, self.bidirectional, self.max_distance)
        return bias.dense() if dense else bias


def by_kernels() -> bool:
    """Whether attention runs by kernels, which need no dense bias; plain JAX makes it once for all layers that share it."""
    return dispatch.preference()[0] != "xla"


def _integers(positions: Num[Array, "b N"]) -> Int[Array, "b N"]:
    if jnp.issubdtype(positions.dtype, jnp.floating):
        positions = jnp.round(positions)
    return positions.astype(jnp.int32)
