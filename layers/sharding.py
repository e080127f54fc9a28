# SPDX-License-Identifier: Apache-2.0
"""Where activations live on a mesh: each example on one device."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array


def along_batch(x: Array) -> Array:
    """`x [B, ...]` split over devices along B and whole along every other axis; a no-op outside of axis rules.

    Without it the partitioner may spread activations like the parameters that they meet, and pay with all-to-alls; with it,
    parameters that are split over the same devices are gathered for use instead. `experiments.parallel` says which mesh axes
    "batch" means.
    """
    return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))
