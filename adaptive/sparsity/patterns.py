# SPDX-License-Identifier: Apache-2.0
"""Patterns that are known before any data: sliding windows with sinks, Longformer and BigBird.

Each is exact to the pair: blocks that a pattern cuts carry a mask of their own. Made once in NumPy, for all rows and heads.

Shapes: N tokens.
"""

from __future__ import annotations

import numpy as np

from pallas_kernels.block_sparse_attention import BlockIndex, from_block_mask, from_rule


def sink_window(length: int, *, sink: int = 4, window: int = 512, causal: bool = True, block: int = 128) -> BlockIndex:
    """The first `sink` tokens and the last `window` ones, the token itself included.

    Args:
      length: N; sink, window: tokens; causal: otherwise the window reaches as far ahead as back; block: of queries and keys.

    Raises:
      ValueError: a negative sink, or a window that does not hold the token itself.

    Source: Xiao et al. 2023 (StreamingLLM), start and recent tokens of the cache, as a pattern of a whole sequence.
    Differs: positions are those in the sequence; the cache counts positions among the keys it kept.
    """
    if sink < 0 or window < 1:
        raise ValueError(f"sink must be at least 0 and window at least 1; got {sink} and {window}")

    def rule(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        near = i - j < window
        if causal:
            return ((j < sink) | near) & (j <= i)
        return (j < sink) | (near & (j - i < window))

    return from_rule(rule, queries=length, keys=length, block_q=block, block_k=block)


def longformer(length: int, *, window: int = 512, global_tokens: int = 1, block: int = 128) -> BlockIndex:
    """A window of `window` tokens around each token, and some first tokens that see all and are seen by all.

    Args:
      length: N; window: half of it on each side; global_tokens: how many; block: of queries and keys.

    Raises:
      ValueError: an odd or non-positive window, or a negative number of global tokens.

    Source: Beltagy et al. 2020, section 3.1.
    Differs: global tokens share the projections of the others, and no layer is dilated.
    """
    if window < 2 or window % 2 or global_tokens < 0:
        raise ValueError(
            f"window must be even and positive, global_tokens at least 0; got {window} and {global_tokens}"
        )

    def rule(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (abs(i - j) <= window // 2) | (i < global_tokens) | (j < global_tokens)

    return from_rule(rule, queries=length, keys=length, block_q=block, block_k=block)


def bigbird(
    length: int, *, window: int = 3, global_blocks: int = 2, random_blocks: int = 3, block: int = 64, seed: int = 0
) -> BlockIndex:
    """Blocks around the diagonal, blocks that see all and are seen by all, and for every other row some random ones.

    Args:
      length: N; block: tokens in a block.
      window: blocks around the diagonal, odd; global_blocks: the first half of them at the start and the rest at the end.
      random_blocks: in each row, different from each other and from its window and global blocks; fewer where fewer are left.
      seed: of the random blocks.

    Raises:
      ValueError: an even window, or negative numbers.

    Source: Zaheer et al. 2020, section 2 (internal transformer construction).
    Differs: random blocks are drawn without replacement, so that no key counts twice.
    """
    if window < 1 or window % 2 == 0 or global_blocks < 0 or random_blocks < 0:
        raise ValueError(
            f"window must be odd and the other numbers at least 0; got {window}, {global_blocks} and {random_blocks}"
        )
    blocks = -(-length // block)
    places = np.arange(blocks)
    mask = abs(places[:, None] - places[None, :]) <= window // 2
    everywhere = (places < -(-global_blocks // 2)) | (places >= blocks - global_blocks // 2)
    mask |= everywhere[:, None] | everywhere[None, :]
    rng = np.random.default_rng(seed)
    for row in mask:
        free = np.flatnonzero(~row)
        row[rng.permutation(free)[:random_blocks]] = True
    return from_block_mask(mask[None, None], queries=length, keys=length, block_q=block, block_k=block)
