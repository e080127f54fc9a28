# SPDX-License-Identifier: Apache-2.0
"""The staircase as masked dense products in float32; what every implementation is compared with.

Shapes: R rows, D features, K units of equal width, U hidden numbers of all units, E outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = jax.lax.Precision.HIGHEST

ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": lambda x: x * jax.lax.logistic(x),
}


def live(rows: int, counts: Int[Array, " K"], hidden: int) -> Array:
    """`[R, U]` True where the row of a hidden number has its unit."""
    return jnp.arange(rows)[:, None] < jnp.repeat(counts, hidden // counts.shape[0])


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
) -> Float[Array, "R E"]:
    """`(live * act(rows up + bias)) down`."""
    rows, up, bias, down = (leaf.astype(jnp.float32) for leaf in (rows, up, bias, down))
    hidden = ACTIVATIONS[activation](jnp.dot(rows, up, precision=_EXACT) + bias)
    hidden = jnp.where(live(rows.shape[0], counts, up.shape[1]), hidden, 0)
    return jnp.dot(hidden, down, precision=_EXACT)


def ragged_prefix_projection(
    rows: Float[Array, "R U"], counts: Int[Array, " K"], down: Float[Array, "U E"]
) -> Float[Array, "R E"]:
    """`(live * rows) down`."""
    rows, down = rows.astype(jnp.float32), down.astype(jnp.float32)
    return jnp.dot(jnp.where(live(rows.shape[0], counts, down.shape[0]), rows, 0), down, precision=_EXACT)
