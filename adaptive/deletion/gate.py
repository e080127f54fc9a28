# SPDX-License-Identifier: Apache-2.0
"""MrT5's delete gate: gate values from logits, soft and hard deletion, and the rate that a gate deletes at.

A gate value G lies in (k, 0) with k = -30: near 0 keeps a token, near k deletes it. Soft deletion adds G to the attention
logits of every query at that key, so nothing shrinks (training); hard deletion removes the tokens with G <= k/2 and
left-packs the others (inference).

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import ragged, relaxations
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet

# The gate value of a token that is deleted for certain.
SCALE = -30.0


@register(
    "mrt5",
    kind="deletion",
    paper="MrT5: Dynamic Token Merging for Efficient Byte-level Language Models",
    citation="Kallini, Murty, Manning, Potts, Csordas. ICLR 2025. arXiv:2410.20771",
    signals=("gate_logits",),
    trained="yes",
)
def mrt5(tokens: TokenSet, signals: Signals, *, scale: float = SCALE, gumbel: bool = False) -> Float[Array, "B N"]:
    """Gate values `scale * sigmoid(-z)` of learned logits z, in (scale, 0); padding gets `scale`.

    Args:
      tokens: `[B, N, D]`.
      signals: `gate_logits [B, N]`, high to keep; `rng` when `gumbel`.
      scale: k, negative.
      gumbel: adds Gumbel noise to the logits (training only).

    Raises:
      ValueError: the scale is not negative, or `gumbel` without a key.

    Source: Kallini et al. 2025, section 3 and the public code (`SigmoidDeleteGate`).

    Differs: the public configuration's default of k is -10, but every published run uses -30, the default here.
    """
    _negative(scale)
    logits = signals.gate_logits.astype(jnp.float32)
    if gumbel:
        if signals.rng is None:
            raise ValueError("gumbel=True needs a key: Signals(rng=...)")
        logits += relaxations.gumbel(signals.rng, logits.shape)
    return jnp.where(tokens.valid, scale * jax.nn.sigmoid(-logits), scale)


def kept(gate: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE) -> Bool[Array, "B N"]:
    """`[B, N]` True for real tokens with a gate value above `scale / 2`; a row of real tokens keeps at least its best one.

    Source: Kallini et al. 2025, section 3 (hard deletion).

    Differs: the public code raises when nothing is left; here the highest gate value of each row stays.
    """
    _negative(scale)
    gate = jnp.where(tokens.valid, gate, -jnp.inf)
    best = jnp.arange(gate.shape[1]) == jnp.argmax(gate, axis=-1, keepdims=True)
    return tokens.valid & ((gate > scale / 2) | best)


def hard(
    gate: Float[Array, "B N"], tokens: TokenSet, *, capacity: int, overflow: str = "best", scale: float = SCALE
) -> Reduction:
    """Left-packs the kept tokens into `capacity` slots, at their original positions.

    Args:
      gate: `[B, N]` gate values.
      tokens: `[B, N, D]`.
      capacity: M, static; see `ragged.compact` for the overflow policy (by default the highest gate values stay).
      overflow: "best", "forbid" or "checked".
      scale: k of the gate.

    Source: Kallini et al. 2025, section 3.
    """
    return ragged.compact(kept(gate, tokens, scale=scale), capacity, overflow=overflow, scores=gate)


def masked(gate: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE) -> Float[Array, "B N"]:
    """Hard deletion as gate values, at full length: 0 for what `kept` keeps and -inf, which removes the key, for the rest.

    Source: Kallini et al. 2025, public code (survivors of hard deletion lose their soft gate values).
    """
    return jnp.where(kept(gate, tokens, scale=scale), 0.0, -jnp.inf)


def sometimes_masked(
    gate: Float[Array, "B N"], tokens: TokenSet, key: Array, *, probability: float, scale: float = SCALE
) -> Float[Array, "B N"]:
    """`masked` for the whole batch with `probability`, else the gate itself; the share of training done by hard deletion.

    No gradient of the outputs reaches the gate in a batch that is masked.

    Args:
      gate: `[B, N]` gate values.
      tokens: `[B, N, D]`.
      key: decides, once for the batch.
      probability: in [0, 1].
      scale: k of the gate.

    Raises:
      ValueError: the probability is outside [0, 1].

    Source: Kallini et al. 2025, public code (`hard_delete_train_prob`, 0 in every published run).

    Differs: the public code shortens the batch; here its keys are removed, with the same outputs, as shapes are static.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"the probability of hard deletion must lie in [0, 1]; got {probability}")
    return jnp.where(jax.random.bernoulli(key, probability), masked(gate, tokens, scale=scale), gate)


def hard_on_ladder(
    work: Callable[..., Any],
    gate: Float[Array, "B N"],
    tokens: TokenSet,
    rungs: Sequence[int],
    *operands: Any,
    scale: float = SCALE,
    switch: Callable = jax.lax.switch,
) -> Any:
    """Runs `work(reduction, *operands)` with the kept tokens packed into the smallest rung that holds every row.

    See `ragged.on_ladder` for the arguments and errors; the result does not depend on the rungs.
    """
    return ragged.on_ladder(work, kept(gate, tokens, scale=scale), rungs, *operands, switch=switch)


def deleted_share(gate: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE) -> tuple[Array, Array]:
    """`(deleted, real)`: how many real tokens hard deletion removes, and how many there are, as float32 scalars."""
    keep = kept(gate, tokens, scale=scale)
    real = jnp.sum(tokens.valid, dtype=jnp.float32)
    return real - jnp.sum(keep, dtype=jnp.float32), real


def gate_sum(gate: Float[Array, "B N"], tokens: TokenSet) -> tuple[Array, Array]:
    """`(sum, count)` of the gate values of real tokens; their ratio is the deletion regulariser.

    Added to the loss with a weight alpha >= 0 it rewards deletion, as gate values are negative.

    Source: Kallini et al. 2025, section 3 (gate regulariser: mean of G over tokens that are not padding).
    """
    return jnp.sum(jnp.where(tokens.valid, gate, 0.0)), jnp.sum(tokens.valid, dtype=jnp.float32)


def saturation(gate: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE) -> dict[str, tuple[Array, Array]]:
    """How decided a gate is: `(sum, count)` of the binary entropy in bits, and of gates within 5 % of either end."""
    share = jnp.clip(gate / scale, 1e-7, 1 - 1e-7)
    entropy = -(share * jnp.log2(share) + (1 - share) * jnp.log2(1 - share))
    ends = (share < 0.05) | (share > 0.95)
    real = jnp.sum(tokens.valid, dtype=jnp.float32)

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(tokens.valid, values, 0.0), dtype=jnp.float32)

    return {"gate_entropy": (total(entropy), real), "gate_saturated": (total(ends), real)}


def _negative(scale: float) -> None:
    if scale >= 0:
        raise ValueError(f"the scale of a delete gate is negative (the published runs use -30); got {scale}")
