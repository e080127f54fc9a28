# SPDX-License-Identifier: Apache-2.0
"""Items of a grid step of the TPU kernels: where they stand, their products, and their logits with everything added.

Logits are held as keys x queries on either side: listed x own where queries are owned, own x listed where keys are.

Shapes: L listed rows, q x c a square of keys by queries, d head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import tpu_parts as parts
from pallas_kernels.block_sparse_attention import tpu_positions as positions
from pallas_kernels.block_sparse_attention import tpu_stream
from pallas_kernels.block_sparse_attention.tpu_plan import Plan
from pallas_kernels.block_sparse_attention.tpu_positions import Lookup
from pallas_kernels.block_sparse_attention.tpu_stream import Stream


@dataclasses.dataclass(frozen=True)
class Item:
    """An item at work.

    Attributes:
      buffer: its products are in. row: its list. mask: whether it may need one.
      ids, tiles: numbers of its blocks, and of their masks where there are any.
      limits: of each block, as `tpu_parts.limits`. constant: its bias by positions where it has only one; else None.
    """

    buffer: int
    row: Any
    mask: bool
    ids: list[Any]
    tiles: list[list[Any]]
    limits: list[Any]
    constant: Any


@dataclasses.dataclass(frozen=True)
class Items:
    """A grid step of a kernel.

    Attributes:
      inputs, scratch, plan, causal, lookup: the kernel's. stream: copies from HBM, where listed rows do not lie in VMEM.
      own_queries: whether the own side is that of queries. offset: keys less queries. step: its number among those of a head.
      branches: whether items that need no mask are told apart where only idle ones need one.
    """

    inputs: Any
    scratch: Any
    plan: Plan
    causal: bool
    lookup: Lookup | None
    stream: Stream | None
    own_queries: bool
    offset: int
    step: Any
    branches: bool

    @property
    def pieces(self) -> int:
        """Pieces of own rows whose logits are worked at a time."""
        return self.plan.own // self.plan.chunk

    def piece(self, t: int) -> Any:
        """Rows of a piece within its list."""
        return pl.ds(t * self.plan.chunk, self.plan.chunk)

    def own(self, row: Any, t: int) -> Any:
        """Rows of a piece within the step."""
        first = pl.multiple_of(jnp.minimum(row, self.plan.rows - 1) * self.plan.own, self.plan.own)
        return pl.ds(first + t * self.plan.chunk, self.plan.chunk)

    def place(self, row: Any) -> Any:
        """The number of a list among those of a head."""
        return self.step * self.plan.rows + jnp.minimum(row, self.plan.rows - 1)

    def clear(self, names: tuple[str, ...], first: int, *, by_columns: tuple[str, ...] = ()) -> None:
        """Zeros in listed arrays from row `first` on, once a head; what is streamed ends with zeros."""
        if self.stream is not None:
            return

        @pl.when(self.step == 0)
        def _() -> None:
            parts.clear(self.inputs, names, first, self.plan.listed_length, by_columns=by_columns)

    def put(self, buffer: int, row: Any, start: Any, *products: tuple[str, str, str]) -> None:
        """Products of an item: `(scratch, own array, listed array)` each."""
        ids = parts.numbers(self.inputs["lists"][0], self.plan, row, start)
        for t in range(self.pieces):
            owned = [self.inputs[own][self.own(row, t), :] for _, own, _ in products]
            for w, number in enumerate(ids):
                for (target, _, name), own in zip(products, owned, strict=True):
                    listed = (
                        self.inputs[name][parts.span(self.plan, number), :]
                        if self.stream is None
                        else self.stream.at("put", name, buffer, w)
                    )
                    sides = (listed, own) if self.own_queries else (own, listed)
                    self.scratch[target][buffer][t, w] = parts.product(*sides, 1, 1)

    def _limits(self, ids: list[Any], row: Any, start: Any, count: Any) -> list[Any]:
        own = self.step * self.plan.step_rows + row * self.plan.own
        if self.own_queries:
            seen = [own + self.offset - number * self.plan.listed for number in ids]
        else:
            seen = [number * self.plan.listed + self.offset - own for number in ids]
        return parts.limits(self.plan, seen, start, count, self.causal)

    def opens(self, row: Any, start: Any, count: Any) -> Any:
        """Whether an item needs no mask, and no bias of each pair."""
        # Short blocks are masked in the shadow of the products, and items of several blocks may have idle ones.
        if self.plan.width > 1 or "bank" in self.inputs:
            return False
        ids = parts.numbers(self.inputs["lists"][0], self.plan, row, start)
        seen = True
        if self.causal or self.branches:
            keys = self.plan.listed if self.own_queries else self.plan.own
            seen = self._limits(ids, row, start, count)[0] >= keys - 1
        return positions.opens(self.inputs, self.lookup, seen, self.place(row), ids[0])

    def item(self, buffer: int, row: Any, start: Any, count: Any, mask: bool) -> Item:
        """An item whose products are there. One of the spare list has count 0 and is closed wherever it seems to stand."""
        ids, *tiles = (parts.numbers(table, self.plan, row, start) for table in self.inputs["lists"])
        limits, constant = self._limits(ids, row, start, count), None
        if self.lookup is not None and not mask:
            constant = positions.constant(self.inputs, self.lookup, self.place(row), ids[0])
        # Without a causal mask and idle blocks, an item is closed for its bias alone.
        return Item(buffer, row, mask and (self.causal or self.plan.width > 1), ids, tiles, limits, constant)

    def squares(self, depth: int) -> list[tuple[int, int, int]]:
        """Squares `(block, first row, rows)` that are worked one by one, `depth` listed rows each."""
        return [(w, k, depth) for w in range(self.plan.width) for k in range(0, self.plan.listed, depth)]

    def logits(self, item: Item, t: int, w: int, start: int, size: int) -> Float[Array, "q c"]:
        """A square of logits in base 2 with every bias added and masked."""
        listed, own, piece = pl.ds(start, size), self.own(item.row, t), self.piece(t)
        x = self.square("logits", item, t, w, start, size)
        if "bias" in self.inputs:
            bias = self._bias(item, w, listed) if self.own_queries else self.inputs["bias"][own, :]
            x += parts.wide(bias, x.shape[1])
        if item.constant is not None:
            x += item.constant
        elif self.lookup is not None:
            x += positions.square(self.inputs, self.lookup, item.ids[w], listed, own)
        if "bank" in self.inputs:
            sides = (listed, piece) if self.own_queries else (piece, listed)
            x += self.inputs["bank"][(item.tiles[0][w], *sides)].astype(jnp.float32)
        if not item.mask:
            return x
        ahead = t * self.plan.chunk - start
        return parts.masked(x, item.limits[w] + (ahead if self.own_queries else -ahead))

    def square(self, name: str, item: Item, t: int, w: int, start: int, size: int) -> Float[Array, "q c"]:
        """A square of products."""
        listed = pl.ds(start, size)
        return self.scratch[name][item.buffer][
            (t, w, *((listed, slice(None)) if self.own_queries else (slice(None), listed)))
        ]

    def _bias(self, item: Item, w: int, rows: Any) -> Float[Array, "q 128"]:
        if self.stream is None:
            return self.inputs["bias"][item.ids[w], rows, :]
        return self.stream.at("use", "bias", item.buffer, w, rows)

    def rows(self, name: str, item: Item, w: int, start: int, size: int) -> Float[Array, "q d"]:
        """The listed rows of a square."""
        if self.stream is None:
            return self.inputs[name][parts.span(self.plan, item.ids[w], start, size), :]
        return self.stream.at("use", name, item.buffer, w, pl.ds(start, size))

    def columns(self, name: str, item: Item, w: int, start: int, size: int) -> Float[Array, "d q"]:
        """The listed rows of a square as columns."""
        if self.stream is None:
            return self.inputs[name][:, parts.span(self.plan, item.ids[w], start, size)]
        return self.stream.at("use", name, item.buffer, w, slice(None), pl.ds(start, size))

    def line(self, name: str, item: Item, w: int, start: int, size: int) -> Float[Array, "1 c"]:
        """A number for each listed row of a square."""
        if self.stream is None:
            return self.inputs[name][item.ids[w], :, pl.ds(start, size)]
        return self.stream.at("use", name, item.buffer, w, slice(None), pl.ds(start, size))


def of(
    inputs: Any,
    scratch: Any,
    plan: Plan,
    *,
    causal: bool,
    sizes: tuple[int, int],
    lookup: Lookup | None,
    own_queries: bool,
    branches: bool = False,
) -> Items:
    """The items of the grid step that runs; `sizes` are queries and keys."""
    stream = tpu_stream.of(inputs, scratch, plan)
    offset = sizes[1] - sizes[0]
    return Items(inputs, scratch, plan, causal, lookup, stream, own_queries, offset, pl.program_id(2), branches)
