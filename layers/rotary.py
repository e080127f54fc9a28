# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding from explicit positions, so that tokens keep their place after a reduction."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def rotate(
    x: Float[Array, "B N H d"], positions: Num[Array, "b N"], *, base: float = 10_000.0
) -> Float[Array, "B N H d"]:
    """`x [B, N, H, d]` with each pair (i, i + d/2) turned by `positions [B or 1, N]` times `base ** (-2 i / d)`.

    Angles are in float32; the result has the dtype of `x`.

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
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
