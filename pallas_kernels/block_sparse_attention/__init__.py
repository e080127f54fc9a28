# SPDX-License-Identifier: Apache-2.0
"""Attention over listed key blocks: the lists and their builders, and the operation."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.index import BlockIndex, from_block_mask, from_rule, from_scores

__all__ = ["BlockIndex", "block_sparse_attention", "from_block_mask", "from_rule", "from_scores"]
