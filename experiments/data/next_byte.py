# SPDX-License-Identifier: Apache-2.0
"""Next-byte prediction: the decoder continues a text, with or without an encoder that reads what came before.

Letters: B batch, N context bytes, T bytes to predict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data import byte_vocab


@dataclasses.dataclass(frozen=True)
class NextByte:
    """Makes examples whose labels are the `targets_length` bytes that follow `context` bytes.

    With `context=0` the example is for a decoder alone, which reads `decoder_input_ids`; `input_ids` is then a single
    eos for each row, so that an encoder-decoder model trained on it is the decoder-only floor of Kallini et al. 2025.
    A window is cut from running text, so neither side ends with eos and every label is a byte.

    Attributes:
      context: N, bytes that the encoder reads; 0 for decoder-only examples.
      targets_length: T, bytes that the decoder predicts.

    Raises:
      ValueError: at construction, for a negative context or no byte to predict.
    """

    context: int = 512
    targets_length: int = 512

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(f"context={self.context} must be at least 0 (0 makes decoder-only examples)")
        if self.targets_length < 1:
            raise ValueError(f"targets_length={self.targets_length} must be at least 1 byte")

    @property
    def window(self) -> int:
        """Raw bytes that one example is made of, N + T."""
        return self.context + self.targets_length

    def examples(self, ids: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Divides rows of `ids [B, N + T]`; nothing is random here, `rngs` is part of the objectives' common form.

        Returns `input_ids [B, N]` (`[B, 1]` eos when N is 0), `decoder_input_ids [B, T]` (labels shifted right, start
        id 0) and `labels [B, T]`.
        """
        del rngs
        context, labels = ids[:, : self.context], ids[:, self.context :]
        if not self.context:
            context = np.full((ids.shape[0], 1), byte_vocab.EOS, np.int32)
        return {
            "input_ids": context,
            "decoder_input_ids": byte_vocab.shift_right(labels),
            "labels": labels,
        }
