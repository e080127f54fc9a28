# SPDX-License-Identifier: Apache-2.0
"""Public functions of merging.

Shapes: B batch, N tokens, M slots, D features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.merge import gpu, tpu, xla


def _implementations(kernel, gpu_kernel, plain):
    kernel, gpu_kernel = partition.by_batch(kernel), partition.by_batch(gpu_kernel)
    return {
        "tpu": kernel,
        "gpu": gpu_kernel,
        "xla": plain,
        "interpret": functools.partial(kernel, interpret=True),
        "gpu_interpret": functools.partial(gpu_kernel, interpret=True),
    }


_MERGE = _implementations(tpu.merge, gpu.merge, xla.merge)
_RESTORE = _implementations(tpu.restore, gpu.restore, xla.restore)


def merge(
    values: Array,
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    slots: int,
    *,
    odd_last: bool = False,
    in_order: bool = False,
    implementation: str | None = None,
) -> Array:
    """`out[m] = sum over assign[n] = m of weight[n] values[n]`, `[B, M, ...]` in the dtype of `values`, summed in float32.

    The map is linear in `values` and in `weight` and has both gradients; neither pass holds an M x N matrix in memory.

    Args:
      values: `[B, N, ...]`; "tpu" takes finite float32 and bfloat16 rows of at least 128 numbers, or of at most 7.
      assign: `[B, N]` slot that each token joins, in 0..M-1; -1 when it joins none.
      weight: `[B, N]` its coefficient there.
      slots: M.
      odd_last: a promise that every odd token heads a slot, in order, that those are the last slots, and that each slot before
        them is one even token's own; a kernel then does a part of the work.
      in_order: with `odd_last`, a further promise that the even tokens of those slots stand in their order.
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available. On a GPU "xla" adds in
        no fixed order, so that slots of three tokens or more may differ in the last bit between runs.

    Raises:
      ValueError: shapes do not fit, or M is not positive.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    if values.shape[:2] != assign.shape or weight.shape != assign.shape:
        raise ValueError(
            f"values must be [B, N, ...], assign and weight [B, N]; got {values.shape}, {assign.shape}, {weight.shape}"
        )
    if slots < 1:
        raise ValueError(f"there must be at least one slot; got {slots}")
    flat = values.reshape(*assign.shape, -1)
    out = _merge(flat, assign, weight.astype(jnp.float32), (slots, odd_last, in_order, implementation))
    return out.reshape(out.shape[:2] + values.shape[2:])


def restore(values: Array, assign: Int[Array, "B N"], *, implementation: str | None = None) -> Array:
    """`out[n] = values[assign[n]]`, `[B, N, ...]`: every token gets the row of the slot it joined, or zeros if it joined none.

    Its gradient is `merge` with weights of 1. Arguments and errors are those of `merge`, with `values [B, M, ...]`.
    """
    if values.shape[0] != assign.shape[0] or assign.ndim != 2:
        raise ValueError(f"values must be [B, M, ...] and assign [B, N]; got {values.shape} and {assign.shape}")
    flat = _restore(values.reshape(*values.shape[:2], -1), assign, implementation)
    return flat.reshape(assign.shape + values.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _merge(values, assign, weight, static):
    slots, odd_last, in_order, implementation = static
    options = {"slots": slots, "odd_last": odd_last, "in_order": in_order}
    return dispatch.call("merge", _MERGE, implementation, values, assign, weight, **options)


def _merge_forward(values, assign, weight, static):
    return _merge(values, assign, weight, static), (values, assign, weight)


def _merge_backward(static, saved, moved):
    values, assign, weight = saved
    spread = _restore(moved, assign, static[-1]).astype(jnp.float32)
    weight_gradient = jnp.sum(values.astype(jnp.float32) * spread, axis=-1)
    nothing = np.zeros(assign.shape, jax.dtypes.float0)
    return (weight[..., None] * spread).astype(values.dtype), nothing, weight_gradient


_merge.defvjp(_merge_forward, _merge_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _restore(values, assign, implementation):
    return dispatch.call("restore", _RESTORE, implementation, values, assign)


def _restore_forward(values, assign, implementation):
    return _restore(values, assign, implementation), (assign, values.shape[1])


def _restore_backward(implementation, saved, moved):
    assign, slots = saved
    gradient = _merge(moved, assign, jnp.ones(assign.shape, jnp.float32), (slots, False, False, implementation))
    return gradient, np.zeros(assign.shape, jax.dtypes.float0)


_restore.defvjp(_restore_forward, _restore_backward)
