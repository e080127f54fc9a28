# SPDX-License-Identifier: Apache-2.0
"""Gradient-based subword tokenization: every byte mixes the means of the blocks around it, then equal strides are pooled.

Shapes: B batch, N tokens, D features, S block sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive.chunking.chunks import Chunks
from adaptive.chunking.fixed import strided
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet
from pallas_kernels.biased_flash_attention import biased_attention

# Queries of the consensus whose rows of the map exist at a time.
_QUERY_BLOCK = 128


@register(
    "gbst",
    kind="chunking",
    paper="Charformer: Fast Character Transformers via Gradient-based Subword Tokenization",
    citation="Tay et al. ICLR 2022. arXiv:2106.12672",
    trained="yes",
)
def gbst(tokens: TokenSet, signals: Signals, *, stride: int = 2) -> Chunks:
    """A chunk every `stride` positions, to be pooled by the mean of what `mix` makes of the embeddings.

    Args:
      tokens: `[B, N, D]`.
      signals: none.
      stride: the down-sampling rate d_s (2 to 4).

    Raises:
      ValueError: the stride is not positive.

    Source: Tay et al. 2022, section 2 (downsampling).
    """
    return strided(tokens, signals, stride=stride)


def mix(
    features: Float[Array, "B N D"],
    valid: Bool[Array, "B N"],
    score: Callable[[Float[Array, "B K D"]], Float[Array, "B K"]],
    *,
    blocks: int = 4,
    consensus: bool = True,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N S"]]:
    """Every token as a mixture of the means of the blocks of 1 to `blocks` tokens that it lies in, and the shares.

    Args:
      features: `[B, N, D]`; valid: `[B, N]` bool, tokens that count in a mean.
      score: gives each block mean a number; the softmax over block sizes makes the shares.
      blocks: largest block, M.
      consensus: let every token average its shares with those of tokens that agree.

    Raises:
      ValueError: there is no block size.

    Source: Tay et al. 2022, section 2 (block means, scores, latent subwords).
    """
    if blocks < 1:
        raise ValueError(f"the largest block has at least one token; got {blocks}")
    length = features.shape[1]
    means = [block_means(features, valid, size) for size in range(1, blocks + 1)]
    scores = [jnp.repeat(score(mean), size, axis=1)[:, :length] for size, mean in enumerate(means, start=1)]
    shares = jax.nn.softmax(jnp.stack(scores, axis=-1).astype(jnp.float32), axis=-1)
    if consensus:
        shares = agree(shares, valid)
    mixed = sum(
        shares[..., size - 1, None].astype(features.dtype) * jnp.repeat(mean, size, axis=1)[:, :length]
        for size, mean in enumerate(means, start=1)
    )
    return mixed, shares


def block_means(features: Float[Array, "B N D"], valid: Bool[Array, "B N"], size: int) -> Float[Array, "B K D"]:
    """`[B, ceil(N / size), D]` mean over the real tokens of each block of `size`; 0 in a block of padding."""
    if size == 1:
        return jnp.where(valid[..., None], features, 0)
    batch, length, width = features.shape
    fill = -length % size
    real = jnp.pad(valid, ((0, 0), (0, fill))).reshape(batch, -1, size, 1)
    padded = jnp.pad(features, ((0, 0), (0, fill), (0, 0))).reshape(batch, -1, size, width)
    total = jnp.sum(jnp.where(real, padded, 0), axis=2, dtype=jnp.float32)
    return (total / jnp.maximum(jnp.sum(real, axis=2), 1)).astype(features.dtype)


def agree(shares: Float[Array, "B N S"], valid: Bool[Array, "B N"]) -> Float[Array, "B N S"]:
    """`softmax(P P^T) P` over the real tokens of each row, some rows of the map at a time; P `[B, N, S]` float32.

    Source: Tay et al. 2022, section 2 (position-wise score calibration).
    """
    batch, length, sizes = shares.shape
    keys, key_bias = shares[:, :, None, :], jnp.where(valid, 0.0, -jnp.inf)

    # Rows are computed again in the backward pass; otherwise the loop would keep the whole map.
    @jax.checkpoint
    def rows(query: Float[Array, "B Q 1 S"]) -> Float[Array, "B Q 1 S"]:
        return biased_attention(query, keys, keys, key_bias=key_bias, scale=1.0)

    if length <= _QUERY_BLOCK:
        return rows(keys)[:, :, 0]
    padded = jnp.pad(shares, ((0, 0), (0, -length % _QUERY_BLOCK), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, -1, _QUERY_BLOCK, 1, sizes), 1, 0)
    out = jax.lax.map(rows, blocks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, sizes)[:, :length]
