# SPDX-License-Identifier: Apache-2.0
"""Span corruption over bytes: spans are cut out of a text, a sentinel marks each place, and the decoder writes them.

Letters: B batch, L raw length, N encoder length, T decoder length (both with the final eos).

Source: Raffel et al. 2020 (T5), section 3.1.4, with the byte settings of Xue et al. 2022 (ByT5): noise density 0.15,
mean span 20 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data import byte_vocab


def noise_counts(raw_length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Returns (noise bytes, spans) of a raw text of `raw_length` bytes; at least one of each, and one byte stays."""
    noise = min(max(round(raw_length * noise_density), 1), raw_length - 1)
    return noise, max(round(noise / mean_span), 1)


def _both_lengths(raw_length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Returns (N, T) of a raw text: what is kept and what is cut out, each with one sentinel a span and an eos."""
    noise, spans = noise_counts(raw_length, noise_density, mean_span)
    return raw_length - noise + spans + 1, noise + spans + 1


def lengths(inputs_length: int, noise_density: float = 0.15, mean_span: float = 20.0) -> tuple[int, int]:
    """Returns (L, T): the longest raw text whose corrupted form fills `inputs_length` ids, and its target's length.

    `lengths(1024, 0.15, 20)` is `(1193, 189)`, the published setting.

    Raises:
      ValueError: the density is not inside (0, 1), the mean span is below 1, the spans do not fit between the gaps,
        or no raw length gives exactly `inputs_length`.
    """
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density={noise_density} must lie strictly between 0 and 1 (the usual value is 0.15)")
    if mean_span < 1:
        raise ValueError(f"mean_span={mean_span} must be at least 1 byte (the usual value is 20)")
    if inputs_length < 3:
        raise ValueError(f"inputs_length={inputs_length} must be at least 3: one byte, one sentinel and eos")
    raw_length = inputs_length - 1  # never too long: spans are at most as many as noise bytes, so N <= L + 1
    while _both_lengths(raw_length + 1, noise_density, mean_span)[0] <= inputs_length:
        raw_length += 1
    found, targets_length = _both_lengths(raw_length, noise_density, mean_span)
    if found != inputs_length:
        raise ValueError(
            f"no raw length gives inputs of exactly {inputs_length} ids at noise_density={noise_density}, "
            f"mean_span={mean_span}; the nearest is {found}"
        )
    noise, spans = noise_counts(raw_length, noise_density, mean_span)
    if spans > raw_length - noise:
        raise ValueError(
            f"{spans} spans need as many gaps, but only {raw_length - noise} of {raw_length} bytes are kept at "
            f"noise_density={noise_density}, mean_span={mean_span}; lower the density or lengthen the spans"
        )
    byte_vocab.sentinels(spans)  # refuses more spans than there are sentinels
    return raw_length, targets_length


def random_composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `[parts]` positive integers that add up to `total`, every such sequence being equally likely.

    Raises:
      ValueError: `parts` is not between 1 and `total`.
    """
    if not 1 <= parts <= total:
        raise ValueError(f"{total} cannot be divided into {parts} positive parts")
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupt(
    ids: np.ndarray, rng: np.random.Generator, *, noise_density: float = 0.15, mean_span: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts ids `[L]` and returns `(inputs [N], targets [T])`, int32; N and T depend on L alone.

    See `corrupt_rows`; raises as it does.
    """
    inputs, targets = corrupt_rows(ids[None], [rng], noise_density=noise_density, mean_span=mean_span)
    return inputs[0], targets[0]


def corrupt_rows(
    ids: np.ndarray, rngs: Sequence[np.random.Generator], *, noise_density: float = 0.15, mean_span: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts rows of `ids [B, L]`, each with its own generator, to `(inputs [B, N], targets [B, T])`, int32.

    Gaps and spans alternate, starting with a gap. In the inputs each span is one sentinel; in the targets each span
    follows its sentinel; both end with eos.

    Source: Raffel et al. 2020, section 3.1.4; the compositions as in the authors' `random_spans_noise_mask`.

    Raises:
      ValueError: rows of fewer than 2 ids, another number of generators, or spans that do not fit between the gaps.
    """
    if ids.ndim != 2 or ids.shape[1] < 2 or len(rngs) != len(ids):
        raise ValueError(f"rows of at least 2 ids and a generator for each are needed; got {ids.shape}, {len(rngs)}")
    rows, length = ids.shape
    noise, spans = noise_counts(length, noise_density, mean_span)
    marks = byte_vocab.sentinels(spans)
    gap_lengths = np.stack([random_composition(length - noise, spans, rng) for rng in rngs])
    span_lengths = np.stack([random_composition(noise, spans, rng) for rng in rngs])
    pieces = np.stack([gap_lengths, span_lengths], axis=2).reshape(rows, 2 * spans)
    row = np.arange(rows)[:, None]

    # All rows have as many noise bytes, kept bytes and spans, so flat selections reshape back to rows.
    is_noise = np.repeat(np.tile([False, True], rows * spans), pieces.reshape(-1)).reshape(rows, length)
    starts = np.cumsum(pieces, axis=1)[:, 0::2]  # a span starts where its gap ends
    marked, kept = ids.astype(np.int32), ~is_noise
    marked[row, starts] = marks
    kept[row, starts] = True
    inputs = marked[kept].reshape(rows, -1)

    is_mark = np.zeros((rows, noise + spans), bool)
    is_mark[row, np.cumsum(span_lengths, axis=1) - span_lengths + np.arange(spans)] = True
    targets = np.empty(is_mark.shape, np.int32)
    targets[is_mark] = np.tile(marks, rows)
    targets[~is_mark] = ids[is_noise]

    eos = np.full((rows, 1), byte_vocab.EOS, np.int32)
    return np.concatenate([inputs, eos], axis=1), np.concatenate([targets, eos], axis=1)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Makes encoder-decoder examples of fixed lengths from windows of raw bytes.

    Attributes:
      inputs_length: N, ids of the encoder with the final eos.
      noise_density: share of the bytes that is cut out.
      mean_span: mean length of a span, in bytes.

    Raises ValueError at construction as `lengths` does.
    """

    inputs_length: int = 1024
    noise_density: float = 0.15
    mean_span: float = 20.0

    def __post_init__(self) -> None:
        lengths(self.inputs_length, self.noise_density, self.mean_span)

    @property
    def window(self) -> int:
        """Raw bytes that one example is made of, L."""
        return lengths(self.inputs_length, self.noise_density, self.mean_span)[0]

    def examples(self, ids: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Corrupts rows of `ids [B, L]`, each with its own generator.

        Returns `input_ids [B, N]`, `decoder_input_ids [B, T]` (labels shifted right, start id 0), `labels [B, T]`.
        """
        inputs, labels = corrupt_rows(ids, rngs, noise_density=self.noise_density, mean_span=self.mean_span)
        return {"input_ids": inputs, "decoder_input_ids": byte_vocab.shift_right(labels), "labels": labels}
