# SPDX-License-Identifier: Apache-2.0
"""Next-byte prediction: the decoder continues a text, with or without an encoder that reads what came before.

Letters: B batch, N encoder ids, T bytes to predict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data import byte_vocab


@dataclasses.dataclass(frozen=True)
class NextByte:
    """Makes examples whose labels are the `targets_length` bytes that follow what the encoder reads.

    The encoder's ids end with eos, as all of T5's inputs do: cross-attention has no positions, so without a mark at the end a
    decoder can hardly find the bytes that it continues. With `context=1` there is nothing but that eos, and an
    encoder-decoder model trained on it is the decoder-only floor of Kallini et al. 2025. A window is cut from running text, so
    the labels do not end with eos and every label is a byte.

    Attributes:
      context: N, ids that the encoder reads, the eos included.
      targets_length: T, bytes that the decoder predicts.

    Raises:
      ValueError: at construction, for no place for the eos or no byte to predict.
    """

    context: int = 512
    targets_length: int = 512

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(
                f"context={self.context} must be at least 1 (1 is the eos alone, for a decoder-only model)"
            )
        if self.targets_length < 1:
            raise ValueError(f"targets_length={self.targets_length} must be at least 1 byte")

    @property
    def window(self) -> int:
        """Raw bytes that one example is made of, N - 1 + T."""
        return self.context - 1 + self.targets_length

    def examples(self, ids: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Divides rows of `ids [B, N - 1 + T]`; nothing is random here, `rngs` is part of the objectives' common form.

        Returns `input_ids [B, N]`, `decoder_input_ids [B, T]` (labels shifted right, start id 0) and `labels [B, T]`.
        """
        del rngs
        read, labels = ids[:, : self.context - 1], ids[:, self.context - 1 :]
        eos = np.full((ids.shape[0], 1), byte_vocab.EOS, np.int32)
        return {
            "input_ids": np.concatenate([read, eos], axis=1),
            "decoder_input_ids": byte_vocab.shift_right(labels),
            "labels": labels,
        }
