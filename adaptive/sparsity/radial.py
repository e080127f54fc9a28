# SPDX-License-Identifier: Apache-2.0
"""Radial attention: in video, the farther two frames are apart in time, the narrower the window between them.

Shapes: f frames, t tokens in a frame, N = f t tokens of video and X of text, which stand after the video.
"""

from __future__ import annotations

import numpy as np

from pallas_kernels.block_sparse_attention import BlockIndex, from_block_mask

MODELS = ("wan", "hunyuan")
# A diagonal narrower than this is thinned out in place of being narrowed; a literal of the published code.
_THINNEST = 128
# A block stays when more than this share of its touched columns are more than a third full.
_COLUMN_FULL, _BLOCK_FULL = 1 / 3, 0.6


def radial(
    frames: int, tokens: int, *, decay: float = 1.0, model: str = "wan", text: int = 0, block: int = 128
) -> BlockIndex:
    """Full attention within a frame and to its neighbours; half the density at every doubling of the distance in time.

    Args:
      frames, tokens: f and t. decay: factor of window widths (0.2 for Wan2.1, 0.95 for HunyuanVideo).
      model: "wan", where all attend to the first frame, or "hunyuan", where they do not.
      text: X, which all see and which sees all ("hunyuan" only); block: of queries and keys.

    The blocks that stay are full, those that go lose some pairs of the ideal pattern: the published rule. A last block that is
    only partly filled by the video is the text's.

    Raises:
      ValueError: sizes below 1, an unknown model, text with "wan", or f t that is no whole number of blocks without text.

    Source: Li et al. 2025 (Radial Attention), `gen_log_mask_shrinked` of the published code.
    Differs: the lines meant to force the first and last blocks there select nothing, and are left out.
    """
    if min(frames, tokens, block) < 1 or text < 0 or decay <= 0:
        raise ValueError(f"frames, tokens, block and decay must be positive; got {frames}, {tokens}, {block}, {decay}")
    if model not in MODELS:
        raise ValueError(f"model={model!r} is not one of {MODELS}")
    if text and model == "wan":
        raise ValueError(f"text={text} tokens go with model='hunyuan'; in 'wan' text is attended to apart")
    length = frames * tokens + text
    if not text and length % block:
        raise ValueError(f"{frames} x {tokens} tokens are no whole number of blocks of {block}")
    blocks = -(-length // block)
    mask = np.zeros((blocks, blocks), bool)
    shrunk: dict[tuple[int, int, int], np.ndarray] = {}
    for i, j in np.ndindex(frames, frames):
        width = _width(abs(i - j), tokens, decay, block)
        if model == "wan" and j == 0:
            width = tokens
        if width is None:
            continue
        key = (width, i * tokens % block, j * tokens % block)
        if key not in shrunk:
            shrunk[key] = _shrink(tokens, *key, block)
        rows, columns = i * tokens // block, j * tokens // block
        view = mask[rows : rows + len(shrunk[key]), columns : columns + len(shrunk[key])]
        view |= shrunk[key][: view.shape[0], : view.shape[1]]
    if text:
        border = frames * tokens // block
        mask[border:] = mask[:, border:] = True
    return from_block_mask(mask[None, None], queries=length, keys=length, block_q=block, block_k=block)


def _width(distance: int, tokens: int, decay: float, block: int) -> float | None:
    """Tokens on each side of the diagonal of a pair of frames; None where the pair is left out."""
    if distance <= 1:
        return tokens
    reach = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if reach < _THINNEST and distance % int(_THINNEST / reach):
        return None
    return max(reach * decay, block)


def _shrink(tokens: int, width: float, row_offset: int, column_offset: int, block: int) -> np.ndarray:
    """Blocks of one pair of frames: `[ceil(t / block)] * 2`, what hangs over the end being dropped."""
    size = -(-tokens // block)
    place = np.arange(tokens)
    padded = np.zeros((2 * size * block + 2 * block,) * 2, bool)
    rows, columns = (slice(offset, offset + tokens) for offset in (row_offset, column_offset))
    padded[rows, columns] = abs(place[:, None] - place[None, :]) <= width
    padded = padded[: size * block, : size * block].reshape(size, block, size, block)
    density = padded.mean(axis=1)
    share = (density > _COLUMN_FULL).sum(-1) / ((density > 0).sum(-1) + 1e-9)
    return share > _BLOCK_FULL
