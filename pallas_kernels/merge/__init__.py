# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of the rows that join each slot, and the way back."""

from pallas_kernels.merge.api import merge, restore
from pallas_kernels.merge.facts import merge_facts

__all__ = ["merge", "merge_facts", "restore"]
