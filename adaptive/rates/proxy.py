# SPDX-License-Identifier: Apache-2.0
"""DiffRate's differentiable discrete proxy: how many tokens a layer keeps, as a distribution over candidate numbers.

At a layer an operation (pruning or merging) has candidate numbers of kept patches `c_1 > c_2 > ...` and learned logits `a`.
With `rho = softmax(a)`, tokens sorted by falling importance and the class token at rank 0:

    kept   k    = ceil(sum_g rho_g c_g) + 1                 the number that inference uses
    belief pi_j = sum_g rho_g 1[c_g >= j]                   that the token of rank j is kept: 1 at j = 0, falling with j
    mask   m_j  = 1[j < k] in the forward pass, pi_j in the backward pass

How the rate gets its gradient. Neither k nor m_j has a derivative of use, so each borrows one. As d rho_h / d a_g =
rho_g (1[g = h] - rho_h),

    d pi_j / d a_g = rho_g (1[c_g >= j] - pi_j)             and             d k / d a_g := rho_g (c_g - sum_h rho_h c_h),

the second being the first summed over all patches j (sum_j pi_j = E[c]), with the ceiling passed over. So a loss L that
sees the masks (in attention, `masked.masked_attention`) and the multiply-adds F that see k give

    dL/da_g + w dF/da_g = rho_g [ sum_j dL/dm_j (1[c_g >= j] - pi_j) + w dF/dk (c_g - E[c]) ].

A candidate gains where the tokens that it keeps, and the others do not, lower the loss by more than their cost: dL/dm_j is the
worth of one more token at rank j, for tokens that are masked (they stay in the arrays) and for tokens that are not. Where a
layer prunes to k_p and merges to k_m, the next gets min(N, k_p, k_m) tokens; the derivative of F with respect to that minimum
goes to both numbers, so that the one which does not bind keeps its price (`price="both"`, as published). Un-pruning a token
that would then merge costs nothing, yet pays that price; `price="binding"` passes it to the number that binds alone.

Shapes: L layers, G candidates, N tokens with the class token, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adaptive.rates.schedules import Schedule
from adaptive.relaxations import straight_through

# An expected number that is whole up to rounding is that number: softmax in float32 is good to about 1e-5 of a token.
_ROUNDING = 1e-3
PRUNE, MERGE = 0, 1


def candidates(patches: int, granularity: int = 4) -> tuple[int, ...]:
    """Numbers of kept patches to choose from: P, P - g, P - 2g, ... above 0.

    Raises:
      ValueError: no patch, or a granularity outside 1..P.

    Source: Chen et al. 2023 (DiffRate), section 3.3; g = 4 in the public code.
    """
    if patches < 1 or not 1 <= granularity <= patches:
        raise ValueError(f"the granularity must lie in 1..{patches} (the patches of an image); got {granularity}")
    return tuple(range(patches, 0, -granularity))


def logits_around(kept: Sequence[Sequence[int]], choices: Sequence[int]) -> Float[np.ndarray, "L 2 G"]:
    """Logits whose belief is a bell around given numbers of kept tokens.

    It is 0.15 of the number wide, but at most half of the way to all patches and at least 1 patch.

    Args:
      kept: tokens left at each layer by pruning and by merging, the class token included: L pairs.
      choices: of `candidates`; where the bell is cut off at their ends its mean moves inwards.

    Raises:
      ValueError: a number outside the candidates.
    """
    patches = np.asarray(kept, np.float32)[..., None] - 1
    if patches.min() < min(choices) or patches.max() > max(choices):
        raise ValueError(f"kept tokens must lie in {min(choices) + 1}..{max(choices) + 1}; got {kept}")
    width = np.maximum(np.minimum(0.15 * patches, 0.5 * (max(choices) - patches)), 1.0)
    away = (patches - np.asarray(choices)) / width
    return -0.5 * away**2


def kept_tokens(logits: Float[Array, "... G"], choices: Sequence[int]) -> Float[Array, "..."]:
    """`ceil(E[c]) + 1`, the tokens kept with the class token, with the gradient of E[c].

    Raises:
      ValueError: there is not one logit for each candidate.
    """
    expected = jnp.sum(_belief(logits, choices) * jnp.asarray(choices, jnp.float32), axis=-1)
    return straight_through(jnp.ceil(expected - _ROUNDING) + 1.0, expected)


def keep_probability(logits: Float[Array, "... G"], choices: Sequence[int], length: int) -> Float[Array, "... N"]:
    """`pi [..., N]`: the belief that the token of each rank is kept, 1 for the class token at rank 0."""
    reaches = jnp.asarray(choices)[:, None] >= jnp.arange(length)
    # A product of a softmax with ones and zeros; at rank 0 the sum is 1 up to rounding, and is set to it.
    probability = jnp.einsum("...g,gn->...n", _belief(logits, choices), reaches.astype(jnp.float32))
    return jnp.where(jnp.arange(length) == 0, 1.0, probability)


def keep_mask(logits: Float[Array, "... G"], choices: Sequence[int], length: int) -> Float[Array, "... N"]:
    """`[..., N]` 1 for the ranks below `kept_tokens` and 0 for the others, with the gradient of `keep_probability`."""
    kept = jax.lax.stop_gradient(kept_tokens(logits, choices))[..., None]
    soft = keep_probability(logits, choices, length)
    return straight_through((jnp.arange(length) < kept).astype(soft.dtype), soft)


@jax.custom_jvp
def least(tokens: Array, pruned: Array, merged: Array) -> Array:
    """`min(tokens, pruned, merged)`, whose derivative goes in full to `pruned` and to `merged`, and not to `tokens`.

    Source: the public code of DiffRate (`calculate_flop_training`).
    """
    return jnp.minimum(tokens, jnp.minimum(pruned, merged))


@least.defjvp
def _least_jvp(primals, tangents):
    _, pruned, merged = tangents
    return least(*primals), pruned + merged


@jax.custom_jvp
def least_binding(tokens: Array, pruned: Array, merged: Array) -> Array:
    """`min(tokens, pruned, merged)`, whose derivative goes to the lower of `pruned` and `merged` (to `merged` if equal)."""
    return least(tokens, pruned, merged)


@least_binding.defjvp
def _least_binding_jvp(primals, tangents):
    _, pruned, merged = tangents
    return least(*primals), jnp.where(primals[2] <= primals[1], merged, pruned)


PRICES = {"both": least, "binding": least_binding}


def token_counts(
    logits: Float[Array, "L 2 G"], choices: Sequence[int], tokens: int, acting: Sequence[int], price: str = "both"
) -> tuple[Float[Array, ""], ...]:
    """Tokens after each layer, differentiable; layers that are not in `acting` keep what they get.

    Raises:
      ValueError: an unknown price.
    """
    if price not in PRICES:
        raise ValueError(f"price={price!r} is not one of {tuple(PRICES)}")
    kept = kept_tokens(logits, choices)
    counts, now = [], jnp.float32(tokens)
    for layer in range(logits.shape[0]):
        now = PRICES[price](now, kept[layer, PRUNE], kept[layer, MERGE]) if layer in acting else now
        counts.append(now)
    return tuple(counts)


def macs(
    logits: Float[Array, "L 2 G"], choices: Sequence[int], spec: Any, acting: Sequence[int], price: str = "both"
) -> Float[Array, ""]:
    """Multiply-adds of one image, differentiable.

    Args:
      logits: `[L, 2, G]`, pruning before merging.
      choices: of `candidates`.
      spec: an `adaptive.flops.ViTSpec`.
      acting: layers that compress.
      price: whom the derivative with respect to a layer's tokens goes to; see the head of this module.
    """
    return sum(spec.macs(counts=token_counts(logits, choices, spec.tokens, acting, price)).values())


def budget_loss(
    logits: Float[Array, "L 2 G"],
    choices: Sequence[int],
    spec: Any,
    acting: Sequence[int],
    target: float,
    price: str = "both",
) -> Float[Array, ""]:
    """`(F / F_dense - target)^2`, with F of `macs` and `target` a share of the dense model.

    Raises:
      ValueError: the target is not a share that the candidates can reach.

    Source: Chen et al. 2023, eq. 9.
    Differs: in the paper the difference is in 1e9 multiply-adds, weighed by 5; a share needs a weight of `5 (F_dense / 1e9)^2`
      for the same loss (106 for DeiT-S), and one that serves models of all sizes.
    """
    dense = sum(spec.macs().values())
    smallest = tuple(spec.tokens if layer < min(acting) else choices[-1] + 1 for layer in range(spec.depth))
    low = sum(spec.macs(counts=smallest).values()) / dense
    if not low <= target <= 1.0:
        raise ValueError(
            f"a target of {target} of the dense model's multiply-adds cannot be met: with layers {tuple(acting)} compressing, "
            f"schedules reach {low:.3f} to 1"
        )
    return (macs(logits, choices, spec, acting, price) / dense - target) ** 2


def export(logits: Float[Array, "L 2 G"], choices: Sequence[int], tokens: int, acting: Sequence[int]) -> Schedule:
    """The learned numbers as static ints: what inference runs, the same numbers that training masked."""
    kept = [[int(number) for number in layer] for layer in kept_tokens(logits, choices)]
    whole = [tokens, tokens]
    numbers = [kept[layer] if layer in acting else whole for layer in range(len(kept))]
    return Schedule(*zip(*numbers, strict=True)).on(tokens)


def _belief(logits: Float[Array, "... G"], choices: Sequence[int]) -> Float[Array, "... G"]:
    if logits.shape[-1] != len(choices):
        raise ValueError(f"{len(choices)} candidates need as many logits; got shape {logits.shape}")
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
