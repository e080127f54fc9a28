# SPDX-License-Identifier: Apache-2.0
"""Shapes that models ask of merging; tests compile the kernels for them and the benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """B sequences of N tokens merged into M slots, D features."""

    batch: int
    tokens: int
    slots: int
    width: int
    dtype: str = "bfloat16"


NAMED = {
    "vit_large_197": Spec(64, 197, 189, 1024),
    "vit_large_577": Spec(32, 577, 569, 1024),
    "vit_large_1025": Spec(16, 1025, 985, 1024),
    "vit_base_197_float32": Spec(8, 197, 184, 768, "float32"),
    "video_12544": Spec(1, 12544, 8192, 1024),
}
