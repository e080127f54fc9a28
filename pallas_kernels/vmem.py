# SPDX-License-Identifier: Apache-2.0
"""On-chip memory of a TPU core, checked before a kernel is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

# What the compiler grants a kernel unasked on v4, v5e and v5p; v4 has no more. The rest is for its own temporaries.
SCOPE = 16 * 2**20
BUDGET = 13 * 2**20

# Scalar memory for tables that index maps read is 1 MiB a core; the compiler keeps some of it.
SCALAR_BUDGET = 640 * 2**10


def size(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array in on-chip memory, its last two dimensions padded to whole tiles."""
    width = jnp.dtype(dtype).itemsize
    *lead, rows, lanes = (1, *shape) if len(shape) == 1 else shape
    sublanes = 8 * max(4 // width, 1)
    return math.prod(lead) * (-(-rows // sublanes) * sublanes) * (-(-lanes // 128) * 128) * width


def check(operation: str, needed: int, advice: str) -> None:
    """Refuses a kernel that would not fit.

    Raises:
      NotImplementedError: `needed` bytes are more than the budget; `advice` says what would fit.
    """
    if needed > BUDGET:
        raise NotImplementedError(
            f"{operation} would need {needed / 2**20:.1f} MiB of on-chip memory, more than {BUDGET / 2**20:.0f}; {advice}"
        )
