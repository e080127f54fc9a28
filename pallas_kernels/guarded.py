# SPDX-License-Identifier: Apache-2.0
"""Reading and writing parts of arrays in GPU kernels that go through Triton, and what these can address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental.pallas.triton import load as _load
from jax.experimental.pallas.triton import store as _store

# Places within an array are 32-bit numbers.
_LIMIT = 2**31


def addressable(operation: str, arrays: Mapping[str, jax.Array]) -> None:
    """Checks the sizes of what a kernel addresses.

    Raises:
      NotImplementedError: an array of 2^31 numbers or more.
    """
    for name, array in arrays.items():
        if array.size >= _LIMIT:
            share = -(-array.size // (_LIMIT - 1))
            raise NotImplementedError(
                f"the GPU kernel of {operation} takes arrays of fewer than 2^31 numbers; {name} is {array.shape}: "
                f"split the batch, or the heads, by {share}"
            )


def take(ref: Any, mask: jax.Array, other: float = 0) -> jax.Array:
    """What `ref` holds where `mask` is True, `other` elsewhere, where nothing is read."""
    return _load(ref, mask=mask, other=other)


def put(ref: Any, value: jax.Array, mask: jax.Array) -> None:
    """Writes `value` to `ref` where `mask` is True."""
    _store(ref, value, mask=mask)
