# SPDX-License-Identifier: Apache-2.0
"""Embeddings of patches, of tokens and of positions.

Shapes: B batch, N tokens, D features; grids h w, patches of p x p pixels with c channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layers.linear import Initializer, Linear
from layers.norms import LayerNorm


class PatchEmbed(nn.Module):
    """Images `[B, h p, w p, c]` to patch tokens `[B, h w, D]`, row by row: one matrix product over flattened patches.

    Attributes:
      patch_size: p.
      width: D.
    """

    patch_size: int
    width: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, pixels: Float[Array, "B y x c"]) -> Float[Array, "B N D"]:
        """Raises ValueError when the image is not a whole number of patches."""
        patches = patchify(pixels, self.patch_size)
        return Linear(
            (self.width,),
            ("patch", "embed"),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="projection",
        )(patches)


class ConvStem(nn.Module):
    """Images `[B, y, x, c]` to tokens `[B, h w, D]`, row by row: 3 x 3 convolutions of stride 2, then a linear map.

    Attributes:
      channels: of each convolution; n of them give patches of `2 ** n` pixels a side.
      width: D.

    Source: Xiao et al. 2021, "Early convolutions help transformers see better".
    Differs: each convolution is followed by a layer norm over its channels, not by a batch norm.
    """

    channels: tuple[int, ...]
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B y x c"]) -> Float[Array, "B N D"]:
        """Raises ValueError when the image is not a whole number of patches."""
        size = 2 ** len(self.channels)
        if pixels.ndim != 4 or pixels.shape[1] % size or pixels.shape[2] % size:
            raise ValueError(
                f"pixels must be [B, height, width, channels] with sides divisible by {size}, as {len(self.channels)} "
                f"convolutions halve them; got {pixels.shape}"
            )
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.with_logical_partitioning(nn.initializers.he_normal(), (None, None, None, "embed"))
        x = pixels.astype(self.dtype)
        for index, channels in enumerate(self.channels):
            x = nn.Conv(
                channels, (3, 3), strides=2, use_bias=False, kernel_init=init, name=f"convolution_{index}", **common
            )(x)
            x = nn.relu(LayerNorm(name=f"norm_{index}", **common)(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return Linear((self.width,), ("patch", "embed"), name="projection", **common)(x)


def patchify(pixels: Float[Array, "B y x c"], size: int) -> Float[Array, "B N C"]:
    """`[B, h p, w p, c]` to flattened patches `[B, h w, p p c]`, each in the order row, column, channel.

    Raises:
      ValueError: not four axes, or sides that are not multiples of `size`.
    """
    if pixels.ndim != 4 or pixels.shape[1] % size or pixels.shape[2] % size:
        raise ValueError(
            f"pixels must be [B, height, width, channels] with sides divisible by {size}; got {pixels.shape}"
        )
    batch, height, width, channels = pixels.shape
    pixels = pixels.reshape(batch, height // size, size, width // size, size, channels)
    pixels = pixels.transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(batch, (height // size) * (width // size), size * size * channels)


def grid_coords(height: int, width: int) -> Float[np.ndarray, "N 2"]:
    """`[h w, 2]` row and column of each patch, row by row."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns], axis=-1).reshape(-1, 2).astype(np.float32)


def sincos_2d(height: int, width: int, features: int, *, base: float = 10_000.0) -> Float[np.ndarray, "N D"]:
    """Fixed positions `[h w, D]`: sine and cosine of the column in the first half of the features, of the row in the second.

    Raises:
      ValueError: D is not a multiple of 4.

    Source: Chen et al. 2021 (MoCo v3); Beyer et al. 2022, "Better plain ViT baselines".
    """
    if features % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4; got {features}")
    quarter = features // 4
    frequency = base ** (-np.arange(quarter) / max(quarter - 1, 1))
    rows, columns = np.split(grid_coords(height, width), 2, axis=-1)
    parts = [
        np.sin(columns * frequency),
        np.cos(columns * frequency),
        np.sin(rows * frequency),
        np.cos(rows * frequency),
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each of N places: `[B, N, D] -> [B, N, D]`."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        init = nn.with_logical_partitioning(self.embedding_init, ("position", "embed"))
        return x + self.param("embedding", init, x.shape[1:], self.param_dtype).astype(self.dtype)


class TokenEmbed(nn.Module):
    """Vocabulary ids `[B, N]` to `[B, N, D]`.

    Attributes:
      vocab: number of rows.
      width: D.
    """

    vocab: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(1.0)

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.embedding_init, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab, self.width), self.param_dtype)

    def __call__(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """Raises TypeError when the ids are not integers."""
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"token ids must be integers; got {ids.dtype}")
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Logits `[B, N, V]` in float32 against the same table (tied embeddings)."""
        return jnp.einsum(
            "bnd,vd->bnv", x.astype(self.dtype), self.embedding.astype(self.dtype), preferred_element_type=jnp.float32
        )
