# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction for decoder-only models: every byte of a window is predicted from those before it.

Letters: B batch, N ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Makes examples of `length` ids whose labels are the ids one place further on.

    A window is cut from running text, so it neither starts nor ends with a mark, and every label is a byte.

    Attributes:
      length: N.

    Raises:
      ValueError: at construction, for no id to predict.
    """

    length: int = 256

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1 id")

    @property
    def window(self) -> int:
        """Raw bytes that one example is made of, N + 1."""
        return self.length + 1

    def examples(self, ids: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """`input_ids` and `labels`, both `[B, N]`, from rows of `ids [B, N + 1]`; nothing is random here.

        `rngs` is part of the objectives' common form.
        """
        del rngs
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
