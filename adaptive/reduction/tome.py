# SPDX-License-Identifier: Apache-2.0
"""Token Merging: bipartite soft matching, mass-weighted."""

from __future__ import annotations

from adaptive import budgets
from adaptive.reduction import match
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet
from pallas_kernels.bipartite_match import pair_up


@register(
    "tome",
    kind="reduction",
    paper="Token Merging: Your ViT But Faster",
    citation="Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman. ICLR 2023. arXiv:2210.09461",
    signals=("keys",),
    trained="optional",
    removes_half=True,
)
def tome(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Merges the most similar pairs of an even and an odd token until the budget is met.

    Every even token finds its most similar odd token by the cosine of their attention keys; the r most similar even tokens
    join their partners, and each slot is the mean of its tokens weighted by mass. Slots are the unmerged even tokens, then
    all odd tokens; with a class token (which never merges) the unmerged stay in order, else they stand by falling similarity,
    as the next layer's split depends on it.

    Args:
      tokens: `[B, N, D]`.
      signals: `keys [B, N, C]`, `cls_token`.
      budget: surviving tokens, at least half of the unprotected ones. With a `Threshold(value, cap)`, `N - cap` pairs merge in
        any case and more where the cosine exceeds `value`; slots left over are padding.

    Source: Bolya et al. 2023, section 3 and appendix D (`bipartite_soft_matching`, `merge_wavg` of the public code).

    Differs: asking for more merges than half of the tokens is an error here, and clamped there; no distillation token; the
    threshold form is ours.
    """
    similarity, partner = match.best_partner(signals.keys, tokens.kept_mass)
    even, odd = similarity.shape[1], tokens.features.shape[1] // 2
    threshold = budget.value if isinstance(budget, budgets.Threshold) else None
    pairs = pair_up(
        similarity,
        partner,
        tokens.kept_mass,
        removed=even + odd - budgets.capacity(budget),
        threshold=threshold,
        # By index with a class token, so that it stays first.
        ordered=bool(signals.cls_token),
        protected=bool(signals.cls_token),
    )
    # Under a threshold the number of unmerged even tokens is not known in advance.
    return Reduction(*pairs, merges=True, odd_last=threshold is None, in_order=bool(signals.cls_token))
