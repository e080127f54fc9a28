# SPDX-License-Identifier: Apache-2.0
"""Halting by accumulated scores: a token stops once the scores of its layers add up to 1, and ends as their weighted mean.

Shapes: B batch, N tokens, L layers.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

EPSILON = 0.01


@flax.struct.dataclass
class Halting:
    """What a token has gone through.

    Attributes:
      total: `[B, N]` sum of scores; running: `[B, N]` whether the next layer runs.
      ponder: `[B, N]` layers run, and the remainder of those that have halted.
    """

    total: Float[Array, "B N"]
    running: Bool[Array, "B N"]
    ponder: Float[Array, "B N"]

    @classmethod
    def create(cls, tokens: TokenSet) -> Halting:
        """Before the first layer; padding does not run."""
        zeros = jnp.zeros(tokens.mass.shape, jnp.float32)
        return cls(zeros, tokens.valid, zeros)

    def advance(
        self, score: Float[Array, "B N"], *, last: bool = False, epsilon: float = EPSILON
    ) -> tuple[Halting, Float[Array, "B N"]]:
        """The state after a layer that scored `score`, and how much that layer counts, `[B, N]`.

        `last` halts whatever still runs.

        Source: Graves 2016; Yin et al. 2022 (A-ViT), algorithm 1.
        """
        reached = self.running if last else self.running & (self.total + score >= 1 - epsilon)
        running = self.running & ~reached
        left = 1 - self.total
        weight = jnp.where(reached, left, jnp.where(running, score, 0.0))
        ponder = self.ponder + self.running + jnp.where(reached, left, 0.0)
        return Halting(self.total + weight, running, ponder), weight


@register(
    "avit",
    kind="depth",
    paper="A-ViT: Adaptive Tokens for Efficient Vision Transformer",
    citation="Yin et al. 2022, CVPR, arXiv:2112.07658",
    signals=("layer_scores",),
    trained="yes",
)
def avit(tokens: TokenSet, signals: Signals, *, epsilon: float = EPSILON) -> Float[Array, "B N L"]:
    """How much each layer counts when a token halts at the sum of its scores; 0 in padding.

    Args:
      tokens: the token set; signals: `layer_scores [B, N, L]` in 0..1, of which that of the last layer is not read.
      epsilon: how far below 1 the sum may stay.

    Source: algorithm 1.

    Differs: a token whose sum is exactly `1 - epsilon` halts; in the public code it does neither.
    """
    state, weights = Halting.create(tokens), []
    scores = jnp.unstack(signals.layer_scores, axis=-1)
    for layer, score in enumerate(scores, start=1):
        state, weight = state.advance(score, last=layer == len(scores), epsilon=epsilon)
        weights.append(weight)
    return jnp.stack(weights, axis=-1)


def halting_score(channel: Float[Array, "B N"], *, scale: float = 10.0, center: float = 30.0) -> Float[Array, "B N"]:
    """`sigmoid(scale x - center)` of the first channel of a token's state, which carries the score without new parameters.

    Source: Yin et al. 2022; scale 10 and centre 30 (Ti) or 75 (S) in the public code.
    """
    return jax.nn.sigmoid(scale * channel.astype(jnp.float32) - center)


def depth_target(layers: int, mean: float) -> Float[Array, " L"]:
    """A Gaussian over layers 1..L of deviation 1 around `mean`, normalised: where halting should happen.

    Raises:
      ValueError: a mean outside 1..L.

    Source: Yin et al. 2022 (distributional prior).
    """
    if not 1 <= mean <= layers:
        raise ValueError(f"the target depth must lie in 1..{layers} (the layers); got {mean}")
    return jax.nn.softmax(-0.5 * jnp.square(jnp.arange(1, layers + 1) - mean))


def depth_prior_loss(scores: Float[Array, "B N L"], weight: Float[Array, "B N"], mean: float) -> Float[Array, ""]:
    """Kullback-Leibler divergence of the mean halting score of each layer, normalised, from the target of that mean.

    Source: Yin et al. 2022 (distributional prior); clamped to 0.01..0.99 as in the public code.
    """
    target = depth_target(scores.shape[-1], mean)
    average = jnp.einsum("bnl,bn->l", scores, weight) / jnp.maximum(jnp.sum(weight), 1.0)
    average = jnp.clip(average / jnp.maximum(jnp.sum(average), 1e-6), 0.01, 0.99)
    return jnp.sum(target * (jnp.log(target) - jnp.log(average)))
