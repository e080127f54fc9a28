# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding from explicit positions, so that tokens keep their place after a reduction."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Stretches low frequencies so that a model reads longer texts than it was trained on.

    Waves longer than `original_length / low` turn `factor` times slower, those shorter than `original_length / high` as before;
    in between the two are mixed.

    Attributes:
      factor: above 1 for longer texts.
      low, high: `low_freq_factor` and `high_freq_factor` of the published configs, low < high.
      original_length: tokens of the texts of training.

    Raises:
      ValueError: at construction, for a value outside its range.

    Source: Llama 3.1's published configs (`rope_type: llama3`).
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low < self.high and self.original_length > 0):
            raise ValueError(f"factor and original_length must be positive and 0 < low < high; got {self}")

    def scale(self, frequencies: Float[Array, " P"]) -> Float[Array, " P"]:
        """The frequencies, in radians a token, after stretching."""
        waves = self.original_length * frequencies / (2 * math.pi)
        kept = jnp.clip((waves - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


def rotate(
    x: Float[Array, "B N H d"],
    positions: Num[Array, "b N"],
    *,
    base: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
) -> Float[Array, "B N H d"]:
    """`x [B, N, H, d]` with each pair (i, i + d/2) turned by `positions [B or 1, N]` times `base ** (-2 i / d)`.

    `scaling` changes those frequencies. Angles are in float32; the result has the dtype of `x`.

    Raises:
      ValueError: d is odd, or the positions do not fit.

    Source: Su et al. 2021 (RoFormer), in the half-split layout of GPT-NeoX and Llama.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary embedding needs an even head width; got {width}")
    if positions.ndim != 2 or positions.shape[0] not in (1, x.shape[0]) or positions.shape[1] != x.shape[1]:
        raise ValueError(f"positions must be [1 or {x.shape[0]}, {x.shape[1]}]; got {positions.shape}")
    frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is not None:
        frequency = scaling.scale(frequency)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
