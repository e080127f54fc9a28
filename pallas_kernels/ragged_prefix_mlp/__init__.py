# SPDX-License-Identifier: Apache-2.0
"""Staircase of matrix products: unit k of a layer runs on the first `counts[k]` of the rows that were sorted by need."""

from pallas_kernels.ragged_prefix_mlp.api import ragged_prefix_mlp, ragged_prefix_projection
from pallas_kernels.ragged_prefix_mlp.sort import counting_sort, permute
from pallas_kernels.ragged_prefix_mlp.xla import prefix_loop

__all__ = ["counting_sort", "permute", "prefix_loop", "ragged_prefix_mlp", "ragged_prefix_projection"]
