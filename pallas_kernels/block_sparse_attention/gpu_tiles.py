# SPDX-License-Identifier: Apache-2.0
"""What a program of the GPU kernels reads and makes: tiles of its rows and of listed ones, and their logits.

Arrays stay as they are in HBM, whatever their length and width: only tiles at the ends are read and written under a mask.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width, D columns of a tile; o x l a tile of own by listed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels import guarded
from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention import gpu_positions as positions
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Entry, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.position_bias import PositionBias


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a kernel.

    Attributes:
      refs: the kernel's arguments. plan, causal: its own.
      own_queries: whether it owns queries, or keys. row, head: of the batch, and of queries. heads: there are.
      tile: of its own rows. stands: where these stand, for a bias by positions.
    """

    refs: dict[str, Any]
    plan: Plan
    causal: bool
    own_queries: bool
    row: Any
    head: Any
    heads: Any
    tile: Any
    stands: positions.Stands | None

    @property
    def place(self) -> tuple[Any, ...]:
        """Where its list stands."""
        return parts.place(self.refs["ids"], self.row, self.head, self.heads, self.tile, self.plan)

    def own(self, name: str) -> Float[Array, "o D"]:
        """Its own rows, 0 where there are none."""
        there = self._there(self.tile * self.plan.own, self.plan.own, self._ends)
        return self.refs[name][...] if there is None else guarded.take(self.refs[name], there)

    def put(self, ref: Any, value: Float[Array, "o D"]) -> None:
        """Writes what belongs to its own rows."""
        there = self._there(self.tile * self.plan.own, self.plan.own, self._ends)
        if there is None:
            ref[...] = value.astype(ref.dtype)
        else:
            guarded.put(ref, value.astype(ref.dtype), there)

    @property
    def _ends(self) -> int | None:
        return self.plan.own_rows if self.plan.own_rows % self.plan.own else None

    def rows(self, entry: Entry) -> Any:
        """The rows of an entry."""
        return pl.ds(entry.number * self.plan.listed_block + entry.start, self.plan.listed)

    def listed(self, name: str, entry: Entry, *member: Any) -> Float[Array, "l D"]:
        """The rows of an entry, of a `member` of several heads where there are, 0 where there are none."""
        rows = self.rows(entry)
        there = self._there(
            rows.start, self.plan.listed, self.plan.listed_rows if entry.closed and self.plan.ragged else None
        )
        at = (rows, *member, slice(None))
        return self.refs[name][at] if there is None else guarded.take(self.refs[name].at[at], there)

    def _there(self, first: Any, size: int, ends: int | None) -> Bool[Array, "n D"] | None:
        """Which numbers of `size` rows from `first` on are there, before row `ends` where it is not None; None for all."""
        shape, there = (size, self.plan.wide), None
        if ends is not None:
            there = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < ends
        if self.plan.width < self.plan.wide:
            inside = jax.lax.broadcasted_iota(jnp.int32, shape, 1) < self.plan.width
            there = inside if there is None else there & inside
        return there

    def logits(
        self, own: Float[Array, "o D"], listed: Float[Array, "l D"], factor: float, entry: Entry
    ) -> Float[Array, "o l"]:
        """Products by `factor` with every bias added, -inf where masked; `factor` and biases are in base 2."""
        logits = parts.product(own, listed, 1, 1) * factor
        if "bias" in self.refs:
            logits += (
                self.refs["bias"][self.rows(entry)][None, :] if self.own_queries else self.refs["bias"][...][:, None]
            )
        if self.stands is not None:
            logits += positions.bias(self.refs, self.head, self.stands, self.rows(entry), entry.closed)
        seen = parts.seen(self.refs, self.plan, self.tile * self.plan.own, entry, self.causal, self.own_queries)
        return logits if seen is None else jnp.where(seen, logits, -jnp.inf)

    def dlogits(
        self, own: dict[str, Array], listed: dict[str, Array], scale: float, entry: Entry
    ) -> tuple[Float[Array, "o l"], Float[Array, "o l"]]:
        """Weights and the gradient of logits; `own` and `listed` name the rows query, dout, lse, delta, key, value."""
        query, key = ("query", "key") if self.own_queries else ("key", "query")
        dout, value = ("dout", "value") if self.own_queries else ("value", "dout")
        lse, delta = (own[name][:, None] if self.own_queries else listed[name][None, :] for name in ("lse", "delta"))
        logits = self.logits(own[query], listed[key], scale * LOG2E, entry)
        weights = jnp.exp2(logits - lse)
        return weights, weights * (parts.product(own[dout], listed[value], 1, 1) - delta)

    def walk(self, work: Callable[[Entry, Any], Any], state: Any) -> Any:
        """`state` after `work` on every entry of its list."""
        return parts.walk(self.refs, self.place, self.plan, work, state)


