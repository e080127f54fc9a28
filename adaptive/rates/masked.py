# SPDX-License-Identifier: Apache-2.0
"""Prune-then-merge under a mask: arrays keep their length, so that numbers which are still learned can be traced.

What inference gathers, training masks: the same tokens survive, with the same features, sizes and attention. Tokens that are
gone stay in the arrays behind a mask of 0, and say by its gradient what they would have been worth.

Shapes: B batch, N tokens (places after sorting), Q queries, H heads, D features, d head width.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.reduction import combine, select
from adaptive.reduction.diffrate import Order
from adaptive.tokens import Reduction, Signals, TokenSet
from pallas_kernels.bipartite_match import bipartite_match

# A gone key whose logit is far above those that are left would overflow; beyond this the gradient of its mask saturates.
_CEILING = 20.0


@flax.struct.dataclass
class MaskedReduction(Reduction):
    """A reduction of N tokens to N places, in which the places of gone tokens are empty but still hold them.

    As a `Reduction` (matrix, restore, composition) it is the map that inference runs, with empty slots at its end.

    Attributes:
      order: `[B, N]` int32, token at each place: by falling importance, gone ones last.
      keep: `[B, N]` 1 for places that are left, 0 for the others, with a gradient to what was learned.
      joins: `[B, N]` place that each place merged into, or would be the next to merge into; -1 where there is none.
      given: `[B, N]` share of each place that it gave to that one, 0 or 1, with a gradient to what was learned. None where
        the mask of a token learns from attention alone.
    """

    order: Int[Array, "B N"] | None = None
    keep: Float[Array, "B N"] | None = None
    joins: Int[Array, "B N"] | None = None
    given: Float[Array, "B N"] | None = None

    def apply(self, tokens: TokenSet) -> TokenSet:
        """The tokens in their new order, merged where they merge, with gone ones as they were, behind the mask."""
        reduced = Reduction.apply(self, tokens)
        gone = self.slots < 0

        def held(values: Array, before: Array) -> Array:
            index = self.order.reshape(self.order.shape + (1,) * (before.ndim - 2))
            stayed = jnp.take_along_axis(before, index, axis=1)
            return jnp.where(gone.reshape(gone.shape + (1,) * (before.ndim - 2)), stayed, values)

        after = TokenSet(
            held(reduced.features, tokens.features),
            held(reduced.mass, tokens.mass),
            held(reduced.coords, tokens.coords),
            reduced.origin,
            self.keep,
        )
        return after if self.given is None else self._taken_up(after)

    def _taken_up(self, after: TokenSet) -> TokenSet:
        """The same tokens, with the gradient of features and masses with respect to what is `given` to them."""
        features, mass = jax.lax.stop_gradient((after.features.astype(jnp.float32), after.mass))
        # Zero, with a derivative of 1: a place that gives more moves the mean of the one that takes it up.
        change = mass * (self.given - jax.lax.stop_gradient(self.given))
        change = jax.nn.one_hot(self.joins, mass.shape[1], axis=1) * change[:, None, :]
        taken = jnp.sum(change, axis=-1)
        moved = jnp.einsum("bmn,bnd->bmd", change, features) - taken[..., None] * features
        moved /= jnp.where(mass > 0, mass, 1.0)[..., None]
        return after.replace(features=after.features + moved.astype(after.features.dtype), mass=after.mass + taken)


def prune_then_merge(
    tokens: TokenSet,
    signals: Signals,
    pruned: Float[Array, ""],
    merged: Float[Array, ""],
    prune_mask: Float[Array, " N"],
    merge_mask: Float[Array, " N"],
    by: Order,
) -> MaskedReduction:
    """DiffRate's joint operation with traced numbers: ranks from `pruned` on are dropped, then ranks from `merged` on merge.

    Args:
      tokens: `[B, N, D]`, with the mask of earlier layers in `keep`.
      signals: those of the order, `cls_token`.
      pruned, merged: tokens left after each operation, the class token included; numbers above what is there do nothing.
      prune_mask, merge_mask: `[N]` by rank, 1 below those numbers and 0 from them on, with a gradient.
      by: the order in which tokens go.

    Source: Chen et al. 2023 (DiffRate), section 3; the public code's `compress` in training.
    Differs: where means are weighted by mass, the gradient of a mask also follows what the token gives to the slot that it
      merges into. So the worth of a token that merges is that of not merging, and a pruned one learns what merging is worth.
      As published its worth is what attention to it would add, whether it was merged or lost.
    """
    rank, there = jnp.arange(tokens.mass.shape[1]), tokens.count[:, None]
    alive = jnp.minimum(there, pruned)
    left = jnp.minimum(alive, merged)
    # As at inference, tokens stay in their order where none is removed; gone ones are behind them in any case.
    importance = select.guard(by.scores(tokens, signals), tokens, signals)
    importance = jnp.where((left < there) | ~tokens.valid, importance, 0.0)
    order = jnp.argsort(-importance, axis=-1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=-1, stable=True)
    features = jnp.take_along_axis(tokens.features, order[..., None], axis=1)
    partner = _partner(features, rank < left, signals.cls_token)
    slot = jnp.where(rank < left, rank, jnp.where(rank < alive, partner, -1)).astype(jnp.int32)
    assign = jnp.take_along_axis(slot, place, axis=1)
    keep = jnp.ones_like(tokens.mass) if tokens.keep is None else tokens.keep
    before = jnp.take_along_axis(keep, order, axis=1)
    # An operation that removes nothing here leaves no trace, so its rate learns from the budget alone.
    unpruned, unmerged = jnp.where(pruned < there, prune_mask, 1.0), jnp.where(merged < alive, merge_mask, 1.0)
    slots = jnp.where(rank < left, order, -1)
    mean = combine.weighted_mean(slots, assign, by.share(tokens))
    masked = MaskedReduction(slots, assign, mean.weight, merges=True, order=order, keep=before * unpruned * unmerged)
    if not by.weighted:
        return masked
    joins = jnp.where(rank < left, _earlier(features, signals.cls_token), partner)
    given = unpruned * (1.0 - unmerged) * (before > 0) * (joins >= 0)
    return masked.replace(joins=joins, given=given)


def _partner(features: Float[Array, "B N D"], stays: Array, cls_token: bool) -> Int[Array, "B N"]:
    """The most similar place that stays of every place; -1 where there is none. The class token joins nothing."""
    bias = jnp.where(stays, 0.0, -jnp.inf)
    if cls_token:
        bias = bias.at[:, 0].set(-jnp.inf)
    similarity, partner = bipartite_match(features, features, bias=bias)
    return jnp.where(similarity[..., 0] > -jnp.inf, partner[..., 0], -1)


def _earlier(features: Float[Array, "B N D"], cls_token: bool) -> Int[Array, "B N"]:
    """The most similar place before every place, other than the class token; -1 where there is none."""
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    x /= jnp.where(length > 0, length, 1.0)
    rank = jnp.arange(x.shape[1])
    earlier = (rank[None, :] < rank[:, None]) & (rank >= int(cls_token))
    similarity = jnp.where(earlier, jnp.einsum("bid,bjd->bij", x, x), -jnp.inf)
    return jnp.where(jnp.any(earlier, axis=-1), jnp.argmax(similarity, axis=-1), -1).astype(jnp.int32)


def masked_attention(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N H d"],
    value: Float[Array, "B N H d"],
    keep: Float[Array, "B N"],
    *,
    key_bias: Float[Array, "B N"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N H d"]:
    """Self-attention in which every weight is multiplied by the mask of its key, with a gradient to the mask.

    `E_ij = exp(logit_ij) (1 if i = j else keep_j)`, divided by its sum over j: for tokens that are left it is attention among
    those that are left; a gone token also attends to itself.

    Args:
      query, key, value: `[B, N, H, d]`.
      keep: `[B, N]` in {0, 1}.
      key_bias: `[B, N]` added to the logits of each key; -inf removes it.
      scale: of the logits; `d ** -0.5` when None.

    Source: Rao et al. 2021 (DynamicViT), eq. 11, as DiffRate uses it.
    Differs: no epsilon in numerator and denominator, as the largest logit is taken over keys that are left, which makes it
      exact; logits of gone keys are capped at 20 above that.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision).astype(jnp.float32) * scale
    if key_bias is not None:
        logits += key_bias[:, None, None, :]
    own = jnp.eye(logits.shape[-1], dtype=bool)
    left = own | (keep > 0)[:, None, None, :]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(left, logits, -jnp.inf), axis=-1, keepdims=True))
    weights = jnp.exp(jnp.minimum(logits - top, _CEILING)) * jnp.where(own, 1.0, keep[:, None, None, :])
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, precision=precision)
