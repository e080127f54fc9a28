# SPDX-License-Identifier: Apache-2.0
"""Differentiable stand-ins for discrete choices: straight-through, Gumbel noise, soft top-k.

Everything random takes a key; everything here computes in float32 unless given float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def straight_through(hard: Array, soft: Array) -> Array:
    """`hard` in the forward pass, the gradient of `soft` in the backward pass; both of one shape.

    Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
    """
    if hard.shape != soft.shape:
        raise ValueError(f"hard and soft must have one shape; got {hard.shape} and {soft.shape}")
    return _straight_through(hard.astype(soft.dtype), soft)


@jax.custom_jvp
def _straight_through(hard: Array, soft: Array) -> Array:
    # Not soft + stop_gradient(hard - soft): that sum rounds, and a mask of 0.99999994 is no mask.
    del soft
    return hard


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[0], tangents[1]


def gumbel(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard Gumbel noise `-log(-log U)` of `shape`, float32."""
    return jax.random.gumbel(key, shape, jnp.float32)


def gumbel_softmax(
    logits: Float[Array, "... K"], key: Array, *, temperature: float = 1.0, hard: bool = False
) -> Float[Array, "... K"]:
    """A relaxed one-hot sample over the last axis of `logits`; exactly one-hot in the forward pass when `hard`.

    Raises:
      ValueError: the temperature is not positive.

    Source: Jang et al. 2017, eq. 2; Maddison et al. 2017.
    """
    _positive(temperature)
    soft = jax.nn.softmax((logits + gumbel(key, logits.shape)) / temperature, axis=-1)
    if not hard:
        return soft
    return straight_through(jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1], dtype=soft.dtype), soft)


def gumbel_sigmoid(
    logits: Float[Array, "..."], key: Array, *, temperature: float = 1.0, hard: bool = False
) -> Float[Array, "..."]:
    """A relaxed Bernoulli sample with success log-odds `logits`; exactly 0 or 1 in the forward pass when `hard`.

    Raises:
      ValueError: the temperature is not positive.

    Source: Maddison et al. 2017, "The concrete distribution", appendix B (binary case).
    """
    _positive(temperature)
    # The difference of two Gumbel variables is logistic.
    soft = jax.nn.sigmoid((logits + jax.random.logistic(key, logits.shape, jnp.float32)) / temperature)
    return straight_through((soft > 0.5).astype(soft.dtype), soft) if hard else soft


def hard_top_k(scores: Float[Array, "... N"], k: int) -> Float[Array, "... N"]:
    """1 at the `k` largest scores of the last axis, 0 elsewhere; ties go to the lowest index.

    Raises:
      ValueError: `k` is outside 0..N.
    """
    _count(k, scores.shape[-1])
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < k).astype(jnp.float32)


def soft_top_k(
    scores: Float[Array, "... N"], k: int, *, temperature: float = 1.0, hard: bool = False
) -> Float[Array, "... N"]:
    """Inclusion weights in (0, 1) that sum to `k`: `sigmoid((scores - t) / temperature)` with t solved for.

    The gradient is that of the implicit function: t moves so that the sum stays k. With `hard`, the forward pass is
    `hard_top_k`.

    Args:
      scores: `[..., N]`; -inf is never included, and more than `k` scores of each row must be finite unless all are.
      k: how many to keep; 0 and N give exactly 0 and 1 everywhere.
      temperature: the smaller, the closer to the hard choice.
      hard: straight-through.

    Raises:
      ValueError: `k` is outside 0..N or the temperature is not positive.
    """
    _positive(temperature)
    _count(k, scores.shape[-1])
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if k in (0, scores.shape[-1]):  # the bisection has no finite answer there
        soft = jnp.full_like(scores, float(k > 0))
    else:
        soft = _sigmoid_top_k(scores / temperature, k)
    return straight_through(hard_top_k(scores, k), soft) if hard else soft


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sigmoid_top_k(scores: Array, k: int) -> Array:
    # The sum of sigmoids falls from N to 0 as t grows, so bisection finds t. Outside these bounds the sum is beyond k
    # for certain: at t = max + c every term is at most sigmoid(-c), and N sigmoid(-c) < k for c = log N + 1.
    length = scores.shape[-1]
    margin = jnp.log(jnp.float32(length)) + 1.0
    # A score of -inf has weight 0 wherever t is, and would hide the range of the others.
    finite = jnp.where(scores == -jnp.inf, jnp.inf, scores)
    low = jnp.min(finite, axis=-1, keepdims=True) - margin
    high = jnp.max(scores, axis=-1, keepdims=True) + margin

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_many = jnp.sum(jax.nn.sigmoid(scores - middle), axis=-1, keepdims=True) > k
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    return jax.nn.sigmoid(scores - 0.5 * (low + high))


@_sigmoid_top_k.defjvp
def _sigmoid_top_k_jvp(k, primals, tangents):
    # From sum sigmoid(s - t) = k: dt = sum w ds / sum w with w = p (1 - p), and dp = w (ds - dt).
    (scores,), (moved,) = primals, tangents
    p = _sigmoid_top_k(scores, k)
    w = p * (1 - p)
    total = jnp.sum(w, axis=-1, keepdims=True)
    shift = jnp.sum(w * moved, axis=-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return p, w * (moved - shift)


def _positive(temperature: float) -> None:
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"the temperature must be positive; got {temperature}")


def _count(k: int, length: int) -> None:
    if not 0 <= k <= length:
        raise ValueError(f"k must lie in 0..{length}; got {k}")
