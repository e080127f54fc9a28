# SPDX-License-Identifier: Apache-2.0
"""Shapes that models ask of the staircase; tests compile the kernels for them and the benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """R rows of D features, K units that share U hidden numbers, E = D outputs."""

    rows: int
    width: int
    units: int
    hidden: int
    dtype: str = "bfloat16"


NAMED = {
    "vit_base": Spec(64 * 197, 768, 4, 3072),
    "vit_large": Spec(64 * 256, 1024, 8, 4096),
    "vit_base_float32": Spec(8 * 197, 768, 4, 3072, "float32"),
}
