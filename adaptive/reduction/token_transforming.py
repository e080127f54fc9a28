# SPDX-License-Identifier: Apache-2.0
"""Token Transforming: reduction as one non-negative matrix, in which every token may contribute to several slots.

`combine.transform` is the form itself; pruning and all merges are special cases of it. The paper's own rule for the entries is
not public, so the method here bears another name.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import budgets, ragged
from adaptive.reduction import combine, match, select
from adaptive.registry import register
from adaptive.tokens import DenseReduction, Signals, TokenSet

# Finite, so that the softmax of a slot that takes nothing has a gradient.
_GONE = -1e30


@register(
    "many_to_many",
    kind="reduction",
    paper="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration",
    citation="Zeng, Yu, Kong, Tang. 2025. arXiv:2506.05709",
    signals=("keys", "cls_attention"),
)
def many_to_many(
    tokens: TokenSet,
    signals: Signals,
    budget: budgets.Budget,
    *,
    temperature: float = 0.1,
    importance: float = 1.0,
    own: float = 0.5,
    balance: int = 0,
) -> DenseReduction:
    """Every kept token gathers from all tokens: `W = (1 - own) softmax(cos(k_i, k_j) / T + importance log a_j) + own e_i`.

    The tokens that the class token attends to most head the slots, in order. `own=1` is pruning by class attention.

    Args:
      tokens: `[B, N, D]`.
      signals: `keys [B, N, C]`, `cls_attention [B, N]` (a_j), `cls_token`, which stays as it is and joins no slot.
      budget: surviving tokens; under a threshold also those alone whose class attention exceeds its value.
      temperature: T; importance: power of the class attention; own: part of a slot that its head keeps, in [0, 1].
      balance: steps of Sinkhorn's balancing, after which tokens contribute alike; 0 leaves that to similarity.

    Raises:
      ValueError: a hyper-parameter outside its range.

    Source: the matrix form of Zeng et al. 2025, in which many-to-many contains pruning and merging.

    Differs: the entries of the matrix are a reconstruction, not the authors' formula.
    """
    if temperature <= 0 or not 0 <= own <= 1 or balance < 0:
        raise ValueError(
            f"temperature must be positive, own in [0, 1] and balance 0 or more; got {temperature}, {own}, {balance}"
        )
    keep = select.survivors(signals.cls_attention, tokens, signals, budget)
    heads = ragged.compact(keep, budgets.capacity(budget), overflow="checked")
    givers = match.unprotected(tokens, signals)
    takers = (heads.slots >= 0) & jnp.take_along_axis(givers, jnp.maximum(heads.slots, 0), axis=1)
    pairs = takers[:, :, None] & givers[:, None, :]
    keys = signals.keys.astype(jnp.float32)
    keys *= jax.lax.rsqrt(jnp.maximum(jnp.sum(keys * keys, axis=-1, keepdims=True), 1e-12))
    cosine = jnp.einsum("bmc,bnc->bmn", heads.reduce(keys), keys, precision=jax.lax.Precision.HIGHEST)
    attention = jnp.maximum(signals.cls_attention.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    logits = jnp.where(pairs, cosine / temperature + importance * jnp.log(attention)[:, None, :], _GONE)
    gathered = _balance(jnp.where(pairs, jax.nn.softmax(logits, axis=-1), 0.0), pairs, balance)
    share = jnp.where(takers[:, :, None], own, 1.0) * heads.matrix() + (1 - own) * gathered
    return combine.transform(share)


def _balance(matrix: Float[Array, "B M N"], pairs: Bool[Array, "B M N"], steps: int) -> Float[Array, "B M N"]:
    """`matrix` after Sinkhorn steps towards equal column sums; rows sum to 1 at the end."""
    rows = jnp.sum(jnp.any(pairs, axis=2), axis=1)[:, None, None]
    columns = jnp.sum(jnp.any(pairs, axis=1), axis=1)[:, None, None]
    for _ in range(steps):
        matrix *= rows / jnp.maximum(columns, 1) / _positive(jnp.sum(matrix, axis=1, keepdims=True))
        matrix /= _positive(jnp.sum(matrix, axis=2, keepdims=True))
    return matrix


def _positive(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)
