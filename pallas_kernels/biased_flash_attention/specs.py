# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models that use biased attention: what kernels are compiled for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """B sequences of N tokens, H heads over G key heads of width d; causal or not, softmax off by one or not.

    `buckets` are those of T5's bias by relative positions; 0 for no such bias.
    """

    batch: int
    tokens: int
    heads: int
    groups: int
    width: int
    causal: bool = False
    softmax: str = "standard"
    dtype: str = "bfloat16"
    buckets: int = 0


NAMED = {
    # Merged tokens by their log mass.
    "vit_large_577": Spec(8, 577, 16, 16, 64),
    # Deleted bytes by the gate's logits.
    "mrt5_small_1024": Spec(8, 1024, 6, 6, 64, softmax="off_by_one"),
    "mrt5_small_1024_positions": Spec(8, 1024, 6, 6, 64, softmax="off_by_one", buckets=32),
    "llama_8b_2048": Spec(1, 2048, 32, 8, 128, causal=True),
    "small_float32": Spec(2, 300, 4, 4, 64, causal=True, softmax="off_by_one", dtype="float32"),
}
