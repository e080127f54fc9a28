# SPDX-License-Identifier: Apache-2.0
"""Shapes that models ask of matching; tests compile the kernels for them and the benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """B sequences of N tokens, split into even and odd ones, C channels."""

    batch: int
    tokens: int
    channels: int
    dtype: str = "bfloat16"


NAMED = {
    "vit_large_197": Spec(64, 197, 64),
    "vit_large_577": Spec(32, 577, 64),
    "vit_large_1025": Spec(16, 1025, 64),
    "vit_base_197_float32": Spec(8, 197, 64, "float32"),
    "video_12544": Spec(1, 12544, 64),
}
