# SPDX-License-Identifier: Apache-2.0
"""FiCoCo: filter the redundant tokens, correlate them with the others, compress them into those.

Its three variants differ in filter and correlation: V reads a vision encoder's attention, L a language model's attention over
visual tokens and the text's attention to them, VL is V in the encoder and L in the language model.

Shapes: B batch, N tokens, M slots, H heads, Q text queries.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import budgets, ragged
from adaptive.reduction import combine, match, select
from adaptive.registry import register
from adaptive.tokens import DenseReduction, Signals, TokenSet

_PAPER = "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration"
_CITATION = "Han et al. AAAI 2026. arXiv:2411.17686"
_HIGHEST = jax.lax.Precision.HIGHEST


@register("ficoco_v", kind="reduction", paper=_PAPER, citation=_CITATION, signals=("attention", "cls_attention"))
def ficoco_v(
    tokens: TokenSet,
    signals: Signals,
    budget: budgets.Budget,
    *,
    class_share: float = 0.35,
    quantile: float = 0.998,
    window: int = 2,
    penalty: float = 2.0,
) -> DenseReduction:
    """FiCoCo-V: tokens that all others attend to and the class token does not are spread over their strongest correlates.

    Importance is `class_share cls - (1 - class_share) received`, both vectors scaled to length 1, where `received` is the mean
    attention from other patches. In each window of the grid the least important token loses more (positive importance is
    divided by `penalty`, negative multiplied), which spreads removals over the image. A token that goes is divided over the
    kept ones whose attention from it exceeds the quantile of its row, in proportion; see `compress`.

    Args:
      tokens: `[B, N, D]`; `coords` give the windows.
      signals: `attention [B, H, N, N]`, `cls_attention [B, N]`, `cls_token`, which stays as it is.
      budget: surviving tokens; under a threshold also those alone whose importance exceeds its value.
      class_share, quantile, window, penalty: as above; window in units of `coords`.

    Raises:
      ValueError: a hyper-parameter outside its range.

    Source: Han et al. 2024/2026, FiCoCo-V, second-hand where the paper was not at hand; `class_share` as in the public code.

    Differs: redundancy is the attention received after softmax, as the paper describes it; the public code takes row means of
    logits. Kept tokens stay in their order, where the public code sorts them by score and leaves targets unmapped.
    """
    if not 0 <= class_share <= 1 or window < 1 or penalty < 1:
        raise ValueError(
            f"class_share must lie in [0, 1], window and penalty be at least 1; got {class_share}, {window}, {penalty}"
        )
    patches = match.unprotected(tokens, signals)
    attention = _mean_attention(signals.attention)
    received = jnp.einsum("bij,bi->bj", attention, patches.astype(jnp.float32), precision=_HIGHEST)
    focus, redundancy = _unit(signals.cls_attention, patches), _unit(received, patches)
    importance = class_share * focus - (1 - class_share) * redundancy
    importance = _penalise(importance, tokens, patches, window, penalty)
    return compress(importance, attention, tokens, signals, budget, quantile)


@register("ficoco_l", kind="reduction", paper=_PAPER, citation=_CITATION, signals=("attention", "text_attention"))
def ficoco_l(
    tokens: TokenSet,
    signals: Signals,
    budget: budgets.Budget,
    *,
    visual_share: float = 0.6,
    direct_share: float = 0.6,
    quantile: float = 0.998,
) -> DenseReduction:
    """FiCoCo-L: visual tokens that attend to the image more than the text cares for them are spread over their correlates.

    Redundancy is `visual_share v - (1 - visual_share) t`: v the mean attention of a token to visual tokens, t the mean
    attention between it and the text. Correlation is `direct_share A_ij + (1 - direct_share) sum over text k of A_ki A_kj`,
    direct and through the text.

    Args:
      tokens: `[B, N, D]`, visual tokens in a language model.
      signals: `attention [B, H, N, N]` among them, `text_attention [B, Q, N]` from the text to them, `cls_token`.
      budget: surviving tokens; under a threshold also those alone whose negative redundancy exceeds its value.
      visual_share, direct_share, quantile: as above.

    Raises:
      ValueError: a hyper-parameter outside its range.

    Source: Han et al. 2024/2026, FiCoCo-L, second-hand where the paper was not at hand.

    Differs: attention between visual tokens and text is that of the text to them in both places, as visual tokens that stand
    before the text attend to none of it under a causal mask. Positions are kept, where the public code counts them anew.
    """
    if not (0 <= visual_share <= 1 and 0 <= direct_share <= 1):
        raise ValueError(f"visual_share and direct_share must lie in [0, 1]; got {visual_share}, {direct_share}")
    visual = match.unprotected(tokens, signals)
    attention = _mean_attention(signals.attention)
    text = signals.text_attention.astype(jnp.float32)
    seen = jnp.einsum("bij,bj->bi", attention, visual.astype(jnp.float32), precision=_HIGHEST)
    seen /= jnp.maximum(jnp.sum(visual, axis=-1, keepdims=True), 1)
    redundancy = visual_share * seen - (1 - visual_share) * jnp.mean(text, axis=1)
    indirect = jnp.einsum("bqi,bqj->bij", text, text, precision=_HIGHEST)
    correlation = direct_share * attention + (1 - direct_share) * indirect
    return compress(-redundancy, correlation, tokens, signals, budget, quantile)


@register("ficoco_vl", kind="reduction", paper=_PAPER, citation=_CITATION, signals=("attention",))
def ficoco_vl(tokens: TokenSet, signals: Signals, budget: budgets.Budget, *, quantile: float = 0.998) -> DenseReduction:
    """FiCoCo-VL: the same name at both places, V in the vision encoder and L in the language model.

    Args:
      tokens: `[B, N, D]`.
      signals: `attention`; with `text_attention` the place is a language model, else a vision encoder, whose class row
        `cls_attention` is read, or the row of token 0 where that is the class token.
      budget: as in the two.
      quantile: as in the two; the other hyper-parameters have their defaults.

    Raises:
      ValueError: neither text attention nor a class row is there.

    Source: Han et al. 2024/2026, FiCoCo-VL.
    """
    if signals.text_attention is not None:
        return ficoco_l(tokens, signals, budget, quantile=quantile)
    if signals.cls_attention is None:
        if not signals.cls_token:
            raise ValueError(
                "ficoco_vl needs the text's attention (Signals(text_attention=...)) in a language model, or class attention "
                "(Signals(cls_attention=...), or cls_token=True) in a vision encoder; got neither"
            )
        signals = signals.replace(cls_attention=_mean_attention(signals.attention)[:, 0])
    return ficoco_v(tokens, signals, budget, quantile=quantile)


def compress(
    importance: Float[Array, "B N"],
    correlation: Float[Array, "B N N"],
    tokens: TokenSet,
    signals: Signals,
    budget: budgets.Budget,
    quantile: float,
) -> DenseReduction:
    """Keeps the most important tokens and divides each other one over those that it correlates with most.

    With `a_ij`, the correlations above the row's quantile over the kept tokens, scaled to sum to 1, a kept token becomes
    `(x_j + sum_i a_ij x_i) / (1 + sum_i a_ij)`. The class token takes nothing.

    Args:
      importance: `[B, N]`, high to keep.
      correlation: `[B, N, N]` of token i with token j, non-negative.
      tokens, signals, budget: as for every reduction.
      quantile: in [0, 1]; 1 chooses no target and is pruning. Of equal correlations at the quantile, lower indices come first.

    Raises:
      ValueError: a quantile outside [0, 1].

    Source: Han et al. 2024/2026, the compress stage.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1]; got {quantile}")
    keep = select.survivors(importance, tokens, signals, budget)
    kept = ragged.compact(keep, budgets.capacity(budget), overflow="checked")
    head = jnp.maximum(kept.slots, 0)
    targets = (kept.slots >= 0) & jnp.take_along_axis(match.unprotected(tokens, signals), head, axis=1)
    toward = jnp.take_along_axis(correlation.astype(jnp.float32), head[:, None, :], axis=2)
    sources = (tokens.valid & ~keep)[:, :, None]
    chosen = _above_quantile(jnp.where(targets[:, None, :], toward, -jnp.inf), targets, quantile) & sources
    toward = jnp.where(chosen, toward, 0.0)
    total = jnp.sum(toward, axis=-1, keepdims=True)
    recycled = toward / jnp.where(total > 0, total, 1.0)
    return combine.transform(kept.matrix() + jnp.swapaxes(recycled, 1, 2))


