# SPDX-License-Identifier: Apache-2.0
"""Reductions by clusters: k-medoids, density peaks and k-means over the features of the tokens.

A clustering is an array `owner [B, N]`: the token that heads the cluster of each token. All three find one, none sends a
gradient through it, and `_reduce` makes the reduction: slots stand in the order of their heads, a class token is a cluster of
its own.

Shapes: B batch, N tokens, K clusters, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import budgets, ragged
from adaptive.reduction import combine, match, select
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet
from pallas_kernels.bipartite_match import bipartite_match

POOLS = ("mean", "drop")


@register(
    "kmedoids",
    kind="reduction",
    paper="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
    citation="Zhao, Zhu, Wang, Yang. SIGIR 2022. arXiv:2205.00823",
)
def kmedoids(
    tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, steps: int = 10, pool: str = "drop"
) -> Reduction:
    """Keeps the medoid of each cluster of tokens: the member with the least total distance to the others.

    The start is farthest-first: the token of largest norm, then each time the one that is farthest from those chosen. Then
    every token joins its nearest medoid, and every cluster takes the member with the least sum of Euclidean distances.

    Args:
      tokens: `[B, N, D]`; the features are clustered.
      signals: `cls_token`.
      budget: surviving tokens; a threshold has no meaning here beyond its cap.
      steps: rounds of joining and choosing.
      pool: "drop" keeps the medoids alone, "mean" averages each cluster, weighted by mass.

    Raises:
      ValueError: no cluster is left beside the class token, an unknown `pool`, or no step.

    Source: Zhao et al. 2022, k-medoids++ with a deterministic (KKZ) start.

    Differs: a fixed number of steps, where the public code goes on until the batch's medoids stand still, so that rows do not
    see each other. A medoid is nearest to itself, also among duplicates.
    """
    clusters = _clusters(tokens, signals, budget, steps)
    free = match.unprotected(tokens, signals)
    x = _metric(tokens, free)
    distance = jnp.sqrt(_squared_distances(x))
    medoids = _farthest_first(distance, jnp.linalg.norm(x, axis=-1), free, clusters)

    def step(_: int, medoids: Array) -> Array:
        return _central(distance, _nearest(distance, medoids), free)

    medoids = jax.lax.fori_loop(0, steps, step, medoids)
    return _reduce(_nearest(distance, medoids), tokens, signals, budget, pool)


@register(
    "dpc_knn",
    kind="reduction",
    paper="Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer",
    citation="Zeng, Jin, Liu, Qian, Luo, Ouyang, Wang. CVPR 2022. arXiv:2204.08680",
)
def dpc_knn(
    tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, neighbours: int = 5, pool: str = "mean"
) -> Reduction:
    """Clusters around density peaks: centres are dense tokens that lie far from any denser one.

    With `d_ij = |x_i - x_j| / sqrt(C)`: the density `rho_i = exp(-mean of d_ij^2 over the k nearest j)`, i itself included;
    `delta_i` the distance to the nearest denser token, or the largest distance there is if none is denser; the tokens with the
    largest `rho delta` are centres and every other token joins the nearest centre.

    Args:
      tokens: `[B, N, D]`; the features are clustered.
      signals: `cls_token`.
      budget: surviving tokens. Under a threshold centres also exceed its value in `rho delta`.
      neighbours: k; a row with fewer tokens takes all it has.
      pool: "mean" averages each cluster, weighted by mass; "drop" keeps the centres alone.

    Raises:
      ValueError: no cluster is left beside the class token, an unknown `pool`, or no neighbour.

    Source: Zeng et al. 2022 (TCFormer), section 3.2: DPC-KNN with k = 5.

    Differs: among equal densities the lower index is denser, where the public code adds noise; slots stand in the order of
    their centres, not by score; tokens weigh by mass, where TCFormer learns weights.
    """
    _clusters(tokens, signals, budget, neighbours)
    free = match.unprotected(tokens, signals)
    x = _metric(tokens, free)
    squared = _squared_distances(x) / x.shape[-1]
    mean, delta = _peaks(squared, free, neighbours)
    centres = select.survivors(jnp.exp(-mean) * delta, tokens, signals, budget) & free
    return _reduce(_nearest(jnp.sqrt(squared), centres), tokens, signals, budget, pool)


@register("kmeans", kind="reduction")
def kmeans(tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, steps: int = 10) -> Reduction:
    """Every slot is the mean, weighted by mass, of one cluster of tokens by cosine similarity.

    The start is farthest-first, as for k-medoids, on features scaled to length 1. Then every token joins the centre with the
    largest cosine, and every centre becomes the mean of those that joined; a centre that nobody joined stays where it is.

    Args:
      tokens: `[B, N, D]`; the features are clustered.
      signals: `cls_token`.
      budget: surviving tokens; clusters that end up empty leave padding. A threshold has no meaning here beyond its cap.
      steps: rounds of joining and averaging.

    Raises:
      ValueError: no cluster is left beside the class token, or no step.

    Source: Lloyd's algorithm with a deterministic (KKZ) start; as a token reduction in many papers, with random starts.
    """
    clusters = _clusters(tokens, signals, budget, steps)
    free = match.unprotected(tokens, signals)
    x = _metric(tokens, free)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    x = x / jnp.where(length > 0, length, 1.0)
    distance = jnp.sqrt(_squared_distances(x))
    start = ragged.compact(_farthest_first(distance, length[..., 0], free, clusters), clusters, overflow="checked")
    centres = start.reduce(x)
    bias = jnp.where(start.slots >= 0, 0.0, -jnp.inf)

    def join(centres: Float[Array, "B K C"]) -> Int[Array, "B N"]:
        return jnp.where(free, bipartite_match(x, centres, bias=bias, metric="cosine")[1][..., 0], -1)

    def step(_: int, centres: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        joined = combine.weighted_mean(start.slots, join(centres), free)
        return jnp.where(joined.reduce_mass(free)[..., None] > 0, joined.reduce(x), centres)

    label = join(jax.lax.fori_loop(0, steps, step, centres))
    # The first member heads a cluster.
    same = label[:, :, None] == label[:, None, :]
    return _reduce(jnp.argmax(same, axis=-1).astype(jnp.int32), tokens, signals, budget, "mean")


def isolation(tokens: TokenSet, signals: Signals, *, neighbours: int = 5) -> Float[Array, "B N"]:
    """Mass times the distance to the nearest denser token: what a merge into that token would change.

    Density and distance are those of `dpc_knn`, over features scaled to length 1, so that near is what is alike by cosine.

    Args:
      tokens: `[B, N, D]`; no gradient flows through it.
      signals: `cls_token`.
      neighbours: k of the density.

    Source: the distance is `delta` of DPC-KNN (Zeng et al. 2022, section 3.2); the mass in place of the density is ours.
    """
    free = match.unprotected(tokens, signals)
    x = _metric(tokens, free)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    _, delta = _peaks(_squared_distances(x / jnp.where(length > 0, length, 1.0)), free, neighbours)
    return jax.lax.stop_gradient(tokens.mass) * delta


def _peaks(
    squared: Float[Array, "B N N"], free: Bool[Array, "B N"], neighbours: int
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Mean squared distance to the k nearest (low where dense), and the distance to the nearest denser token."""
    pairs = free[:, :, None] & free[:, None, :]
    nearest = jnp.sort(jnp.where(pairs, squared, jnp.inf), axis=-1)[..., :neighbours]
    found = jnp.isfinite(nearest)
    mean = jnp.sum(jnp.where(found, nearest, 0.0), axis=-1) / jnp.maximum(jnp.sum(found, axis=-1), 1)
    place = ragged.rank(jnp.where(free, -mean, -jnp.inf))
    denser = pairs & (place[:, None, :] < place[:, :, None])
    distance = jnp.sqrt(squared)
    farthest = jnp.max(jnp.where(pairs, distance, 0.0), axis=(1, 2))[:, None]
    return mean, jnp.minimum(jnp.min(jnp.where(denser, distance, jnp.inf), axis=-1), farthest)


