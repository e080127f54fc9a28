# SPDX-License-Identifier: Apache-2.0
"""Depth by position: later tokens of a generation run through fewer layers, all rows of a batch alike.

Shapes: B batch, N tokens, T positions of a generation, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

_PAPER = "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference"


def layer_counts(layers: int, *, most: int, least: int, horizon: int, bottom: int = 1) -> tuple[int, ...]:
    """How many layers run for each of the first `horizon` tokens: from `most` down to `least`, on a line.

    Args:
      layers: L.
      most, least: layers of the first and of the last token.
      horizon: T; tokens behind it run `least` layers.
      bottom: lowest layers that always run.

    Raises:
      ValueError: a value outside its range, or `least` above `most`.

    Source: Del Corro et al. 2023.

    Differs: a reconstruction of the line from the abstract and from descriptions by others; rounds to even at halves.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 token; got {horizon}")
    steps = np.minimum(np.arange(horizon), horizon - 1) / max(horizon - 1, 1)
    counts = tuple(round(most - (most - least) * share) for share in steps.tolist())
    return check_counts(counts, layers, bottom=bottom)


def counts_for_speedup(layers: int, speedup: float, *, horizon: int, bottom: int = 1) -> tuple[int, ...]:
    """`layer_counts` that run `layers / speedup` layers a token on average, from as many layers as that allows.

    Raises:
      ValueError: a speedup below 1, or one that leaves less than the bottom layers.

    Differs: a reconstruction; `most + least = 2 L / speedup`.
    """
    lowest = max(bottom, 1)
    if not 1 <= speedup <= layers / lowest:
        raise ValueError(f"speedup must lie in 1..{layers / lowest:g} for {layers} layers; got {speedup}")
    total = round(2 * layers / speedup)
    most = min(layers, total - lowest)
    return layer_counts(layers, most=most, least=total - most, horizon=horizon, bottom=bottom)


def check_counts(counts: Sequence[int], layers: int, *, bottom: int = 1) -> tuple[int, ...]:
    """The counts as a tuple, if they can be decoded with a cache.

    Raises:
      ValueError: no counts; one outside `bottom`..L; or one that is above the count before it: its token would look for keys
        and values of layers that did not run for the tokens before.
    """
    counts = tuple(int(count) for count in counts)
    if not 0 <= bottom <= layers:
        raise ValueError(f"bottom must lie in 0..{layers} (the layers); got {bottom}")
    lowest = max(bottom, 1)
    if not counts or not all(lowest <= count <= layers for count in counts):
        raise ValueError(
            f"every token runs {lowest}..{layers} layers, the {bottom} at the bottom included; got {counts}"
        )
    for place, (before, after) in enumerate(itertools.pairwise(counts), start=1):
        if after > before:
            raise ValueError(
                f"an exit schedule must not rise: token {place} has {after} layers after {before}, and would miss keys and "
                f"values of the tokens before it; got {counts}"
            )
    return counts


def active_layers(counts: Sequence[int], layers: int, *, bottom: int = 1) -> Bool[np.ndarray, "T L"]:
    """`[T, L]`: the `bottom` lowest layers and, of the others, the highest, so many as each count says.

    Raises:
      ValueError: what `check_counts` refuses.

    Source: Del Corro et al. 2023 (low layers are skipped, the highest and the lowest stay).

    Differs: a reconstruction.
    """
    counts = np.asarray(check_counts(counts, layers, bottom=bottom))[:, None]
    layer = np.arange(layers)
    return (layer < bottom) | (layer >= layers - (counts - bottom))


def evenly_spaced(layers: int, speedup: float) -> tuple[int, ...]:
    """The layers that every token runs when the same are skipped at all positions: about `L / speedup` of them.

    The first and the last stay, and of those between the multiples of `K' = floor(L / (K - 1))` until there are K.

    Raises:
      ValueError: fewer than two layers stay.

    Source: the public code of Unified Layer Skipping (a baseline of later work).
    """
    keep = int(layers / speedup) if speedup >= 1 else 0
    if keep < 2:
        raise ValueError(f"speedup must lie in 1..{layers / 2:g}, so that two of {layers} layers stay; got {speedup}")
    kept = [0]
    for layer in range(1, layers - 1):
        if len(kept) < keep - 1 and layer % (layers // (keep - 1)) == 0:
            kept.append(layer)
    return (*kept, layers - 1)


@register(
    "skip_decode", kind="skipping", paper=_PAPER, citation="Del Corro et al. 2023. arXiv:2307.02628", trained="optional"
)
def skip_decode(
    tokens: TokenSet, signals: Signals, *, counts: Sequence[int] = (8, 6, 4, 2), layers: int = 8, bottom: int = 1
) -> Bool[Array, "B N L"]:
    """The layers that run for each token, `[B, N, L]`, from its position in the generation alone.

    Args:
      tokens: `coords [..., 0]` counts generated tokens from 0; what comes before is a prompt and runs as position 0 does.
      signals: none.
      counts: layers of the tokens at positions 0, 1, ...; the last one holds for all positions behind.
      layers: L; bottom: lowest layers that always run.

    Raises:
      ValueError: the counts rise, or do not fit the layers.

    Source: Del Corro et al. 2023.

    Differs: a reconstruction, see `layer_counts` and `active_layers`.
    """
    del signals
    table = jnp.asarray(active_layers(counts, layers, bottom=bottom))
    place = jnp.clip(tokens.coords[..., 0].astype(jnp.int32), 0, len(table) - 1)
    return table[place] & tokens.valid[..., None]
