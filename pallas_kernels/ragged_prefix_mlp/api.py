# SPDX-License-Identifier: Apache-2.0
"""Public functions of the staircase.

Shapes: R rows, D features, K units of equal width, U hidden numbers of all units, E outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.ragged_prefix_mlp import gpu, tpu, xla
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS
from pallas_kernels.ragged_prefix_mlp.sort import permute


def _of_sorted_rows(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel that takes sorted rows, with rows sorted before it and put back behind it, and added to the base."""

    def run(
        rows: Array, *arguments: Array, places: tuple[Array, Array] | None, base: Array | None, **options: Any
    ) -> Array:
        if places is None:
            out = kernel(rows, *arguments, **options)
        else:
            order, inverse = places
            out = permute(kernel(permute(rows, order, inverse), *arguments, **options), inverse, order)
        return out if base is None else base + out

    return run


_MLP = {
    "tpu": _of_sorted_rows(tpu.ragged_prefix_mlp),
    "gpu": _of_sorted_rows(gpu.ragged_prefix_mlp),
    "gpu_interpret": _of_sorted_rows(functools.partial(gpu.ragged_prefix_mlp, interpret=True)),
    "xla": xla.ragged_prefix_mlp,
    "interpret": _of_sorted_rows(functools.partial(tpu.ragged_prefix_mlp, interpret=True)),
}
_PROJECTION = {
    "tpu": tpu.ragged_prefix_projection,
    "gpu": gpu.ragged_prefix_projection,
    "gpu_interpret": functools.partial(gpu.ragged_prefix_projection, interpret=True),
    "xla": xla.ragged_prefix_projection,
    "interpret": functools.partial(tpu.ragged_prefix_projection, interpret=True),
}


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str = "gelu_tanh",
    places: tuple[Int[Array, " R"], Int[Array, " R"]] | None = None,
    base: Float[Array, "R E"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R E"]:
    """`sum over units k with counts[k] > i of act(rows[i] up_k + bias_k) down_k`, `[R, E]` in the dtype of `rows`.

    Work grows with the sum of the counts: tiles of rows in which a unit has no row are skipped. Products are summed in
    float32; the backward pass computes the hidden layer again.

    Args:
      rows: `[R, D]`, those that need most units first (see `places`); rows past `counts[0]` are not looked at.
      counts: `[K]` rows that each unit runs on, never rising, in 0..R (traced values cannot be checked).
      up, bias, down: weights of all units side by side; unit k is columns `k U / K` to `(k + 1) U / K`.
      activation: "gelu_tanh", "relu", "silu", or "identity" for a map of low rank.
      places: `(order, inverse)` as `counting_sort` gives them, for rows in any order; the result is then in theirs. None for
        rows that are sorted.
      base: `[R, E]` in the dtype of `rows`, what the sum is added to, such as that of units which run on all rows.
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available. Under several devices
        call it inside a `shard_map`: rows are sorted among those of one device.

    Raises:
      ValueError: shapes do not fit, or an unknown activation.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {tuple(ACTIVATIONS)}")
    _check(rows, counts, down.shape[0], down)
    if up.shape != (rows.shape[1], down.shape[0]) or bias.shape != down.shape[:1]:
        want = (rows.shape[1], down.shape[0])
        raise ValueError(f"up must be [D, U] = {want} and bias [U]; got {up.shape} and {bias.shape}")
    if places is not None and any(place.shape != rows.shape[:1] for place in places):
        raise ValueError(f"places must be two of [R] = {rows.shape[:1]}; got {[place.shape for place in places]}")
    if base is not None and (base.shape, base.dtype) != ((rows.shape[0], down.shape[1]), rows.dtype):
        raise ValueError(f"base must be [R, E] in {rows.dtype}; got {base.dtype} {base.shape}")
    # NumPy arrays have no updates in place, which the loops make.
    rows, up, bias, down = map(jnp.asarray, (rows, up, bias, down))
    options = {"activation": activation, "places": places, "base": base}
    return dispatch.call("ragged_prefix_mlp", _MLP, implementation, rows, counts, up, bias, down, **options)


def ragged_prefix_projection(
    rows: Float[Array, "R U"],
    counts: Int[Array, " K"],
    down: Float[Array, "U E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R E"]:
    """`sum over units k with counts[k] > i of rows[i, unit k] down_k`, `[R, E]`: the staircase over one product.

    `rows [R, U]` holds what the units made, side by side (heads of attention, or a hidden layer); other arguments and errors
    are those of `ragged_prefix_mlp`.
    """
    _check(rows, counts, rows.shape[-1], down)
    return dispatch.call("ragged_prefix_projection", _PROJECTION, implementation, rows, counts, down)


def _check(rows: Array, counts: Array, hidden: int, down: Array) -> None:
    if rows.ndim != 2 or down.ndim != 2 or down.shape[0] != hidden:
        raise ValueError(f"rows must be [R, .] and down [U, E]; got {rows.shape} and {down.shape} with U = {hidden}")
    if counts.ndim != 1 or not jnp.issubdtype(counts.dtype, jnp.integer) or hidden % max(counts.shape[0], 1):
        raise ValueError(
            f"counts must be integers [K] with K dividing the hidden width {hidden}; got {counts.dtype} {counts.shape}"
        )
