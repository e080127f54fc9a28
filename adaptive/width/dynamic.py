# SPDX-License-Identifier: Apache-2.0
"""Dynamic width as in DyDiT, where it applies to a plain transformer: groups of channels, and tokens that pass a layer by.

Shapes: B batch, N tokens, K groups of channels.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive import relaxations
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet


@register(
    "dydit",
    kind="width",
    paper="Dynamic Diffusion Transformer",
    citation="Zhao et al. 2025, ICLR, arXiv:2410.03456",
    signals=("choice_logits",),
    trained="yes",
)
def dydit(tokens: TokenSet, signals: Signals, *, temperature: float = 5.0) -> Float[Array, "B N K"]:
    """The channel groups of the feed-forward layer that each token runs, `[B, N, K]` of 0 and 1; none in padding.

    Args:
      tokens: the token set.
      signals: `choice_logits [B, N, K]`: the first says whether the token runs the layer at all, the others switch on the
        groups after the first, which always runs; and `rng` to draw in training.
      temperature: of the relaxed draw.

    Source: Zhao et al. 2025 (timestep-wise dynamic width, spatial-wise dynamic tokens).

    Differs: in a diffusion transformer the groups hang on the timestep; a plain transformer has none, and the layer that makes
      the logits decides what they hang on.
    """
    logits = signals.choice_logits
    if signals.rng is None:
        switches = (logits > 0).astype(jnp.float32)
    else:
        switches = relaxations.gumbel_sigmoid(logits, signals.rng, temperature=temperature, hard=True)
    token, groups = switches[..., :1], switches[..., 1:]
    chosen = token * jnp.concatenate([jnp.ones_like(token), groups], axis=-1)
    return jnp.where(tokens.valid[..., None], chosen, 0.0)


def compute_loss(share: Float[Array, ""] | Array, target: float | Array) -> Array:
    """Squared distance of the realised share of compute from the target.

    Raises:
      ValueError: a Python target outside (0, 1] (a traced one cannot be checked).

    Source: Zhao et al. 2025, the loss on FLOPs.
    """
    if isinstance(target, (int, float)) and not 0 < target <= 1:
        raise ValueError(f"the target must lie in (0, 1], a share of the static model's compute; got {target}")
    return jnp.square(jnp.mean(share) - target)


def ramp(step: Array, target: float, warmup: int) -> Array:
    """The target of a step: from 1 down to `target` over `warmup` steps.

    Source: DyDiT, public code.
    """
    return 1 - (1 - target) * jnp.clip(jnp.asarray(step, jnp.float32) / max(warmup, 1), 0.0, 1.0)
