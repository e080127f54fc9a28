# SPDX-License-Identifier: Apache-2.0
"""Attention with a key bias, a position bias, softmax-off-by-one and grouped keys; its column sums and large logits."""

from pallas_kernels.biased_flash_attention.api import (
    attention_column_stats,
    attention_map,
    attention_score_excess,
    biased_attention,
)

__all__ = ["attention_column_stats", "attention_map", "attention_score_excess", "biased_attention"]
