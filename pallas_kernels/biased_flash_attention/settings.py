# SPDX-License-Identifier: Apache-2.0
"""How logits are made and become weights, as every implementation is told.

Shapes: B batch, Q queries, K keys, H heads.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.position_bias import PositionBias


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `biased_attention` is told beside its arrays; `scale` is a number."""

    key_bias: Float[Array, "B K"] | None
    bias: Float[Array, "b H Q K"] | PositionBias | None
    causal: bool
    softmax: str
    scale: float
