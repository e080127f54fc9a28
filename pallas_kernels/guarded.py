# SPDX-License-Identifier: Apache-2.0
"""Reading and writing parts of arrays in GPU kernels that go through Triton."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas.triton import load as _load
from jax.experimental.pallas.triton import store as _store


def take(ref: Any, mask: jax.Array, other: float = 0) -> jax.Array:
    """What `ref` holds where `mask` is True, `other` elsewhere, where nothing is read."""
    return _load(ref, mask=mask, other=other)


def put(ref: Any, value: jax.Array, mask: jax.Array) -> None:
    """Writes `value` to `ref` where `mask` is True."""
    _store(ref, value, mask=mask)
