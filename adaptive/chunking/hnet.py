# SPDX-License-Identifier: Apache-2.0
"""H-Net's dynamic chunking: routing by the change between neighbours, smoothing, and the way back to bytes.

Shapes: B batch, N tokens, M slots, C channels, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import relaxations
from adaptive.chunking.boundary_predictor import row_mean
from adaptive.chunking.chunks import Chunks
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet

# Probabilities are kept this far from 0 and 1 in the smoothing.
_MARGIN = 1e-4


@register(
    "hnet",
    kind="chunking",
    paper="Dynamic Chunking for End-to-End Hierarchical Sequence Modeling",
    citation="Hwang, Wang, Gu. 2025. arXiv:2507.07955",
    signals=("queries", "keys"),
    trained="yes",
)
def hnet(tokens: TokenSet, signals: Signals, *, threshold: float = 0.5) -> Chunks:
    """A chunk starts at t where `p_t = (1 - cos(q_(t-1), k_t)) / 2` is over the threshold; p is 1 at the first token.

    Args:
      tokens: `[B, N, D]`.
      signals: `queries`, `keys` `[B, N, C]`, from maps that start as the identity.
      threshold: strict.

    Source: Hwang et al. 2025 (routing module).
    """
    before = jnp.pad(signals.queries[:, :-1], ((0, 0), (1, 0), (0, 0)))
    probability = jnp.clip((1 - _cosine(before, signals.keys)) / 2, 0.0, 1.0)
    return Chunks.create(probability > threshold, tokens, probability)


def ratio_loss(chunks: Chunks, *, target: float) -> tuple[Array, Array]:
    """`(sum, rows)` of `N/(N-1) [(N-1) F G + (1-F)(1-G)]`: F a row's share of starts, G its mean probability, N = `target`.

    It is 1 where F = G = 1/N, so that chunks of N tokens on average are rewarded.

    Raises:
      ValueError: the target is not over 1 token a chunk.

    Source: Hwang et al. 2025 (ratio loss); public code `load_balancing_loss`.

    Differs: F and G are those of each row, which gradient accumulation leaves as they are; the release takes them over the
    batch of a device.
    """
    if target <= 1.0:
        raise ValueError(f"the target is a number of tokens a chunk, over 1; got {target}")
    real = jnp.maximum(jnp.sum(chunks.valid, axis=-1, dtype=jnp.float32), 1.0)
    share = jnp.sum(chunks.starts, axis=-1, dtype=jnp.float32) / real
    mean = jnp.sum(chunks.probability, axis=-1) / real
    losses = target / (target - 1) * ((target - 1) * share * mean + (1 - share) * (1 - mean))
    return row_mean(losses, chunks.valid)


def smooth(
    values: Float[Array, "B M D"], probability: Float[Array, "B M"], filled: Bool[Array, "B M"]
) -> Float[Array, "B M D"]:
    """The moving average `y_k = P_k z_k + (1 - P_k) y_(k-1)` along the chunks, y_(-1) = 0, in float32.

    Args:
      values: `[B, M, D]` z; probability: `[B, M]`, kept within 1e-4 of 0 and 1; filled: `[B, M]` False in empty slots.

    Source: Hwang et al. 2025 (smoothing module).
    """
    share = jnp.clip(probability.astype(jnp.float32), _MARGIN, 1 - _MARGIN)
    # An empty slot passes on what came before.
    stays = jnp.where(filled, 1 - share, 1.0)[..., None]
    comes = jnp.where(filled, share, 0.0)[..., None] * values.astype(jnp.float32)

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    # Both operands of one shape, as associative_scan slices them alike.
    _, smoothed = jax.lax.associative_scan(join, (jnp.broadcast_to(stays, comes.shape), comes), axis=1)
    return smoothed.astype(values.dtype)


def at_heads(values: Float[Array, "B N"], reduction: Reduction) -> Float[Array, "B M"]:
    """`values [B, N]` at the first token of each slot; 0 in empty slots."""
    taken = jnp.take_along_axis(values, jnp.maximum(reduction.slots, 0), axis=1)
    return jnp.where(reduction.slots >= 0, taken, 0.0)


def dechunk(values: Float[Array, "B M D"], chunks: Chunks, reduction: Reduction) -> Float[Array, "B N D"]:
    """Chunks smoothed and spread back to their tokens, with the gradient of the router's confidence.

    Every token reads its chunk's smoothed value times STE(c), c the probability of the choice that was made there: 1 in the
    forward pass, with the gradient of c.

    Source: Hwang et al. 2025 (dechunking layer).
    """
    smoothed = smooth(values, at_heads(chunks.probability, reduction), reduction.slots >= 0)
    confidence = jnp.where(chunks.starts, chunks.probability, 1 - chunks.probability)
    return reduction.restore(smoothed) * confidence_weight(confidence)[..., None].astype(values.dtype)


def confidence_weight(confidence: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """1, with the gradient of `confidence`."""
    return relaxations.straight_through(jnp.ones_like(confidence), confidence)


def _cosine(a: Float[Array, "B N C"], b: Float[Array, "B N C"]) -> Float[Array, "B N"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dot = jnp.sum(a * b, axis=-1)
    norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    # The inner where keeps the gradient finite where a vector is 0.
    return jnp.where(norms > 0, dot * jax.lax.rsqrt(jnp.where(norms > 0, norms, 1.0)), 0.0)
