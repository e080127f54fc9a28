# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of the rows that join each slot, and the way back."""

from pallas_kernels.merge.api import merge, restore

__all__ = ["merge", "restore"]
