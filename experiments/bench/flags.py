# SPDX-License-Identifier: Apache-2.0
"""Readers of flags that hold several numbers."""

from __future__ import annotations


def integers(text: str) -> tuple[int, ...]:
    """Reads "8,13" as (8, 13)."""
    return tuple(int(part) for part in text.split(","))


def floats(text: str) -> tuple[float, ...]:
    """Reads "0.5,0.8" as (0.5, 0.8)."""
    return tuple(float(part) for part in text.split(","))
