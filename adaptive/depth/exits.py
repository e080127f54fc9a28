# SPDX-License-Identifier: Apache-2.0
"""Early exits: stop at the first layer whose prediction is confident, alone or as an ensemble of all predictions so far.

Shapes: B batch, N tokens, L layers with a prediction, C classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet


def max_probability(logits: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Probability of the likeliest class."""
    return jnp.exp(jnp.max(jax.nn.log_softmax(logits), axis=-1))


def first_confident(confidence: Float[Array, "... L"], threshold: float | Array) -> Int[Array, "..."]:
    """Index of the first layer whose confidence is at least the threshold; the last one where there is none."""
    enough = confidence >= threshold
    last = confidence.shape[-1] - 1
    return jnp.where(jnp.any(enough, axis=-1), jnp.argmax(enough, axis=-1), last).astype(jnp.int32)


def _exit_weights(tokens: TokenSet, signals: Signals, threshold: float) -> Float[Array, "B N L"]:
    confidence = signals.layer_scores
    exits = jax.nn.one_hot(first_confident(confidence, threshold), confidence.shape[-1])
    return jnp.where(tokens.valid[..., None], exits, 0.0)


@register("confidence_exit", kind="depth", signals=("layer_scores",), trained="yes")
def confidence_exit(tokens: TokenSet, signals: Signals, *, threshold: float = 0.9) -> Float[Array, "B N L"]:
    """1 at the first layer whose own prediction is confident, 0 elsewhere and in padding.

    Args:
      tokens: the token set; signals: `layer_scores [B, N, L]`, confidences in 0..1.
      threshold: above 1 nothing exits before the last layer.
    """
    return _exit_weights(tokens, signals, threshold)


@register(
    "ztw",
    kind="depth",
    paper="Zero Time Waste: Recycling Predictions in Early Exit Neural Networks",
    citation="Wolczyk et al. 2021, NeurIPS, arXiv:2106.05409",
    signals=("layer_scores",),
    trained="yes",
)
def ztw(tokens: TokenSet, signals: Signals, *, threshold: float = 0.9) -> Float[Array, "B N L"]:
    """1 at the first layer at which the ensemble of cascaded predictions is confident, 0 elsewhere and in padding.

    Args:
      tokens: the token set; signals: `layer_scores [B, N, L]`, confidences of the ensembles of
        `geometric_ensemble`.
      threshold: above 1 nothing exits before the last layer.

    Source: Wolczyk et al. 2021.
    """
    return _exit_weights(tokens, signals, threshold)


def geometric_ensemble(
    logits: Float[Array, "... L C"], log_weights: Float[Array, "L L"], bias: Float[Array, "L C"]
) -> Float[Array, "... L C"]:
    """Logits of a weighted geometric mean of the predictions up to each layer, `[..., L, C]`.

    Args:
      logits: of each layer's own head.
      log_weights: row l weighs the predictions up to l in the ensemble of layer l, as exponents; entries above the diagonal
        are not read.
      bias: added to each ensemble.

    Source: Wolczyk et al. 2021: `mean_h exp(w_h) log p_h + bias`.
    """
    layers = logits.shape[-2]
    weights = jnp.tril(jnp.exp(log_weights)) / jnp.arange(1, layers + 1)[:, None]
    return jnp.einsum("lm,...mc->...lc", weights, jax.nn.log_softmax(logits)) + bias
