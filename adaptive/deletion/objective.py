# SPDX-License-Identifier: Apache-2.0
"""What a learned delete gate is rewarded for, besides the task: the regularisers of MrT5 and its entropy terms.

All are means over real tokens, handed out as `(sum, count)` with the number of real tokens as the count, so that microbatches
and devices add up exactly. What describes a whole row counts once for each of its tokens. Each is to be added to the loss
with a weight >= 0, and then rewards deletion or decided gates.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive.deletion import gate as deletion_gate
from adaptive.deletion.gate import SCALE
from adaptive.tokens import TokenSet

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def gate_mean(
    gate: Float[Array, "B N"], logits: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE
) -> Pair:
    """Mean gate value, in (scale, 0).

    Source: Kallini et al. 2025, section 3 (gate regulariser); `gate_mean` of the public code.
    """
    del logits, scale
    return deletion_gate.gate_sum(gate, tokens)


def logits_mean(
    gate: Float[Array, "B N"], logits: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE
) -> Pair:
    """Mean logit: a push that does not fade where the gate is decided, and has no end.

    Source: Kallini et al. 2025, public code (`logits_mean`).

    Differs: under Gumbel noise the logits are those without it.
    """
    del gate, scale
    return _mean(logits, tokens)


def clamped_logits_mean(
    gate: Float[Array, "B N"], logits: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE
) -> Pair:
    """Mean of `max(logit, scale)`: as `logits_mean`, without a push below `scale`.

    Source: Kallini et al. 2025, public code (`clamped_logits_mean`; its floor is twice the threshold `scale / 2`).

    Differs: under Gumbel noise the logits are those without it.
    """
    del gate
    return _mean(jnp.maximum(logits, scale), tokens)


def gate_variance(
    gate: Float[Array, "B N"], logits: Float[Array, "B N"], tokens: TokenSet, *, scale: float = SCALE
) -> Pair:
    """Minus the variance of the gate values within a row: rewards decided gates on either side, not deletion as such.

    A row with a single token has variance 0.

    Source: Kallini et al. 2025, public code (`gate_var_loss`, with n - 1 in the denominator).

    Differs: the public code takes the variance over all tokens of a micro-batch, which does not add up over micro-batches.
    """
    del logits, scale
    real = tokens.valid.astype(jnp.float32)
    count = jnp.sum(real, axis=-1)
    centre = jnp.sum(gate * real, axis=-1, keepdims=True) / jnp.maximum(count, 1.0)[:, None]
    variance = jnp.sum(jnp.square(gate - centre) * real, axis=-1) / jnp.maximum(count - 1.0, 1.0)
    return -jnp.sum(variance * count), jnp.sum(count)


REGULARIZERS: dict[str, Callable[..., Pair]] = {
    "gate_mean": gate_mean,
    "clamped_logits_mean": clamped_logits_mean,
    "logits_mean": logits_mean,
    "gate_variance": gate_variance,
}


def regularizer(name: str) -> Callable[..., Pair]:
    """The function `(gate, logits, tokens, *, scale) -> (sum, count)` of a name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in REGULARIZERS:
        raise ValueError(f"{name!r} is no gate regulariser; one of {sorted(REGULARIZERS)}")
    return REGULARIZERS[name]


def entropies(gate: Float[Array, "B N"], tokens: TokenSet) -> tuple[Pair, Pair]:
    """Binary entropies in nats of `p = exp(gate)`, the fading of a key: of each token, and of the mean of its row.

    The public code adds `c1 * each - c2 * mean` to either regulariser of which there is an `..._with_entropy_reg`: the first
    asks each gate to be decided, the second asks that about half of each row stays.

    Source: Kallini et al. 2025, public code (`compute_entropy_reg_loss`; both coefficients are 0 by default).

    Differs: padding, which counts as deleted there, is left out.
    """
    real = tokens.valid.astype(jnp.float32)
    count = jnp.sum(real, axis=-1)
    # A row without tokens would have the mean 0, whose logarithm has no gradient.
    inside = tokens.valid | (count == 0)[:, None]
    log_mean = jax.scipy.special.logsumexp(jnp.where(inside, gate, -jnp.inf), axis=-1) - jnp.log(
        jnp.maximum(count, 1.0)
    )
    whole = jnp.sum(_entropy(log_mean) * count)
    return (jnp.sum(_entropy(gate) * real), jnp.sum(count)), (whole, jnp.sum(count))


def _entropy(log_p: Array) -> Array:
    """`-p log p - (1 - p) log(1 - p)`; p is kept under 1, where the slope is infinite."""
    log_p = jnp.minimum(log_p, 0.0)
    p = jnp.exp(log_p)
    rest = jnp.log1p(-jnp.minimum(p, 1.0 - jnp.finfo(p.dtype).eps))
    return -(p * log_p + (1.0 - p) * rest)


def _mean(values: Float[Array, "B N"], tokens: TokenSet) -> Pair:
    real = jnp.sum(tokens.valid, dtype=jnp.float32)
    return jnp.sum(jnp.where(tokens.valid, values, 0.0), dtype=jnp.float32), real
