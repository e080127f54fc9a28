# SPDX-License-Identifier: Apache-2.0
"""Listed rows that do not fit in VMEM: the blocks of an item are copied from HBM while the item before is worked.

The walk puts the products of an item one item ahead of the rest, so what they need is fetched two items ahead and what the rest
needs one, each kind in two buffers of its own. A copy then has the time of an item, a few times what it takes.

Shapes: B batch, L rows, G heads, C blocks, q rows of a block, d head width.
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

# What the products need, and what the work on them needs.
_KINDS = ("put", "use")
# Arrays that come with rows as columns.
_COLUMNS = ("value_columns", "key_columns")


def streamed(
    args: dict[str, Any],
    specs: dict[str, Any],
    scratch: dict[str, Any],
    plan: Plan,
    *,
    put: tuple[str, ...],
    use: tuple[str, ...],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments, specs and scratch of a kernel whose listed arrays stay in HBM: those for products, those for the rest."""
    kinds = {kind: [name for name in names if name in args] for kind, names in zip(_KINDS, (put, use), strict=True)}
    blocks = {name: _blocks(args[name], plan, name in _COLUMNS) for names in kinds.values() for name in names}
    buffers = {
        kind: {name: pltpu.VMEM((2, plan.width, *blocks[name].shape[3:]), blocks[name].dtype) for name in names}
        for kind, names in kinds.items()
    }
    specs = specs | {name: pl.BlockSpec(memory_space=pl.ANY) for name in blocks}
    scratch = scratch | {"buffers": buffers, "arrived": pltpu.SemaphoreType.DMA((len(_KINDS), 2))}
    return args | blocks, specs, scratch


@dataclasses.dataclass(frozen=True)
class Stream:
    """Copies of one kernel's grid step: its arguments, its scratch, and the number of heads."""

    inputs: Any
    scratch: Any
    plan: Plan
    heads: int

    def start(self, kind: str, buffer: int, row: Any, start: Any) -> None:
        """Starts to copy the blocks of an item into a buffer."""
        numbers = parts.numbers(self.inputs["lists"][0], self.plan, row, start)
        for name, target in self.scratch["buffers"][kind].items():
            blocks = self.inputs[name]
            place = pl.program_id(0) if blocks.shape[0] > 1 else 0
            head = parts.which(blocks.shape[1], self.heads)(pl.program_id(1))
            for w, number in enumerate(numbers):
                source = blocks.at[place, head, number]
                pltpu.make_async_copy(source, target.at[buffer, w], self._arrived(kind, buffer)).start()

    def wait(self, kind: str, buffer: int) -> None:
        """Waits for the blocks of a buffer, all together."""
        for target in self.scratch["buffers"][kind].values():
            whole = target.at[buffer]
            pltpu.make_async_copy(whole, whole, self._arrived(kind, buffer)).wait()

    def at(self, kind: str, name: str, buffer: int, w: int, *place: Any) -> Array:
        """A block of an item, or a part of it."""
        return self.scratch["buffers"][kind][name][(buffer, w, *place)]

    def _arrived(self, kind: str, buffer: int) -> Any:
        return self.scratch["arrived"].at[_KINDS.index(kind), buffer]


def of(inputs: Any, scratch: Any, plan: Plan) -> Stream | None:
    """The stream of a kernel; None where listed rows lie in VMEM."""
    return Stream(inputs, scratch, plan, pl.num_programs(1)) if "buffers" in scratch else None


def _blocks(x: Array, plan: Plan, columns: bool) -> Float[Array, "B G C ..."]:
    """Blocks as they are copied; a length that cuts the last one short is padded, since a copy must end within its array."""
    if x.ndim == 5:
        return x
    if x.shape[1:] == (plan.blocks, plan.listed, parts.LANES):
        return x[:, None]
    x = jnp.swapaxes(x, 2, 3) if columns else x
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.listed_length - x.shape[2]), (0, 0)))
    x = x.reshape(*x.shape[:2], plan.blocks, plan.listed, x.shape[-1])
    return jnp.swapaxes(x, 3, 4) if columns else x