def _above_quantile(values: Float[Array, "B N M"], real: Bool[Array, "B M"], quantile: float) -> Bool[Array, "B N M"]:
    """True for the values of a row above its quantile over the real columns, which is linear between order statistics."""
    # Of n distinct values those above place quantile (n - 1) are n - 1 less its whole part; rounding keeps .998 * 500 at 499.
    above = [max(n - 1 - math.floor(round(quantile * (n - 1), 6)), 0) for n in range(values.shape[-1] + 1)]
    count = jnp.asarray(above)[jnp.sum(real, axis=-1)][:, None, None]
    return (ragged.rank(values) < count) & real[:, None, :]


def _mean_attention(attention: Float[Array, "B H N N"]) -> Float[Array, "B N N"]:
    return jnp.mean(attention.astype(jnp.float32), axis=1)


def _unit(values: Float[Array, "B N"], real: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """`values` of real tokens, scaled to Euclidean length 1."""
    values = jnp.where(real, values.astype(jnp.float32), 0.0)
    return values * jax.lax.rsqrt(jnp.maximum(jnp.sum(values * values, axis=-1, keepdims=True), 1e-12))


def _penalise(
    importance: Float[Array, "B N"], tokens: TokenSet, patches: Bool[Array, "B N"], window: int, penalty: float
) -> Float[Array, "B N"]:
    """`importance`, lowered at the least important patch of each window."""
    cell = jnp.floor(tokens.coords / window)
    same = jnp.all(cell[:, :, None] == cell[:, None, :], axis=-1) & patches[:, :, None] & patches[:, None, :]
    place = ragged.rank(-importance)
    least = patches & ~jnp.any(same & (place[:, None, :] < place[:, :, None]), axis=-1)
    lowered = jnp.where(importance > 0, importance / penalty, importance * penalty)
    return jnp.where(least, lowered, importance)
