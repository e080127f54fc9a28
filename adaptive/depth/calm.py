# SPDX-License-Identifier: Apache-2.0
"""Depth by confidence: a token stops at the first layer that is sure enough, with thresholds that bound the risk.

Shapes: B batch, N tokens, D width, L layers, V vocabulary, R candidate thresholds, C calibration examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

MEASURES = ("margin", "saturation", "classifier")


def margin(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Probability of the likeliest token less that of the second, in 0..1.

    Source: Schuster et al. 2022, section 3.5 (softmax response).
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # Two maxima instead of the two largest: those sort the vocabulary, which costs a CPU more than the layer that is saved.
    best = jnp.argmax(shares, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(shares.shape[-1]) == best, 0.0, shares)
    return jnp.max(shares, axis=-1) - jnp.max(others, axis=-1)


def saturation(x: Float[Array, "... D"], before: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Cosine of a token's features and those one layer earlier.

    Source: Schuster et al. 2022, section 3.5 (hidden-state saturation).
    """
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(before, axis=-1)
    return jnp.sum(x * before, axis=-1) / jnp.maximum(lengths, 1e-12)


def threshold_at(
    threshold: float | Array, position: Array | int, *, length: int, decay: float = 4.0
) -> Float[Array, "..."]:
    """The threshold of the token at a position: `0.9 threshold + 0.1 exp(-decay position / length)`, in 0..1.

    Args:
      threshold: before decay; above 1 no token stops early, so it stays as it is.
      position: from 0; length: N, the longest generation.
      decay: how fast; infinite for a threshold that is the same everywhere.

    Raises:
      ValueError: a length or decay that is not positive.

    Source: Schuster et al. 2022, eq. 5.
    """
    if length < 1 or not decay > 0:
        raise ValueError(f"length and decay must be positive; got {length} and {decay}")
    threshold = jnp.asarray(threshold, jnp.float32)
    if math.isinf(decay):
        return jnp.broadcast_to(threshold, jnp.shape(position))
    moved = 0.9 * threshold + 0.1 * jnp.exp(-decay * jnp.asarray(position, jnp.float32) / length)
    return jnp.where(threshold > 1.0, threshold, jnp.clip(moved, 0.0, 1.0))


def exit_targets(logits: Float[Array, "L ... V"]) -> Float[Array, "L ..."]:
    """What a classifier of exits learns: 1 where a layer's likeliest token is the last layer's, else 0.

    Source: Schuster et al. 2022, section 3.5 (early exit classifier).
    """
    chosen = jnp.argmax(logits, axis=-1)
    return (chosen == chosen[-1]).astype(jnp.float32)


def layer_weights(layers: int) -> Float[np.ndarray, " L"]:
    """Shares of the cross-entropies of all layers in the training loss: rising with the layer, 1 in sum.

    Source: Schuster et al. 2022, section 3.4: `i / sum_j j`.
    """
    return np.arange(1, layers + 1, dtype=np.float32) / (layers * (layers + 1) / 2)


def risk_p_value(risk: float, examples: int, limit: float) -> float:
    """Probability bound (Hoeffding-Bentkus) of seeing a mean risk this low when the true one is above `limit`.

    Args:
      risk: mean over the examples of losses in 0..1; limit: in (0, 1).

    Raises:
      ValueError: a value outside its range.

    Source: Bates et al. 2021 and Angelopoulos et al. 2021 (Learn then Test), the bound that Schuster et al. 2022 use.
    """
    if not 0 <= risk <= 1 or not 0 < limit < 1 or examples < 1:
        raise ValueError(f"risk must lie in 0..1, limit in (0, 1), with examples; got {risk}, {limit}, {examples}")
    below = min(risk, limit)
    entropy = (below * math.log(below / limit) if below else 0.0) + (1 - below) * math.log((1 - below) / (1 - limit))
    # A mean such as 3 / 10 comes out as a little more than 3 of 10.
    most = math.ceil(examples * risk - 1e-9)
    logs = [
        math.lgamma(examples + 1) - math.lgamma(k + 1) - math.lgamma(examples - k + 1)
        + k * math.log(limit) + (examples - k) * math.log1p(-limit)
        for k in range(most + 1)
    ]  # fmt: skip
    return min(1.0, math.exp(-examples * entropy), math.e * math.fsum(map(math.exp, logs)))


def calibrate(
    thresholds: Sequence[float], risks: Float[np.ndarray, "R C"], *, limit: float, error: float = 0.05
) -> float | None:
    """The lowest threshold whose risk is at most `limit`, with a probability of at least `1 - error`; None for none.

    Candidates are tested from the highest (the safest) down, until the first that cannot be shown to be safe.

    Args:
      thresholds: R, falling.
      risks: `[R, C]` in 0..1, what each candidate costs on each example of a calibration set that is exchangeable with what
        will come: whether its text differs from that of the full model, or how much worse it is.
      limit: the risk that is allowed on average; error: how often, over calibration sets, it may be exceeded.

    Raises:
      ValueError: thresholds that do not fall, or shapes or values outside their range.

    Source: Schuster et al. 2022, section 4, algorithm 1 (fixed sequence testing of Learn then Test).
    """
    risks = np.asarray(risks, np.float64)
    if list(thresholds) != sorted(set(thresholds), reverse=True):
        raise ValueError(f"thresholds must fall, so that the safest is tested first; got {list(thresholds)}")
    if risks.ndim != 2 or len(risks) != len(thresholds) or not risks.size or risks.min() < 0 or risks.max() > 1:
        raise ValueError(f"risks must be [{len(thresholds)}, C] in 0..1, a row for each threshold; got {risks.shape}")
    if not 0 < error < 1:
        raise ValueError(f"error must lie in (0, 1); got {error}")
    chosen = None
    for threshold, row in zip(thresholds, risks, strict=True):
        if risk_p_value(float(row.mean()), row.size, limit) > error:
            break
        chosen = threshold
    return chosen


@register(
    "calm",
    kind="depth",
    paper="Confident Adaptive Language Modeling",
    citation="Schuster et al. NeurIPS 2022. arXiv:2207.07061",
    signals=("layer_scores",),
    trained="optional",
)
def calm(
    tokens: TokenSet,
    signals: Signals,
    *,
    threshold: float = 0.9,
    first: int = 1,
    length: int = 256,
    decay: float = 4.0,
) -> Float[Array, "B N L"]:
    """1 at the first layer that is confident, 0 elsewhere and in padding: `[B, N, L]`.

    Args:
      tokens: `coords [..., 0]` counts generated tokens.
      signals: `layer_scores [B, N, L]`, the confidence after each layer.
      threshold: above 1 every token runs all layers; length, decay: see `threshold_at`.
      first: layers that every token runs.

    Raises:
      ValueError: `first` outside 1..L.

    Source: Schuster et al. 2022, section 3.
    """
    scores = signals.layer_scores
    layers = scores.shape[-1]
    if not 1 <= first <= layers:
        raise ValueError(f"first must lie in 1..{layers} (the layers); got {first}")
    limit = threshold_at(threshold, tokens.coords[..., 0], length=length, decay=decay)
    stops = (scores >= limit[..., None]) & (jnp.arange(layers) >= first - 1)
    stops = stops.at[..., -1].set(True)
    exits = jax.nn.one_hot(jnp.argmax(stops, axis=-1), layers)
    return jnp.where(tokens.valid[..., None], exits, 0.0)
