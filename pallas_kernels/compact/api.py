# SPDX-License-Identifier: Apache-2.0
"""Public functions of stream compaction.

Shapes: B batch, N tokens, M slots (a static capacity), D features.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.compact import tpu, xla


def _implementations(kernel, plain):
    kernel = partition.by_batch(kernel)
    gather = dispatch.left_to_xla("a gather of rows, which XLA makes one kernel of that moves each row once")
    return {"tpu": kernel, "gpu": gather, "xla": plain, "interpret": functools.partial(kernel, interpret=True)}


_COMPACT = _implementations(tpu.compact, xla.compact)
_EXPAND = _implementations(tpu.expand, xla.expand)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("source", "place"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Packing:
    """Which token stands in which slot, in the tokens' order, without gaps; both directions.

    Attributes:
      source: `[B, M]` int32, token in each slot; -1 in the empty slots at the end.
      place: `[B, N]` int32, slot of each token; -1 for tokens that are not kept.
    """

    source: Int[Array, "B M"]
    place: Int[Array, "B N"]


def pack(keep: Bool[Array, "B N"], capacity: int) -> Packing:
    """The packing of the kept tokens of `keep [B, N]` into M = `capacity` slots; kept tokens past the M-th are dropped.

    Raises:
      ValueError: keep is not a boolean matrix, or the capacity lies outside 1..N.
    """
    if keep.ndim != 2 or keep.dtype != bool:
        raise ValueError(f"keep must be a bool array [B, N]; got {keep.dtype} {keep.shape}")
    length = keep.shape[1]
    if not 1 <= capacity <= length:
        raise ValueError(f"the capacity must lie in 1..{length} (the tokens there are); got {capacity}")
    index = jnp.arange(length, dtype=jnp.int32)
    # Sorting plain numbers is many times faster than argsort, which carries a second operand along.
    source = jnp.sort(jnp.where(keep, index, length), axis=-1)[:, :capacity]
    place = jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1
    place = jnp.where(keep & (place < capacity), place, -1)
    return Packing(jnp.where(source < length, source, -1), place)


def compact(values: Array, packing: Packing, *, implementation: str | None = None) -> Array:
    """The packed rows `[B, M, ...]` of `values [B, N, ...]`, bit for bit; empty slots are zero.

    Its gradient is `expand`, so that no pass scatters.

    Args:
      values: `[B, N, ...]` of any dtype; "tpu" takes finite float32 and bfloat16 rows of at least 128 numbers.
      packing: from `pack`.
      implementation: "tpu", "xla", "interpret", or None for the best available, which on a GPU is "xla".

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    _check("values", values, packing.place, "[B, N, ...]")
    return _moved(_compact, values, packing, implementation)


def expand(values: Array, packing: Packing, fill: Array | None = None, *, implementation: str | None = None) -> Array:
    """The inverse: `[B, N, ...]` with each kept token's row of `values [B, M, ...]`; the others get `fill`, or zeros.

    Its gradient is `compact`. Arguments and errors are those of `compact`; `fill [B, N, ...]` has the result's shape.
    """
    _check("values", values, packing.source, "[B, M, ...]")
    spread = _moved(_expand, values, packing, implementation)
    if fill is None:
        return spread
    if fill.shape != spread.shape:
        raise ValueError(f"fill must be [B, N, ...] = {spread.shape}; got {fill.shape}")
    kept = packing.place.reshape(packing.place.shape + (1,) * (fill.ndim - 2)) >= 0
    return jnp.where(kept, spread, fill)


def _check(name: str, values: Array, index: Array, form: str) -> None:
    if values.shape[:2] != index.shape:
        raise ValueError(f"{name} must be {form} with {index.shape} in front; got {values.shape}")


def _moved(move, values: Array, packing: Packing, implementation: str | None) -> Array:
    """`move` on rows flattened to `[B, ., D]`."""
    flat = move(values.reshape(*values.shape[:2], -1), packing, implementation)
    return flat.reshape(flat.shape[:2] + values.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _compact(values: Array, packing: Packing, implementation: str | None) -> Array:
    return dispatch.call("compact", _COMPACT, implementation, values, packing.source, packing.place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _expand(values: Array, packing: Packing, implementation: str | None) -> Array:
    return dispatch.call("expand", _EXPAND, implementation, values, packing.source, packing.place)


def _no_gradient(packing: Packing) -> Packing:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), packing)


def _forward(move):
    return lambda values, packing, implementation: (move(values, packing, implementation), packing)


def _backward(move):
    return lambda implementation, packing, moved: (move(moved, packing, implementation), _no_gradient(packing))


_compact.defvjp(_forward(_compact), _backward(_expand))
_expand.defvjp(_forward(_expand), _backward(_compact))
