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
      proportional: smoothed proportional part; integral: summed error; alpha: weight of the gate regulariser, >= 0 unless the
        floor is lowered.
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
        self,
        deleted: Float[Array, ""],
        *,
        target: float,
        kp: float = 0.5,
        ki: float = 1e-5,
        smoothing: float = 0.9,
        repeats: int = 1,
        windup_limit: float | None = None,
        floor: float = 0.0,
    ) -> Controller:
        """The controller after a step in which the share `deleted` of tokens was deleted.

        `P <- 0.9 P + 0.1 kp e; I <- I + ki e; alpha = max(0, P + I)` with `e = target - deleted`.

        Args:
          deleted: share of real tokens deleted, over the global batch.
          target: wanted share, in (0, 1).
          kp, ki: gains, not negative; smoothing: of the proportional part, in [0, 1).
          repeats: how often the update is made with the same share; the micro-batches of a step stand for the public code's
            updates.
          windup_limit: keeps the integral in [floor, windup_limit]; None leaves it free, as published. At rest the error and
            so P are 0 and alpha is I: an integral that no alpha at rest can have only delays the way back, which otherwise
            takes as long as the error of the other sign took to build it up.
          floor: the least alpha, at most 0. At 0, as published, alpha never rewards keeping: a gate that has deleted too much
            comes back only as far as the task itself pulls it. Below 0 it is pulled back.

        Raises:
          ValueError: a value outside the range above, or the target outside (0, 1).

        Source: Kallini et al. 2025, section 3 (PI controller).

        Differs: one update for each optimiser step from the global batch; the public code updates for each micro-batch, in
        each process by itself, and on evaluation batches too (`repeats` has its gains, and the mean share of the step in
        place of each micro-batch's own). It has neither a limit for the integral nor a floor other than 0.
        """
        if not 0.0 < target < 1.0:
            raise ValueError(f"the target deletion rate must lie in (0, 1); got {target}")
        if kp < 0 or ki < 0 or not 0.0 <= smoothing < 1.0:
            raise ValueError(
                f"kp and ki must not be negative and the smoothing must lie in [0, 1); got {kp}, {ki} and {smoothing}"
            )
        if repeats < 1 or (windup_limit is not None and windup_limit <= 0):
            raise ValueError(
                f"repeats must be at least 1 and windup_limit positive or None; got {repeats} and {windup_limit}"
            )
        if floor > 0:
            raise ValueError(f"the floor of alpha must not be positive, or no gate could rest; got {floor}")
        error = target - deleted
        # The geometric series of `repeats` updates with one and the same error.
        old = smoothing**repeats
        proportional = old * self.proportional + (1 - old) * kp * error
        integral = self.integral + repeats * ki * error
        if windup_limit is not None:
            integral = jnp.clip(integral, floor, windup_limit)
        return Controller(proportional, integral, jnp.maximum(proportional + integral, floor))