def _clusters(tokens: TokenSet, signals: Signals, budget: budgets.Budget, rounds: int) -> int:
    """K, the slots less the class token's."""
    slots, protected = budgets.capacity(budget), int(signals.cls_token)
    if slots <= protected:
        raise ValueError(f"clusters need a budget of at least {protected + 1} ({protected} protected); got {slots}")
    if rounds < 1:
        raise ValueError(f"steps or neighbours must be at least 1; got {rounds}")
    return slots - protected


def _metric(tokens: TokenSet, free: Bool[Array, "B N"]) -> Float[Array, "B N C"]:
    """What is clustered, in float32: the features, zero where a token is not free."""
    features = jax.lax.stop_gradient(tokens.features).astype(jnp.float32)
    return jnp.where(free[..., None], features, 0.0)


def _squared_distances(x: Float[Array, "B N C"]) -> Float[Array, "B N N"]:
    """Squared Euclidean distances; exactly 0 between a token and itself."""
    product = jnp.einsum("bic,bjc->bij", x, x, precision=jax.lax.Precision.HIGHEST)
    norm = jnp.sum(x * x, axis=-1)
    squared = jnp.maximum(norm[:, :, None] + norm[:, None, :] - 2.0 * product, 0.0)
    return squared * (1.0 - jnp.eye(x.shape[1]))


