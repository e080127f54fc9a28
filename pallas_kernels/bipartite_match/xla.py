# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching in plain JAX: a running statistic over blocks of right rows.

Shapes: B batch, A left rows, K right rows, C channels, S statistics a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bipartite_match import reference

# Right rows whose similarities exist at a time; below that many there is no loop.
_BLOCK = 1024


def bipartite_match(
    left: Float[Array, "B A C"], right: Float[Array, "B K C"], bias: Float[Array, "B K"], *, metric: str, statistic: str
) -> tuple[Float[Array, "B A S"], Int[Array, "B A S"]]:
    """The statistic, `_BLOCK` right rows at a time."""
    batch, rows, columns = left.shape[0], left.shape[1], right.shape[1]
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    if metric == "cosine":
        left, right = reference.unit(left), reference.unit(right)
    shift = -reference.square(left)[..., None] if metric == "distance" else 0.0
    if metric == "distance":
        bias, left = bias - reference.square(right), 2 * left
    if columns <= _BLOCK:
        value, index = _block(left, right, bias, shift, statistic)
        return value, _index(value, index, statistic)
    right = _split(jnp.pad(right, ((0, 0), (0, -columns % _BLOCK), (0, 0))))
    bias = _split(jnp.pad(bias, ((0, 0), (0, -columns % _BLOCK)), constant_values=-jnp.inf))

    def step(best: tuple, own: tuple) -> tuple[tuple, None]:
        start, own_right, own_bias = own
        value, index = _block(left, own_right, own_bias, shift, statistic)
        if statistic == "sum":
            return (best[0] + value, best[1]), None
        # What was found before stands first, so that it wins ties.
        both = jnp.concatenate([best[0], value], axis=-1)
        value, pick = jax.lax.top_k(both, value.shape[-1])
        return (value, jnp.take_along_axis(jnp.concatenate([best[1], index + start], axis=-1), pick, axis=-1)), None

    kept = 2 if statistic == "best_two" else 1
    empty = 0.0 if statistic == "sum" else -jnp.inf
    start = (jnp.full((batch, rows, kept), empty, jnp.float32), jnp.zeros((batch, rows, kept), jnp.int32))
    starts = jnp.arange(0, columns, _BLOCK, dtype=jnp.int32)
    (value, index), _ = jax.lax.scan(step, start, (starts, right, bias))
    return value, _index(value, index, statistic)


def _split(array: Array) -> Array:
    """`[B, K, ...]` as blocks `[K / _BLOCK, B, _BLOCK, ...]`."""
    return jnp.moveaxis(array.reshape(array.shape[0], -1, _BLOCK, *array.shape[2:]), 1, 0)


def _index(value: Array, index: Array, statistic: str) -> Array:
    return jnp.zeros_like(index) if statistic == "sum" else jnp.where(jnp.isneginf(value), 0, index)


def _block(left: Array, right: Array, bias: Array, shift: Array | float, statistic: str) -> tuple[Array, Array]:
    """The statistic over one block."""
    scores = jnp.einsum("bac,bkc->bak", left, right, precision=jax.lax.Precision.HIGHEST)
    scores = scores + bias[:, None, :] + shift
    if statistic == "sum":
        total = jnp.sum(jnp.where(jnp.isneginf(scores), 0, scores), axis=-1, keepdims=True)
        return total, jnp.zeros(total.shape, jnp.int32)
    first = jnp.argmax(scores, axis=-1).astype(jnp.int32)[..., None]
    best = jnp.max(scores, axis=-1, keepdims=True)
    if statistic == "best":
        return best, first
    scores = jnp.where(jnp.arange(scores.shape[-1]) == first, -jnp.inf, scores)
    second = jnp.argmax(scores, axis=-1).astype(jnp.int32)[..., None]
    value = jnp.concatenate([best, jnp.max(scores, axis=-1, keepdims=True)], axis=-1)
    return value, jnp.concatenate([first, second], axis=-1)
