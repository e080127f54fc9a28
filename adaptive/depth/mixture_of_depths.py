# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Depths: a router picks, for each layer, the fixed share of a sequence that runs through it.

Shapes: B batch, N tokens, C capacity, D width, L layers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import ragged
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

WEIGHTS = {"linear": lambda logits: logits, "sigmoid": jax.nn.sigmoid}


def capacity(share: float, length: int) -> int:
    """C: the tokens of `length` that run, `ceil(share N)`.

    Raises:
      ValueError: a share outside (0, 1].

    Source: Raposo et al. 2024, section 3.3.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"capacity is a share of the tokens in (0, 1]; got {share}")
    # A share such as 0.3 of 10 comes out as a little more than 3.
    return max(math.ceil(share * length - 1e-9), 1)


def router_loss(
    predicted: Float[Array, "B N"], chosen: Bool[Array, "B N"], valid: Bool[Array, "B N"]
) -> tuple[Array, Array]:
    """`(sum, tokens)` of the binary cross-entropy of predicting, from a token alone, whether the top-k takes it.

    Source: Raposo et al. 2024, section 3.5.
    """
    losses = jax.nn.softplus(predicted) - predicted * chosen
    return jnp.sum(jnp.where(valid, losses, 0.0)), jnp.sum(valid, dtype=jnp.float32)


@register(
    "mixture_of_depths",
    kind="skipping",
    paper="Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
    citation="Raposo et al. 2024. arXiv:2404.02258",
    signals=("choice_logits",),
    trained="yes",
)
def mixture_of_depths(tokens: TokenSet, signals: Signals, *, share: float = 0.125) -> Bool[Array, "B N L"]:
    """The layers that run for each token, `[B, N, L]`: those whose router ranks it among the `ceil(share N)` highest.

    Args:
      tokens: the token set; signals: `choice_logits [B, N, L]` of each layer's router.
      share: of the tokens, in (0, 1].

    A choice depends on later tokens too: at sampling a predictor that sees the token alone stands in for it.

    Raises:
      ValueError: a share outside its range.

    Source: Raposo et al. 2024, section 3.
    """
    count = capacity(share, tokens.features.shape[1])
    logits = jnp.where(tokens.valid[..., None], signals.choice_logits, -jnp.inf)
    rank = jax.vmap(ragged.rank, in_axes=-1, out_axes=-1)(logits)
    return (rank < count) & tokens.valid[..., None]
