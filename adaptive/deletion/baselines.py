# SPDX-License-Identifier: Apache-2.0
"""Deletion without a learned gate: nothing, random bytes, the ends of words.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from adaptive import ragged
from adaptive.deletion.gate import SCALE, _negative
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

_MRT5_CITATION = "Kallini, Murty, Manning, Potts, Csordas. ICLR 2025. arXiv:2410.20771 (baseline)"
_MRT5_PAPER = "MrT5: Dynamic Token Merging for Efficient Byte-level Language Models"

# Whitespace, ASCII punctuation and the end of sequence, as byte + 3.
SEPARATORS = (1, 12, 13, *range(35, 51), *range(61, 68), *range(94, 100), *range(126, 130))


@register("no_deletion", kind="deletion")
def no_deletion(tokens: TokenSet, signals: Signals, *, scale: float = SCALE) -> Float[Array, "B N"]:
    """Keeps every real token: the dense model behind the same interface."""
    del signals
    return _gate(tokens.valid, scale)


@register("random_deletion", kind="deletion", paper=_MRT5_PAPER, citation=_MRT5_CITATION, signals=("rng",))
def random_deletion(
    tokens: TokenSet, signals: Signals, *, rate: float = 0.5, deviation: float = 0.05, scale: float = SCALE
) -> Float[Array, "B N"]:
    """Deletes randomly drawn real tokens; the share of each row is drawn from Normal(rate, deviation).

    Args:
      tokens: `[B, N, D]`.
      signals: `rng`.
      rate: mean share of real tokens deleted, in [0, 1].
      deviation: standard deviation of the share.
      scale: gate value of a deleted token; kept tokens get 0.

    Source: Kallini et al. 2025, section 4 (random baseline).

    Differs: every row draws its own share and positions among its real tokens; the public code draws over the whole batch,
    padding included.
    """
    _share(rate)
    where, how_many = jax.random.split(signals.rng)
    batch = tokens.mass.shape[0]
    share = jnp.clip(rate + deviation * jax.random.normal(how_many, (batch, 1)), 0.0, 1.0)
    deleted = jnp.round(share * tokens.count[:, None])
    draw = jnp.where(tokens.valid, jax.random.uniform(where, tokens.mass.shape), -jnp.inf)
    return _gate(tokens.valid & (ragged.rank(draw) >= deleted), scale)


@register("fixed_deletion", kind="deletion", paper=_MRT5_PAPER, citation=_MRT5_CITATION, signals=("token_ids",))
def fixed_deletion(
    tokens: TokenSet, signals: Signals, *, rate: float = 0.5, scale: float = SCALE
) -> Float[Array, "B N"]:
    """Deletes the ends of words: of a segment of n bytes the first `ceil((1 - rate) n)` stay.

    A segment ends with a separator (whitespace, ASCII punctuation, end of sequence) or with the last real token.

    Args:
      tokens: `[B, N, D]`, real tokens first.
      signals: `token_ids [B, N]` in ByT5's vocabulary.
      rate: share of each segment deleted, in [0, 1].
      scale: gate value of a deleted token; kept tokens get 0.

    Source: Kallini et al. 2025, section 4 (fixed baseline).

    Differs: segments are those of each row; the public code pools their counts over the batch.
    """
    _share(rate)
    length = tokens.mass.shape[1]
    index = jnp.arange(length)
    separators = jnp.asarray(np.isin(np.arange(max(SEPARATORS) + 1), SEPARATORS))
    ids = signals.token_ids
    ends = jnp.where(ids < separators.size, separators[jnp.minimum(ids, separators.size - 1)], False)
    ends |= index == tokens.count[:, None] - 1
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, length - 1), axis=1, reverse=True)
    # A table in double precision, less a small number: (1 - 0.7) * 10 in float32 would round up to 4.
    stay = np.maximum(np.ceil((1.0 - rate) * np.arange(length + 1) - 1e-6), 1).astype(np.int32)
    return _gate(tokens.valid & (index - first < jnp.asarray(stay)[last - first + 1]), scale)


def _gate(keep: Bool[Array, "B N"], scale: float) -> Float[Array, "B N"]:
    _negative(scale)
    return jnp.where(keep, 0.0, scale)


def _share(rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the deletion rate is a share in [0, 1]; got {rate}")
