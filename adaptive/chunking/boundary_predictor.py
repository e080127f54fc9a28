# SPDX-License-Identifier: Apache-2.0
"""Boundaries predicted from hidden states and sampled, and the losses that train the predictor.

Every loss is a pair `(sum over rows of the row's mean, number of rows)`.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import relaxations
from adaptive.chunking.chunks import Chunks, shifted
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet


@register(
    "boundary_predictor",
    kind="chunking",
    paper="Efficient Transformers with Dynamic Token Pooling",
    citation="Nawrot, Chorowski, Łańcucki, Ponti. ACL 2023. arXiv:2211.09761",
    signals=("boundary_logits",),
    trained="yes",
)
def boundary_predictor(
    tokens: TokenSet, signals: Signals, *, temperature: float = 0.5, threshold: float = 0.5
) -> Chunks:
    """Chunks that end where a Bernoulli variable with the predicted log-odds comes out 1.

    With a key the variable is relaxed and drawn, cut at `threshold`, and its gradient is that of the relaxed sample; without
    one the likelier outcome is taken.

    Args:
      tokens: `[B, N, D]`.
      signals: `boundary_logits`, high where a chunk ends; `rng` to draw (training).
      temperature: of the relaxed sample.
      threshold: a token ends its chunk above it.

    Raises:
      ValueError: the temperature is not positive, or the threshold is outside (0, 1).

    Source: Nawrot et al. 2023, as MrT5's baseline "BP" has it (Kallini et al. 2025, section 4; public code
    `modeling_bpt5.py`): an encoder without a null group, the last real token ends a group.
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"the threshold on a probability must lie in (0, 1); got {threshold}")
    logits = signals.boundary_logits.astype(jnp.float32)
    if signals.rng is None:
        soft = jax.nn.sigmoid(logits)
    else:
        soft = relaxations.gumbel_sigmoid(logits, signals.rng, temperature=temperature)
    return Chunks.from_ends(soft > threshold, tokens, soft)


def binomial_loss(chunks: Chunks, *, prior: float) -> tuple[Array, Array]:
    """`-log Binomial(k; n, prior) / n` of each row, k chunks of n tokens; it is least where k is about `prior * n`.

    Raises:
      ValueError: the prior is outside (0, 1).

    Source: Nawrot et al. 2023 (Gumbel boundaries).

    Differs: n counts a row's real tokens; the public code takes the padded length.
    """
    if not 0.0 < prior < 1.0:
        raise ValueError(f"the prior is the share of tokens that start a chunk, in (0, 1); got {prior}")
    n = jnp.maximum(jnp.sum(chunks.valid, axis=-1, dtype=jnp.float32), 1.0)
    k = jnp.sum(chunks.boundaries, axis=-1)
    ways = jax.lax.lgamma(n + 1) - jax.lax.lgamma(k + 1) - jax.lax.lgamma(n - k + 1)
    return row_mean(-(ways + k * jnp.log(prior) + (n - k) * jnp.log1p(-prior)) / n, chunks.valid)


def boundary_loss(
    logits: Float[Array, "B N"], starts: Bool[Array, "B N"], valid: Bool[Array, "B N"]
) -> tuple[Array, Array]:
    """Binary cross-entropy of `logits`, high where a chunk ends, to given chunks that begin at `starts`, in nats.

    A row's last token is left out: it ends a chunk in any case.

    Source: Nawrot et al. 2023 (boundaries from whitespace, a tokenizer or entropy spikes).

    Differs: the public code puts probabilities through the sigmoid once more.
    """
    target = jnp.pad(starts[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    counted = valid & jnp.pad(valid[:, 1:], ((0, 0), (0, 1)))
    logits = logits.astype(jnp.float32)
    losses = jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    total = jnp.sum(jnp.where(counted, losses, 0.0), axis=-1)
    return row_mean(total / jnp.maximum(jnp.sum(counted, axis=-1), 1), valid)


def entropy_spikes(entropies: Float[Array, "B N"], tokens: TokenSet) -> Chunks:
    """Chunks that end where the entropy of the next byte exceeds that at both of the two positions before.

    Source: Nawrot et al. 2023 (entropy spikes).
    """
    before, earlier = shifted(entropies), shifted(shifted(entropies))
    third = jnp.cumsum(tokens.valid, axis=-1) > 2
    return Chunks.from_ends((entropies > before) & (entropies > earlier) & third, tokens)


def row_mean(values: Float[Array, " B"], valid: Bool[Array, "B N"]) -> tuple[Array, Array]:
    """`(sum, count)` of a value for each row, over rows with a real token."""
    real = jnp.any(valid, axis=-1)
    return jnp.sum(jnp.where(real, values, 0.0)), jnp.sum(real, dtype=jnp.float32)
