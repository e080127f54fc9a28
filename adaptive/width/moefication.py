# SPDX-License-Identifier: Apache-2.0
"""MoEfication: the hidden neurons of a trained ReLU layer in clusters of equal size, of which a router picks a few a token.

Shapes: B batch, N tokens, R rows, D features, U hidden neurons, K clusters (experts).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adaptive import relaxations
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet


@register(
    "moefication",
    kind="width",
    paper="MoEfication: Transformer Feed-forward Layers are Mixtures of Experts",
    citation="Zhang et al. 2022, Findings of ACL, arXiv:2110.01786",
    signals=("choice_logits",),
    trained="yes",
)
def moefication(tokens: TokenSet, signals: Signals, *, experts: int = 2) -> Float[Array, "B N K"]:
    """The experts with the highest logits of each token, `[B, N, K]` of 0 and 1; none in padding.

    Args:
      tokens: the token set; signals: `choice_logits [B, N, K]` of the router.
      experts: how many of the K run for each token.

    Raises:
      ValueError: `experts` outside 1..K.

    Source: Zhang et al. 2022.
    """
    logits = signals.choice_logits
    if not 1 <= experts <= logits.shape[-1]:
        raise ValueError(f"experts must lie in 1..{logits.shape[-1]} (those there are); got {experts}")
    soft = jnp.where(tokens.valid[..., None], 1.0, 0.0)
    return relaxations.hard_top_k(logits, experts) * soft


def balanced_clusters(neurons: np.ndarray, clusters: int, *, iterations: int = 20, seed: int = 0) -> np.ndarray:
    """Order `[U]` of the neurons in which each run of `U / clusters` is a cluster of neurons with similar weights.

    Constrained k-means on normalised rows: in each round the nearest pairs of neuron and centre are taken first, and a full
    cluster takes no more.

    Args:
      neurons: `[U, D]`, incoming weights of each hidden neuron.
      clusters: equal in size; iterations, seed: of k-means.

    Raises:
      ValueError: the clusters do not divide the neurons.

    Source: Zhang et al. 2022 (parameter clustering split).

    Differs: a greedy assignment in place of the exact constrained k-means.
    """
    count = len(neurons)
    if clusters < 1 or count % clusters:
        raise ValueError(f"{clusters} clusters do not divide {count} hidden neurons")
    rows = neurons / np.maximum(np.linalg.norm(neurons, axis=1, keepdims=True), 1e-12)
    centres = rows[np.random.default_rng(seed).choice(count, clusters, replace=False)]
    labels = np.zeros(count, np.int64)
    for _ in range(iterations):
        previous, labels = labels, _fill(rows @ centres.T, count // clusters)
        centres = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(clusters)])
        if np.array_equal(previous, labels):
            break
    return np.argsort(labels, kind="stable")


def _fill(similarity: np.ndarray, room: int) -> np.ndarray:
    """A cluster for each neuron, the most similar pairs first, at most `room` neurons a cluster."""
    count, clusters = similarity.shape
    labels, left = np.full(count, -1), np.full(clusters, room)
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        neuron, cluster = divmod(int(pair), clusters)
        if labels[neuron] < 0 and left[cluster]:
            labels[neuron], left[cluster] = cluster, left[cluster] - 1
    return labels


def routing_target(hidden: Float[Array, "R U"], experts: int) -> Float[Array, "R K"]:
    """What a router should say of each expert: its sum of activations over the largest of them, in 0..1.

    Source: Zhang et al. 2022 (router); normalised as in the public code of Wojcik et al. 2025.
    """
    sums = jnp.sum(hidden.reshape(hidden.shape[0], experts, -1), axis=-1)
    return sums / jnp.maximum(jnp.max(sums, axis=-1, keepdims=True), 1e-6)


def routing_loss(logits: Float[Array, "R K"], target: Float[Array, "R K"]) -> Float[Array, ""]:
    """Mean binary cross-entropy in nats of logits against targets in 0..1."""
    return jnp.mean(jnp.logaddexp(0.0, logits) - logits * target)
