# SPDX-License-Identifier: Apache-2.0
"""The controller that steers a delete gate to a target rate."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class Controller:
    """State of the proportional-integral controller; float32 scalars in the train state.

    Attributes:
      proportional: smoothed proportional part; integral: summed error; alpha: weight of the gate regulariser, >= 0.
    """

    proportional: Float[Array, ""]
    integral: Float[Array, ""]
    alpha: Float[Array, ""]

    @classmethod
    def create(cls, alpha: float = 0.0) -> Controller:
        """A controller at rest with a first weight `alpha`."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, jnp.asarray(alpha, jnp.float32))

    def update(
        self, deleted: Float[Array, ""], *, target: float, kp: float = 0.5, ki: float = 1e-5, smoothing: float = 0.9
    ) -> Controller:
        """The controller after a step in which the share `deleted` of tokens was deleted.

        `P <- 0.9 P + 0.1 kp e; I <- I + ki e; alpha = max(0, P + I)` with `e = target - deleted`.

        Args:
          deleted: share of real tokens deleted, over the global batch.
          target: wanted share, in (0, 1).
          kp, ki: gains; smoothing: of the proportional part.

        Raises:
          ValueError: the target is outside (0, 1).

        Source: Kallini et al. 2025, section 3 (PI controller).

        Differs: one update for each optimiser step from the global batch; the public code updates for each micro-batch, in
        each process by itself, and on evaluation batches too.
        """
        if not 0.0 < target < 1.0:
            raise ValueError(f"the target deletion rate must lie in (0, 1); got {target}")
        error = target - deleted
        proportional = smoothing * self.proportional + (1 - smoothing) * kp * error
        integral = self.integral + ki * error
        return Controller(proportional, integral, jnp.maximum(proportional + integral, 0.0))
