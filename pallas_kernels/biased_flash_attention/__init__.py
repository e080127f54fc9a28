# SPDX-License-Identifier: Apache-2.0
"""Attention with a key bias, a position bias, softmax-off-by-one and grouped keys; and its column sums."""

from pallas_kernels.biased_flash_attention.api import attention_column_stats, attention_map, biased_attention

__all__ = ["attention_column_stats", "attention_map", "biased_attention"]
