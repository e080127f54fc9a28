# SPDX-License-Identifier: Apache-2.0
"""Shapes that models ask of sparse decoding; tests compile the kernels for them and the benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """B sequences, H heads over G key heads of width d, P pages of S slots each, L of them listed for a head."""

    batch: int
    heads: int
    groups: int
    width: int
    pages: int
    slots: int
    listed: int
    dtype: str = "bfloat16"


NAMED = {
    "llama_8b_32k_tenth": Spec(8, 32, 8, 128, 4096, 64, 51),
    "llama_8b_page_16": Spec(8, 32, 8, 128, 16384, 16, 204),
    "small_float32": Spec(4, 8, 2, 64, 256, 64, 16, "float32"),
}
