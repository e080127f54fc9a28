# SPDX-License-Identifier: Apache-2.0
"""Public function of bipartite matching.

Shapes: B batch, A left rows, K right rows, C channels, S statistics a row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.bipartite_match import gpu, tpu, xla

METRICS = ("cosine", "dot", "distance")
STATISTICS = ("best", "best_two", "sum")

_TPU, _GPU = partition.by_batch(tpu.bipartite_match), partition.by_batch(gpu.bipartite_match)
_IMPLEMENTATIONS = {
    "tpu": _TPU,
    "gpu": _GPU,
    "gpu_interpret": functools.partial(_GPU, interpret=True),
    "xla": xla.bipartite_match,
    "interpret": functools.partial(_TPU, interpret=True),
}


def bipartite_match(
    left: Float[Array, "B A C"],
    right: Float[Array, "B K C"],
    *,
    bias: Float[Array, "B K"] | None = None,
    metric: str = "cosine",
    statistic: str = "best",
    implementation: str | None = None,
) -> tuple[Float[Array, "B A S"], Int[Array, "B A S"]]:
    """The right rows that are most similar to each left row: `(value [B, A, S] float32, index [B, A, S] int32)`.

    The A x K similarities are made block by block and never held together. Ties go to the lower index. No gradient flows.

    Args:
      left, right: `[B, A, C]` and `[B, K, C]`.
      bias: `[B, K]` added to the similarity with each right row; -inf removes it. Where none is left the index is 0 and
        the value -inf.
      metric: "cosine" (a zero vector is similar to nothing: 0), "dot", or "distance" (minus the squared distance).
      statistic: "best" (S = 1), "best_two" (S = 2, best first), or "sum" over the right rows that are not removed (S = 1, index
        0, removed-only rows 0).
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available.

    Raises:
      ValueError: shapes do not fit, no right row (two for "best_two"), an unknown metric or statistic.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    _check(left, right, bias, metric, statistic)
    left, right = jax.lax.stop_gradient((left, right))
    bias = jnp.zeros(right.shape[:2], jnp.float32) if bias is None else bias.astype(jnp.float32)
    bias = jax.lax.stop_gradient(bias)
    return dispatch.call(
        "bipartite_match", _IMPLEMENTATIONS, implementation, left, right, bias, metric=metric, statistic=statistic
    )


def _check(left: Array, right: Array, bias: Array | None, metric: str, statistic: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not one of {METRICS}")
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r} is not one of {STATISTICS}")
    if left.ndim != 3 or right.ndim != 3 or left.shape[::2] != right.shape[::2]:
        raise ValueError(f"left and right must be [B, A, C] and [B, K, C]; got {left.shape} and {right.shape}")
    least = 2 if statistic == "best_two" else 1
    if right.shape[1] < least:
        raise ValueError(f"statistic={statistic!r} needs at least {least} right rows; got {right.shape[1]}")
    if bias is not None and bias.shape != right.shape[:2]:
        raise ValueError(f"bias must be [B, K] = {right.shape[:2]}; got {bias.shape}")