def of_queries(refs: dict[str, Any], plan: Plan, causal: bool, share: int) -> Program:
    """The program of a kernel whose grid is that of `Queries`."""
    step, group, row = (pl.program_id(axis) for axis in range(3))
    member, tile = parts.own(step, share, plan, causal)
    stands = positions.stands(refs, row, tile, plan, own_queries=True)
    return Program(refs, plan, causal, True, row, group * share + member, pl.num_programs(1) * share, tile, stands)


def of_keys(refs: dict[str, Any], plan: Plan, causal: bool, share: int) -> Program:
    """The program of a kernel whose grid is tiles, groups of `share` heads, batch; it starts with the first of its heads."""
    tile, group, row = (pl.program_id(axis) for axis in range(3))
    stands = positions.stands(refs, row, tile, plan, own_queries=False)
    return Program(refs, plan, causal, False, row, group * share, pl.num_programs(1) * share, tile, stands)


@dataclasses.dataclass(frozen=True)
class Queries:
    """The call of a kernel whose programs own queries.

    Attributes:
      plan: of the kernel. args, specs: its arguments. grid: of its programs. share: query heads that share a key head.
      rows, line: specs of arrays `[B, N, H, d]` and `[B, H, M]`, of which a program has its own rows.
    """

    plan: Plan
    args: dict[str, Array]
    specs: dict[str, pl.BlockSpec]
    grid: tuple[int, int, int]
    share: int
    rows: pl.BlockSpec
    line: pl.BlockSpec


def queries(
    kernel: str,
    own: dict[str, Array],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    bias: PositionBias | None,
    *,
    causal: bool,
) -> Queries:
    """The call of a kernel; `own` are arrays `[B, N, H, d]`, query among them, and `[B, H, N]`.

    Raises:
      NotImplementedError: blocks or heads that the kernel cannot take.
    """
    (batch, _, heads, width), dtype = own["query"].shape, own["query"].dtype
    plan = parts.make_plan(kernel, index, width, dtype, positions=bias is not None)
    groups = key.shape[2]
    share = heads // groups

    def line(step: Any, group: Any, i: Any) -> tuple[Any, Any, Any]:
        member, tile = parts.own(step, share, plan, causal)
        return i, group * share + member, tile

    def block(*step: Any) -> tuple[Any, Any, Any, int]:
        i, head, tile = line(*step)
        return i, tile, head, 0

    # Wider than the rows where their width is no power of two; what lies beyond is never read.
    rows = pl.BlockSpec((None, plan.own, None, plan.wide), block)
    listed = pl.BlockSpec((None, plan.listed_length, None, plan.wide), lambda _, group, i: (i, 0, group, 0))
    near = positions.near(bias, index, own_queries=True)
    args = {"key": key.astype(dtype), "value": value.astype(dtype)}
    args |= parts.lists(index, causal, own_queries=True, near=near)
    specs = {"key": listed, "value": listed}
    spec = pl.BlockSpec((None, None, plan.own), line)
    for name, array in own.items():
        # Queries that fill up the last block have no weights.
        fill = jnp.inf if name == "lse" else 0.0
        args[name] = array.astype(dtype) if array.ndim == 4 else parts.last_padded(array, plan.own_length, fill)
        specs[name] = rows if array.ndim == 4 else spec
    parts.add_bank(args, index)
    positions.add(args, bias, plan, own_queries=True)
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.listed_length)
        specs["bias"] = pl.BlockSpec((None, plan.listed_length), lambda _, group, i: (i, 0))
    return Queries(plan, args, specs, (share * plan.tiles, groups, batch), share, rows, spec)