def _farthest_first(
    distance: Float[Array, "B N N"], norm: Float[Array, "B N"], free: Bool[Array, "B N"], clusters: int
) -> Bool[Array, "B N"]:
    """True for K tokens that lie far apart, or for all free ones where there are fewer."""

    def pick(gap: Float[Array, "B N"], chosen: Bool[Array, "B N"]) -> tuple[Array, Bool[Array, "B N"]]:
        # A chosen token is worse than a duplicate of it, and better than padding: a row without choice picks it again.
        best = jnp.argmax(jnp.where(free, jnp.where(chosen, -1.0, gap), -jnp.inf), axis=-1)
        return best, (chosen | jax.nn.one_hot(best, free.shape[1], dtype=bool)) & free

    def row(best: Int[Array, " B"]) -> Float[Array, "B N"]:
        return jnp.take_along_axis(distance, best[:, None, None], axis=1)[:, 0]

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        gap, chosen = state
        best, chosen = pick(gap, chosen)
        return jnp.minimum(gap, row(best)), chosen

    best, chosen = pick(norm, jnp.zeros_like(free))
    return jax.lax.fori_loop(1, clusters, step, (row(best), chosen))[1]


def _nearest(distance: Float[Array, "B N N"], heads: Bool[Array, "B N"]) -> Int[Array, "B N"]:
    """The nearest head of every token; a head is its own."""
    near = jnp.argmin(jnp.where(heads[:, None, :], distance, jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(heads, jnp.arange(heads.shape[1], dtype=jnp.int32), near)


def _central(distance: Float[Array, "B N N"], owner: Int[Array, "B N"], free: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
    """True for the member of each cluster with the least sum of distances to the others; ties go to the lower index."""
    same = (owner[:, :, None] == owner[:, None, :]) & free[:, :, None] & free[:, None, :]
    cost = jnp.sum(jnp.where(same, distance, 0.0), axis=-1)
    place = ragged.rank(-cost)
    return free & ~jnp.any(same & (place[:, None, :] < place[:, :, None]), axis=-1)


def _reduce(
    owner: Int[Array, "B N"], tokens: TokenSet, signals: Signals, budget: budgets.Budget, pool: str
) -> Reduction:
    """The reduction of a clustering; slots stand in the order of their heads."""
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is not one of {POOLS}")
    index = jnp.arange(owner.shape[1], dtype=jnp.int32)
    owner = jnp.where(match.unprotected(tokens, signals), owner, index)
    heads = ragged.compact((owner == index) & tokens.valid, budgets.capacity(budget), overflow="checked")
    if pool == "drop":
        return heads
    assign = jnp.where(tokens.valid, jnp.take_along_axis(heads.assign, owner, axis=1), -1)
    return combine.weighted_mean(heads.slots, assign, tokens.mass)
