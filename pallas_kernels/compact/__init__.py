# SPDX-License-Identifier: Apache-2.0
"""Stream compaction: left-packing the rows that a boolean gate keeps, and spreading them back."""

from pallas_kernels.compact.api import Packing, compact, expand, pack

__all__ = ["Packing", "compact", "expand", "pack"]
