# SPDX-License-Identifier: Apache-2.0
"""Listed keys that do not fit in VMEM: the blocks of an item are copied from HBM while the item before is worked.

Each kind of block has two buffers. The walk puts the products of an item one item ahead of its softmax, so keys are fetched two
items ahead and values, and the bias, one. A copy then has the time of an item, a few times what it takes.

Shapes: B batch, L keys, G key heads, C blocks, q rows of a block, d head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import tpu_parts as parts
from pallas_kernels.block_sparse_attention.tpu_plan import Plan

# What the products need, and what the softmax needs.
_ARRAYS = {"key": ("key",), "value": ("value", "bias")}


def streamed(
    args: dict[str, Any], specs: dict[str, Any], scratch: dict[str, Any], plan: Plan, key: Array, value: Array
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments, specs and scratch of a kernel whose keys, values and key bias stay in HBM."""
    blocks = {"key": _blocks(key, plan, args["key"].dtype)}
    blocks["value"] = jnp.swapaxes(_blocks(value, plan, args["value"].dtype), 3, 4)
    if "bias" in args:
        blocks["bias"] = args["bias"][:, None]
    buffers = {name: pltpu.VMEM((2, plan.width, *x.shape[3:]), x.dtype) for name, x in blocks.items()}
    specs = specs | {name: pl.BlockSpec(memory_space=pl.ANY) for name in blocks}
    scratch = scratch | {"buffers": buffers, "arrived": pltpu.SemaphoreType.DMA((len(_ARRAYS), 2))}
    return args | blocks, specs, scratch


@dataclasses.dataclass(frozen=True)
class Stream:
    """Copies of one kernel's grid step: its arguments, its scratch, and whose keys its head reads."""

    inputs: Any
    scratch: Any
    plan: Plan
    heads: int

    def start(self, kind: str, buffer: int, row: Any, start: Any) -> None:
        """Starts to copy the blocks of an item into a buffer."""
        numbers = parts.numbers(self.inputs["lists"][0], self.plan, row, start)
        for name in self._names(kind):
            blocks = self.inputs[name]
            place = pl.program_id(0) if blocks.shape[0] > 1 else 0
            head = parts.which(blocks.shape[1], self.heads)(pl.program_id(1))
            for w, number in enumerate(numbers):
                target = self.scratch["buffers"][name].at[buffer, w]
                pltpu.make_async_copy(blocks.at[place, head, number], target, self._arrived(kind, buffer)).start()

    def wait(self, kind: str, buffer: int) -> None:
        """Waits for the blocks of a buffer, all together."""
        for name in self._names(kind):
            target = self.scratch["buffers"][name].at[buffer]
            pltpu.make_async_copy(target, target, self._arrived(kind, buffer)).wait()

    def at(self, name: str, buffer: int, w: int, *place: Any) -> Array:
        """A block of an item, or a part of it."""
        return self.scratch["buffers"][name][(buffer, w, *place)]

    def _names(self, kind: str) -> list[str]:
        return [name for name in _ARRAYS[kind] if name in self.inputs]

    def _arrived(self, kind: str, buffer: int) -> Any:
        return self.scratch["arrived"].at[list(_ARRAYS).index(kind), buffer]


def _blocks(x: Float[Array, "B L G d"], plan: Plan, dtype: Any) -> Float[Array, "B G C q d"]:
    """Blocks as they are copied; a length that cuts the last one short is padded, since a copy must end within its array."""
    x = parts.rows_first(x, dtype)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.listed_length - x.shape[2]), (0, 0)))
    return x.reshape(*x.shape[:2], plan.blocks, plan.listed, x.shape[-1])
