# SPDX-License-Identifier: Apache-2.0
"""Forward pass of block-sparse attention for TPUs; `tpu_plan` says how lists are walked.

Logits are held as keys x queries: the softmax then reduces over sublanes, with plain vector operations in place of the lane
shuffles that bound the usual orientation, and the running maximum and sum of a query are a row that broadcasts for free. Values
come transposed and outputs leave transposed, which the surrounding program joins to its own transpositions of heads.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import tpu_items, tpu_plan, tpu_stream
from pallas_kernels.block_sparse_attention import tpu_parts as parts
from pallas_kernels.block_sparse_attention import tpu_positions as positions
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.block_sparse_attention.tpu_plan import LN2, LOG2E, LOWEST, Plan
from pallas_kernels.block_sparse_attention.tpu_positions import Lookup
from pallas_kernels.position_bias import PositionBias


def forward(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    sinks: Float[Array, " H"] | None,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """Softmax in float32; products in the dtype of `query` with float32 accumulation.

    Raises:
      NotImplementedError: blocks that are not multiples of 128, or a bias by positions of more keys than fit in VMEM.
    """
    (batch, length, heads, width), dtype = query.shape, query.dtype
    plan = tpu_plan.make_plan(index, width)
    lists, counts, bank = tpu_plan.tables(index, plan)
    start = jnp.full(heads, LOWEST) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    args = {
        "lists": lists,
        "counts": counts,
        "start": start,
        "query": parts.rows_first(query.astype(jnp.float32) * (scale * LOG2E), dtype),
        "key": parts.rows_first(key, dtype),
        "value_columns": parts.columns_first(value, dtype),
    }
    list_specs, count_specs = parts.table_specs(index, plan, heads, len(lists))
    specs = {
        "lists": list_specs,
        "counts": count_specs,
        "start": pl.BlockSpec(memory_space=pltpu.SMEM),
        "query": parts.rows(plan, width),
        "key": parts.whole(args["key"], heads, plan.listed_length, width),
        "value_columns": parts.whole(args["value_columns"], heads, width, plan.listed_length),
    }
    parts.add_masks(args, specs, parts.bias_columns(key_bias, index.keys, plan.listed_length, plan.listed), bank)
    lookup = positions.add(args, specs, bias, plan, own_queries=True)
    squares = (plan.own // plan.chunk, plan.width, plan.listed, plan.chunk)
    scratch = {
        "state": pltpu.VMEM((2, plan.rows + 1, 1, plan.own), jnp.float32),
        "out": pltpu.VMEM((plan.rows + 1, width, plan.own), jnp.float32),
        "logits": [pltpu.VMEM(squares, jnp.float32)] * 2,
    }
    written = width * dtype.itemsize + 32
    if not parts.fits(specs, args, scratch, plan, "keys", written):
        args, specs, scratch = tpu_stream.streamed(
            args, specs, scratch, plan, put=("key",), use=("value_columns", "bias")
        )
    specs, params = parts.fit(specs, args, scratch, plan, "keys", written)
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            plan=plan,
            causal=causal,
            sunk=sinks is not None,
            sizes=(index.queries, index.keys),
            lookup=lookup,
        ),
        grid=(batch, heads, plan.tiles),
        in_specs=[specs],
        out_specs=[parts.columns(plan, width), parts.columns(plan, 1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, width, length), dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[scratch],
        compiler_params=params,
        cost_estimate=parts.cost(args, plan, batch * heads, 4 * width),
        interpret=interpret,
        name="block_sparse_attention_forward",
    )(args)
    return jnp.transpose(out, (0, 3, 1, 2)), lse[:, :, 0]


def _kernel(
    inputs: Any,
    out_ref: Any,
    lse_ref: Any,
    scratch: Any,
    *,
    plan: Plan,
    causal: bool,
    sunk: bool,
    sizes: tuple[int, int],
    lookup: Lookup | None,
) -> None:
    state, out = scratch["state"], scratch["out"]
    state[0] = jnp.full(state.shape[1:], inputs["start"][pl.program_id(1)])
    state[1] = jnp.full(state.shape[1:], 1.0 if sunk else 0.0)
    out[...] = jnp.zeros(out.shape, jnp.float32)
    # By the schedules, telling items apart is worth a twentieth without a causal mask too.
    items = tpu_items.of(
        inputs, scratch, plan, causal=causal, sizes=sizes, lookup=lookup, own_queries=True, branches=True
    )
    items.clear(("key",), sizes[1], by_columns=("value_columns",))
    # Blocks are worked in squares as wide as the matrix unit, which share one comparison of rows with columns. What idle items
    # leave in the spare list is never read.
    squares = items.squares(plan.depth)

    def put(buffer: int, row: Any, start: Any) -> None:
        items.put(buffer, row, start, ("logits", "query", "key"))

    def use(buffer: int, row: Any, start: Any, count: Any, mask: bool) -> None:
        item = items.item(buffer, row, start, count, mask)
        for t in range(items.pieces):
            piece = items.piece(t)
            logits = [items.logits(item, t, *square) for square in squares]
            weights, shrink = _softmax(state, row, piece, logits)
            fresh = [
                parts.product(value, x.astype(value.dtype), 1, 0)
                for x, value in zip(
                    weights, (items.columns("value_columns", item, *square) for square in squares), strict=True
                )
            ]
            out[row, :, piece] = sum(fresh, out[row, :, piece] * shrink)

    tpu_plan.walk(inputs["counts"], plan, put, use, items.opens, items.stream)
    for row in range(plan.rows):
        columns = pl.ds(row * plan.own, plan.own)
        some = state[1, row] > 0
        total = jnp.where(some, state[1, row], 1.0)
        out_ref[:, columns] = (out[row] / total).astype(out_ref.dtype)
        lse_ref[:, columns] = jnp.where(some, (state[0, row] + jnp.log2(total)) * LN2, -jnp.inf)


def _softmax(
    state: Any, row: Any, piece: Any, logits: list[Float[Array, "q c"]]
) -> tuple[list[Float[Array, "q c"]], Float[Array, "1 c"]]:
    """Weights of logits under the new maxima of their columns, and the factor of what was summed under the old ones."""
    peak = functools.reduce(jnp.maximum, [jnp.max(x, axis=0, keepdims=True) for x in logits], state[0, row, :, piece])
    shrink = jnp.exp2(state[0, row, :, piece] - peak)
    weights = [jnp.exp2(x - peak) for x in logits]
    state[0, row, :, piece] = peak
    state[1, row, :, piece] = state[1, row, :, piece] * shrink + sum(jnp.sum(x, axis=0, keepdims=True) for x in weights)
    return weights, shrink
