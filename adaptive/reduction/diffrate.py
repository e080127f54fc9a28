# SPDX-License-Identifier: Apache-2.0
"""DiffRate's joint compression: prune the last tokens of an order, then merge the next ones into those that stay.

The published order is by class attention. `diffrate_density` has the same operation in an order by density peaks.

Shapes: B batch, N tokens, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive import budgets
from adaptive.reduction import clustering, combine, select
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet
from pallas_kernels.bipartite_match import bipartite_match


@register(
    "diffrate",
    kind="reduction",
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    citation="Chen, Shao, Xu, Chen, Lin, Chen, Wu, Wang, Loy, Zhao, Qiao, Luo. ICCV 2023. arXiv:2305.17997",
    signals=("cls_attention",),
    trained="optional",
)
def diffrate(tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, alive: int | None = None) -> Reduction:
    """Prunes to `alive` tokens, then merges those beyond the budget into the most similar of those within it.

    Tokens are sorted by the attention of the class token, which stands first. Those from rank `alive` on are dropped; each of
    the ranks from the budget on joins the token within the budget, other than the class token, whose features are most similar
    (cosine), and a slot is the plain mean of its tokens. Slots stand in the order of importance.

    Args:
      tokens: `[B, N, D]`.
      signals: `cls_attention [B, N]`, averaged over heads; `cls_token`.
      budget: surviving tokens. A `Threshold(value, cap)` keeps tokens that get more attention than `value`, at most `cap`.
      alive: tokens left after pruning, the class token included; N, which prunes nothing, when None.

    Raises:
      ValueError: `alive` is below the budget or above N, or nothing can take up the tokens that are to merge.

    Source: Chen et al. 2023, section 3.2; the public code at inference.

    Differs: mass is the number of tokens in a slot, as for every reduction here, and enters attention as such; the public code
    scales it by the similarity of the merged pair.
    """
    return _prune_then_merge(tokens, signals, budget, alive, ORDERS["cls_attention"])


@register("diffrate_density", kind="reduction")
def diffrate_density(
    tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, alive: int | None = None
) -> Reduction:
    """Prunes to `alive` tokens, then merges those beyond the budget, as `diffrate`, in an order by density peaks.

    Tokens are sorted by `clustering.isolation`: light ones that lie close to a denser token go first. A slot is the mean of
    its tokens weighted by mass.

    Args:
      tokens: `[B, N, D]`.
      signals: `cls_token`.
      budget: surviving tokens. A `Threshold(value, cap)` keeps tokens whose isolation exceeds `value`, at most `cap`.
      alive: as for `diffrate`.

    Raises:
      ValueError: as for `diffrate`.

    Source: the operation of Chen et al. 2023 (DiffRate), section 3.2; the order is ours, after DPC-KNN (Zeng et al. 2022).
    """
    return _prune_then_merge(tokens, signals, budget, alive, ORDERS["density"])


@dataclasses.dataclass(frozen=True)
class Order:
    """What decides which tokens go, and how those that merge weigh.

    Attributes:
      method: registered name; signals: that it reads.
      scores: `(tokens, signals) -> [B, N]`, high for tokens that stay.
      weighted: a slot is the mean of its tokens weighted by mass; else their plain mean.
    """

    method: str
    signals: tuple[str, ...]
    scores: Callable[[TokenSet, Signals], Float[Array, "B N"]]
    weighted: bool

    def share(self, tokens: TokenSet) -> Float[Array, "B N"]:
        """Weight of each token in the mean of its slot."""
        return tokens.mass if self.weighted else jnp.ones_like(tokens.mass)


ORDERS = {
    "cls_attention": Order("diffrate", ("cls_attention",), lambda _, signals: signals.cls_attention, weighted=False),
    "density": Order("diffrate_density", (), clustering.isolation, weighted=True),
}


def _prune_then_merge(
    tokens: TokenSet, signals: Signals, budget: budgets.Budget, alive: int | None, by: Order
) -> Reduction:
    slots, length = budgets.capacity(budget), tokens.mass.shape[1]
    alive = length if alive is None else int(alive)
    if not slots <= alive <= length:
        raise ValueError(f"{by.method}: alive={alive} (tokens left after pruning) must lie in {slots}..{length}")
    if slots <= int(signals.cls_token) and alive > slots:
        raise ValueError(
            f"{by.method}: with a budget of the class token alone nothing can merge; set alive=1 to prune all"
        )
    importance = by.scores(tokens, signals)
    scores = select.guard(importance, tokens, signals)
    order = jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)
    stays = jnp.take_along_axis(select.survivors(importance, tokens, signals, budget), order, axis=1)
    there = jnp.take_along_axis(tokens.valid, order, axis=1)
    ranks = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)
    heads = jnp.where(stays, order, -1)[:, :slots]
    joins = jnp.where(stays, ranks, -1)
    # With a whole number the tokens that can merge are known in advance; under a threshold any rank may.
    first = 0 if isinstance(budget, budgets.Threshold) else slots
    if alive > first:
        partner = _partner(tokens, order[:, first:alive], order[:, :slots], stays[:, :slots], signals.cls_token)
        merged = jnp.where(there[:, first:alive] & ~stays[:, first:alive], partner, joins[:, first:alive])
        joins = joins.at[:, first:alive].set(merged)
    place = jnp.argsort(order, axis=-1, stable=True)
    assign = jnp.take_along_axis(joins, place, axis=1)
    if alive == first:
        return Reduction(heads, assign, (assign >= 0).astype(jnp.float32), merges=False)
    return combine.weighted_mean(heads, assign, by.share(tokens))


def _partner(tokens: TokenSet, sources, targets, stays, cls_token: bool):
    """`[B, S]` rank of the most similar target of each source; -1 where no target stays."""
    left, right = (jnp.take_along_axis(tokens.features, index[..., None], axis=1) for index in (sources, targets))
    bias = jnp.where(stays, 0.0, -jnp.inf)
    if cls_token:
        bias = bias.at[:, 0].set(-jnp.inf)
    similarity, partner = bipartite_match(left, right, bias=bias)
    return jnp.where(similarity[..., 0] > -jnp.inf, partner[..., 0], -1)
