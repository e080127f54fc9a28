# SPDX-License-Identifier: Apache-2.0
"""The learned part of MrT5's delete gate: one logit for each token."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.norms import RMSNorm


class DeleteGate(nn.Module):
    """Logits `[B, N]` of the delete gate, high to keep: `RMSNorm(x) w + b` on the un-normalised residual stream.

    Attributes:
      bias_init: first value of b; at 1 and with k = -30 a gate starts at -8.07, which keeps every token.

    Source: Kallini et al. 2025 (MrT5), section 3; initial values from the public code.
    """

    bias_init: float = 1.0

    @nn.compact
    def __call__(self, features: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        """Gate logits `[B, N]` of `features [B, N, D]`, in float32 whatever the model computes in."""
        normed = RMSNorm(dtype=jnp.float32, name="norm")(features.astype(jnp.float32))
        logits = nn.Dense(
            1,
            dtype=jnp.float32,
            kernel_init=nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("embed", "gate")),
            bias_init=nn.with_logical_partitioning(nn.initializers.constant(self.bias_init), ("gate",)),
            name="logit",
        )(normed)
        return logits[..., 0]
