# SPDX-License-Identifier: Apache-2.0
"""Public function that merges what is known of tokens beside their features.

Shapes: B batch, N tokens, M slots, C coordinates, N0 tokens of the original sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.merge import facts_tpu, gpu, tpu, xla

# Tokens fewer after the merge.
_FEW = 256


def merge_facts(
    mass: Float[Array, "B N"],
    coords: Float[Array, "B N C"],
    origin: Int[Array, "B N0"],
    heads: Int[Array, "B M"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B M C"], Int[Array, "B N0"]]:
    """Masses added, coordinates summed by weight and pointers followed: `(mass [B, M], coords [B, M, C], origin [B, N0])`.

    Sums are in float32. Gradients flow to masses, coordinates and weights.

    Args:
      mass, coords: `[B, N]` and `[B, N, C]` of each token.
      origin: `[B, N0]` token that carries each original one; -1 for none.
      heads: `[B, M]` one token of each slot, or -1; "tpu" adds the others one by one, so that few of them are fast.
      assign, weight: `[B, N]` as in `merge`.
      implementation: as in `merge`.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    if (
        not mass.shape == assign.shape == weight.shape == coords.shape[:2]
        or heads.shape[:1] != assign.shape[:1]
        or origin.shape[:1] != assign.shape[:1]
    ):
        raise ValueError(
            f"mass, assign and weight must be [B, N], coords [B, N, C], origin [B, N0] and heads [B, M]; got {mass.shape}, "
            f"{assign.shape}, {weight.shape}, {coords.shape}, {origin.shape} and {heads.shape}"
        )
    numbers = (mass.astype(jnp.float32), coords.astype(jnp.float32), weight.astype(jnp.float32))
    mass, merged, origin = _merge(implementation, *numbers, origin, heads, assign)
    return mass, merged.astype(coords.dtype), origin


def _plain(merge: Callable[..., Array]) -> Callable[..., Any]:
    """By an implementation of `merge`, with one sum for masses and coordinates: each is a few numbers a token."""

    def facts(mass: Any, coords: Any, weight: Any, origin: Any, heads: Any, assign: Any, **options: Any) -> Any:
        numbers = jnp.concatenate([mass[..., None], coords * weight[..., None]], axis=-1)
        sums = merge(numbers, assign, jnp.ones_like(weight), slots=heads.shape[1], **options)
        followed = jnp.take_along_axis(assign, jnp.maximum(origin, 0), axis=1)
        return sums[..., 0], sums[..., 1:], jnp.where(origin >= 0, followed, -1)

    return facts


def _tpu(*arrays: Array, interpret: bool = False) -> Any:
    (*_, heads, assign) = arrays
    # Above, products with the whole matrix take less than to add one token after the other.
    few = assign.shape[1] - heads.shape[1] <= _FEW
    kernel = facts_tpu.merge_facts if few else _plain(tpu.merge)
    return kernel(*arrays, interpret=interpret)


_TPU, _GPU = partition.by_batch(_tpu), partition.by_batch(gpu.merge)
_IMPLEMENTATIONS = {
    "tpu": _TPU,
    "gpu": _plain(_GPU),
    "xla": _plain(xla.merge),
    "interpret": functools.partial(_TPU, interpret=True),
    "gpu_interpret": _plain(functools.partial(_GPU, interpret=True)),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merge(implementation, mass, coords, weight, origin, heads, assign):
    arrays = (mass, coords, weight, origin, heads, assign)
    return dispatch.call("merge_facts", _IMPLEMENTATIONS, implementation, *arrays)


def _forward(implementation, mass, coords, weight, origin, heads, assign):
    out = _merge(implementation, mass, coords, weight, origin, heads, assign)
    return out, (coords, weight, assign, origin.shape, heads.shape)


def _backward(implementation, saved, moved):
    coords, weight, assign, *shapes = saved
    spread = xla.restore(jnp.concatenate([moved[0][..., None], moved[1]], axis=-1), assign)
    mass, merged = spread[..., 0], spread[..., 1:]
    nothing = (np.zeros(shape, jax.dtypes.float0) for shape in (*shapes, assign.shape))
    return mass, merged * weight[..., None], jnp.sum(coords * merged, axis=-1), *nothing


_merge.defvjp(_forward, _backward)
