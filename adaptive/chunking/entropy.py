# SPDX-License-Identifier: Apache-2.0
"""Patches that start where the next byte is hard to predict.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

from adaptive.chunking.chunks import Chunks, shifted, split_long
from adaptive.chunking.fixed import position
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

MODES = ("global", "monotonic", "both")


@register(
    "entropy_patches",
    kind="chunking",
    paper="Byte Latent Transformer: Patches Scale Better Than Tokens",
    citation="Pagnoni et al. ACL 2025. arXiv:2412.09871",
    signals=("entropies",),
    trained="yes",
)
def entropy_patches(
    tokens: TokenSet,
    signals: Signals,
    *,
    mode: str = "global",
    threshold: float = 1.335442,
    rise: float = 0.0,
    longest: int | None = None,
) -> Chunks:
    """A patch starts at a byte whose prediction had an entropy H over a threshold, or one that rose by more than another.

    With H_i the entropy of predicting byte i + 1, the starts are, besides those forced at 0 and 1 (and 2 with a rise), i + 1
    where: "global" H_i > threshold, i >= 1; "monotonic" H_i - H_(i-1) > rise, i >= 2; "both" both of these, i >= 3.

    Args:
      tokens: `[B, N, D]`.
      signals: `entropies` in nats.
      mode: "global", "monotonic" or "both".
      threshold: nats (the release's default: patches of about 4.5 bytes under its byte model).
      rise: nats; 0 here: a useful value depends on the byte model.
      longest: bytes in a patch at most; longer ones are cut into pieces of that length.

    Raises:
      ValueError: an unknown mode.

    Source: Pagnoni et al. 2025; forced starts as in the public code (`patcher.py`).
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; one of {MODES}")
    entropies, place = signals.entropies, position(tokens)
    high, risen = entropies > threshold, entropies - shifted(entropies) > rise
    ends, forced, earliest = {
        "global": (high, 1, 1),
        "monotonic": (risen, 2, 2),
        "both": (high & risen, 2, 3),
    }[mode]
    starts = shifted(ends & (place >= earliest)) | (place <= forced)
    return Chunks.create(split_long(starts, tokens, longest), tokens)
