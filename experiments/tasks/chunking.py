# SPDX-License-Identifier: Apache-2.0
"""What a task adds for a model with a chunker: weights of its losses, figures, compute.

Shapes: B batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from adaptive.chunking import chunks as chunks_lib
from layers.t5 import T5


@dataclasses.dataclass(frozen=True)
class Chunking:
    """Weights of the losses that a chunker names; one that its chunker does not name is not used.

    Attributes:
      binomial: of the prior on the number of chunks; boundaries: of supervised boundaries; ratio: of H-Net's ratio loss (its
        published weight); next_byte: of a byte model, which shares nothing with the main model.
    """

    binomial: float = 1.0
    boundaries: float = 1.0
    ratio: float = 0.03
    next_byte: float = 1.0

    def loss(self, losses: dict[str, tuple[Any, Any]], rows: Any) -> Any:
        """The weighted sum of a chunker's losses, each divided by the `rows` of the whole batch."""
        return sum(getattr(self, name) * total / rows for name, (total, _) in losses.items())


def chunk_hyper(chunker: str, rate: float) -> dict[str, Any]:
    """Hyper-parameters that tell a chunker to leave `1 - rate` chunks a byte; none for one that cannot be told."""
    stride = {"stride": max(round(1 / (1 - rate)), 1)}
    return {
        "boundary_predictor": {"prior": 1 - rate},
        "hnet": {"target": 1 / (1 - rate)},
        "strided": stride,
        "gbst": stride,
    }.get(chunker, {})


def rows(batch: Any) -> Any:
    """Number of rows with a real byte, by which a chunker's losses are divided."""
    return jnp.sum(jnp.any(batch["input_ids"] != 0, axis=1), dtype=jnp.float32)


def figures(model: T5, aux: dict[str, Any], weight: Any) -> dict[str, tuple[Any, Any]]:
    """`(sum, count)` of chunks a byte ("kept"), bytes a chunk, the share of starts that do not fit; rows by `weight [B]`."""
    chunks = aux["chunks"]
    length = chunks.starts.shape[1]
    slots = length if model.capacity is None else min(model.capacity, length)
    left_out = chunks_lib.overflowing(chunks, slots)
    starts, over, real = (
        jnp.sum(values * weight, dtype=jnp.float32)
        for values in (chunks.count, left_out, jnp.sum(chunks.valid, axis=-1))
    )
    return {"kept": (starts - over, real), "chunk_length": (real, starts - over), "overflow": (over, starts)}
