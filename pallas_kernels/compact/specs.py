# SPDX-License-Identifier: Apache-2.0
"""Shapes that models ask of compaction; tests compile the kernels for them and the benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """B rows of N tokens packed into M slots, D features in `dtype`."""

    batch: int
    tokens: int
    slots: int
    width: int
    dtype: str = "bfloat16"


NAMED = {
    "byt5_small": Spec(16, 1024, 512, 1472),
    "byt5_small_float32": Spec(2, 1024, 512, 1472, "float32"),
    "t5_small": Spec(32, 512, 256, 512),
    "vit_base_197": Spec(64, 197, 99, 768),
    "llama_8b_prompt": Spec(1, 8192, 4096, 4096),
}
