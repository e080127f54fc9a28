# SPDX-License-Identifier: Apache-2.0
"""The gradient that all implementations share: each brings a forward and a backward pass over lists.

With p = exp(s - lse) and delta_i = sum(dout_i out_i) - dlse_i, the gradient of the logits is p (dout v - delta). A sink has
the logit s_h in every row and no value, so its gradient is -sum_i exp(s_h - lse_i) delta_i.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.position_bias import PositionBias


@dataclasses.dataclass(frozen=True)
class Passes:
    """An implementation. Both take `(query, key, value, index, key_bias, sinks)` with `causal`, `scale` and any `bias` by name.

    Attributes:
      forward: gives `(out [B, N, H, d], lse [B, H, N])`.
      backward: also takes `lse`, `delta` (`[B, H, N]`; lse is finite) and `dout`; gives gradients of query, key, value in
        their dtypes, of key_bias (None without one) and, where there is a bias, of its table in float32.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    passes: Passes,
    causal: bool,
    scale: float,
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    sinks: Float[Array, " H"] | None,
    bias: PositionBias | None = None,
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """`(out, lse)` by one implementation's forward pass, differentiated by its backward pass."""
    options = _options(causal, scale, bias)
    return passes.forward(query, key, value, index, key_bias, sinks, **options)


def _options(causal: bool, scale: float, bias: PositionBias | None) -> dict[str, Any]:
    """By name; without a `bias` it is not named, as not every implementation knows it."""
    return {"causal": causal, "scale": scale} | ({} if bias is None else {"bias": bias})


def _forward(passes: Passes, causal: bool, scale: float, *args: Any) -> tuple[Any, Any]:
    *arrays, bias = args
    options = _options(causal, scale, bias)
    out, lse = passes.forward(*arrays, **options)
    # What the backward pass cannot do is said here, where another implementation can still be chosen.
    jax.eval_shape(functools.partial(passes.backward, **options), *arrays, lse, lse, out)
    return (out, lse), (*args, out, lse)


def _backward(passes: Passes, causal: bool, scale: float, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    *args, bias, out, lse = residuals
    key_bias, sinks = args[4:]
    dout, dlse = cotangents
    delta = jnp.einsum("bnhd,bnhd->bhn", dout, out, preferred_element_type=jnp.float32) - dlse
    # A row with nothing in it has no weights, whatever stands here.
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    dquery, dkey, dvalue, dkey_bias, *dtable = passes.backward(*args, lse, delta, dout, **_options(causal, scale, bias))
    if key_bias is not None:
        dkey_bias = dkey_bias.astype(key_bias.dtype)
    dsinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse)
        dsinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    dbias = None if bias is None else bias.gradient(dtable[0])
    return (dquery, dkey, dvalue, None, dkey_bias, dsinks, dbias)


attend.defvjp(_forward, _backward)
