# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in plain JAX whose work follows the number of listed blocks.

Lists of all batch rows and heads are sorted by length and worked a few at a time, so that lists worked together end together;
each group runs a loop with a dynamic trip count that gathers a few blocks a turn. The backward pass runs the same loop over
the same lists for the queries and over the transposed lists for the keys.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width, T lists (B H R, or B H C transposed), P lists worked
together, W blocks gathered in a turn, p queries in a block, q keys in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockIndex

# Logits that exist at a time: small enough for a core's second-level cache, big enough that a turn is mostly products.
_LISTS, _COLUMNS = 4, 512
_LOWEST = float(jnp.finfo(jnp.float32).min)


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
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """Softmax in float32; products in the input dtype with float32 accumulation."""
    batch, length, heads, width = query.shape
    start = jnp.zeros(heads) if sinks is None else sinks.astype(jnp.float32)
    lists = _flat_lists(index, batch, heads, key.shape[2])
    blocks = _key_side(key, value, key_bias, index)
    own = {
        "query": _blocks(query * jnp.asarray(scale, query.dtype), index.block_q),
        "sink": jnp.broadcast_to(start[None, :, None], (batch, heads, index.query_blocks)).reshape(-1),
        "place": _places(index, batch, heads, index.query_blocks, index.block_q),
    }

    def begin(mine: dict[str, Array]) -> tuple[Array, Array, Array]:
        rows = mine["query"].shape[:2]
        if sinks is None:
            return jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((*rows, width))
        return jnp.broadcast_to(mine["sink"][:, None], rows), jnp.ones(rows), jnp.zeros((*rows, width))

    def turn(mine: dict[str, Array], theirs: dict[str, Array], seen: Array | None, state: Any) -> Any:
        peak, total, out = state
        logits = _logits(mine["query"], theirs, mine["place"], seen, causal, index)
        higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(peak - higher)
        fresh = _product("tpk,tkd->tpd", weights.astype(value.dtype), theirs["value"])
        return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + fresh

    def end(mine: dict[str, Array], state: Any) -> tuple[Array, Array]:
        peak, total, out = state
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        return (out / safe[..., None]).astype(query.dtype), jnp.where(some, jnp.log(safe) + peak, -jnp.inf)

    out, lse = _sweep(lists, own, blocks, index.tiles, index.block_k, begin, turn, end)
    out = _unblocks(out, batch, heads, length)
    return out, lse.reshape(batch, heads, -1)[..., :length]


def backward(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    sinks: Float[Array, " H"] | None,
    lse: Float[Array, "B H N"],
    delta: Float[Array, "B H N"],
    dout: Float[Array, "B N H d"],
    *,
    causal: bool,
    scale: float,
) -> tuple[Array, Array, Array, Array | None]:
    """Weights are computed again from `lse`, once for the queries and once for the keys: no sum crosses lists."""
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    keys = _key_side(key, value, key_bias, index)
    queries = {
        "query": _blocks(query * jnp.asarray(scale, query.dtype), index.block_q),
        "dout": _blocks(dout.astype(query.dtype), index.block_q),
        # Queries that fill up the last block get no weights.
        "lse": _row_blocks(lse, index.block_q, jnp.inf),
        "delta": _row_blocks(delta, index.block_q, 0.0),
        "place": _places(index, batch, heads, index.query_blocks, index.block_q),
    }

    def gradient(own: dict[str, Array], theirs: dict[str, Array], seen: Array | None) -> tuple[Array, Array]:
        logits = _logits(own["query"], theirs, own["place"], seen, causal, index)
        weights = jnp.exp(logits - own["lse"][..., None])
        dweights = _product("tpd,tkd->tpk", own["dout"], theirs["value"])
        return weights, weights * (dweights - own["delta"][..., None])

    def query_turn(mine: dict[str, Array], theirs: dict[str, Array], seen: Array | None, state: Array) -> Array:
        dlogits = gradient(mine, theirs, seen)[1].astype(key.dtype)
        return state + _product("tpk,tkd->tpd", dlogits, theirs["key"])

    dquery = _sweep(
        _flat_lists(index, batch, heads, groups),
        queries,
        keys,
        index.tiles,
        index.block_k,
        lambda mine: jnp.zeros(mine["query"].shape),
        query_turn,
        lambda mine, state: (state * scale).astype(query.dtype),
    )

    def key_turn(mine: dict[str, Array], theirs: dict[str, Array], seen: Array | None, state: Any) -> Any:
        seen = None if seen is None else jnp.swapaxes(seen, 1, 2)
        weights, dlogits = gradient(theirs, mine, seen)
        dkey = _product("tpk,tpd->tkd", dlogits.astype(query.dtype), theirs["query"])
        dvalue = _product("tpk,tpd->tkd", weights.astype(dout.dtype), theirs["dout"])
        fresh = {"key": dkey, "value": dvalue, "bias": jnp.sum(dlogits, axis=1)}
        return jax.tree.map(jnp.add, state, fresh)

    # Key blocks of the query heads that share a key head have lists of their own, and are added up at the end.
    shared = {name: _shared(leaf, batch, groups, heads) for name, leaf in keys.items()}
    back = index.transposed()
    parts = _sweep(
        _flat_lists(back, batch, heads, heads),
        shared,
        queries,
        back.tiles,
        index.block_q,
        lambda mine: {name: jnp.zeros(mine[name].shape) for name in ("key", "value", "bias")},
        key_turn,
        lambda mine, state: state,
    )

    def summed(part: Float[Array, "T q d"]) -> Float[Array, "B L G d"]:
        part = part.reshape(batch, groups, heads // groups, -1, part.shape[-1])[:, :, :, : index.keys]
        return jnp.swapaxes(jnp.sum(part, axis=2), 1, 2)

    dquery = _unblocks(dquery, batch, heads, length)
    dkey, dvalue = summed(parts["key"]).astype(key.dtype), summed(parts["value"]).astype(value.dtype)
    if key_bias is None:
        return dquery, dkey, dvalue, None
    dbias = jnp.sum(parts["bias"].reshape(batch, heads, -1), axis=1)[:, : index.keys]
    return dquery, dkey, dvalue, dbias


def _sweep(
    lists: dict[str, Array],
    own: dict[str, Array],
    blocks: dict[str, Array],
    tiles: Bool[Array, "t p q"] | None,
    block: int,
    begin: Callable[..., Any],
    turn: Callable[..., Any],
    end: Callable[..., Any],
) -> Any:
    """For each list: `end(own, turn(own, gathered blocks, mask, ...turn(..., begin(own))))`, rows of every result as `own`.

    Args:
      lists: `ids [T, K]` rows of `blocks`, `counts [T]` and perhaps `tiles [T, K]`.
      own: leaves `[T, ...]`, what a list's own block brings.
      blocks: leaves `[number, block, ...]`, gathered into `[P, W * block, ...]`.
      tiles: masks of listed blocks; `turn` gets `[P, own rows, W * block]` of them, or None.
    """
    total, capacity = lists["ids"].shape
    together, width = min(_LISTS, total), min(max(1, _COLUMNS // block), capacity)
    groups, turns = -(-total // together), -(-capacity // width)
    order = jnp.argsort(-lists["counts"])
    # Lists that fill up the last group are copies of the last, and ids that fill up the last turn are never listed.
    order = jnp.pad(order, (0, groups * together - total), mode="edge")
    lists = {name: _pad_last(leaf, turns * width) if leaf.ndim == 2 else leaf for name, leaf in lists.items()}

    def group(_: None, rows: Int[Array, " P"]) -> tuple[None, Any]:
        mine = {name: leaf[rows] for name, leaf in own.items()}
        ours = {name: leaf[rows] for name, leaf in lists.items()}
        counts = ours["counts"]

        def step(i: Int[Array, ""], state: Any) -> Any:
            def cut(name: str) -> Int[Array, "P W"]:
                return jax.lax.dynamic_slice_in_dim(ours[name], i * width, width, axis=1)

            theirs = {name: _join(leaf[cut("ids")]) for name, leaf in blocks.items()}
            listed = jnp.repeat(i * width + jnp.arange(width) < counts[:, None], block, axis=1)
            seen = listed[:, None, :]
            if tiles is not None:
                number = cut("tiles")
                masks = jnp.asarray(tiles)[jnp.maximum(number, 0)] | (number < 0)[..., None, None]
                seen &= jnp.swapaxes(masks, 1, 2).reshape(together, masks.shape[2], -1)
            return turn(mine, theirs, seen, state)

        return None, end(mine, jax.lax.fori_loop(0, -(-jnp.max(counts) // width), step, begin(mine)))

    _, results = jax.lax.scan(group, None, order.reshape(groups, together))
    back = jnp.zeros(total, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32), mode="drop")
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[back], results)


def _logits(
    query: Float[Array, "P p d"],
    theirs: dict[str, Array],
    place: Int[Array, "P p"],
    seen: Bool[Array, "P p k"] | None,
    causal: bool,
    index: BlockIndex,
) -> Float[Array, "P p k"]:
    logits = _product("tpd,tkd->tpk", query, theirs["key"]) + theirs["bias"][:, None, :]
    if causal:
        late = theirs["place"][:, None, :] > place[:, :, None] + index.keys - index.queries
        seen = ~late if seen is None else seen & ~late
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _product(formula: str, left: Array, right: Array) -> Array:
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)


def _flat_lists(index: BlockIndex, batch: int, heads: int, others: int) -> dict[str, Array]:
    """Lists `[B H R, K]` of numbers into all blocks of the other side, which has `others` heads."""
    h, capacity = index.indices.shape[1], index.indices.shape[3]
    head = jnp.arange(batch)[:, None] * others + jnp.arange(heads) // (heads // others)
    first = (head * index.key_blocks).astype(jnp.int32)[:, :, None, None]

    def spread(leaf: Array) -> Array:
        leaf = jnp.repeat(jnp.asarray(leaf), heads // h, axis=1)
        return jnp.broadcast_to(leaf, (batch, *leaf.shape[1:]))

    lists = {
        "ids": (spread(index.indices) + first).reshape(-1, capacity),
        "counts": spread(index.counts).reshape(-1),
    }
    if index.tile_of is not None:
        lists["tiles"] = spread(index.tile_of).reshape(-1, capacity)
    return lists


def _key_side(key: Array, value: Array, key_bias: Array | None, index: BlockIndex) -> dict[str, Array]:
    """Blocks `[B G C, q, ...]` of what belongs to keys; the bias is -inf where keys fill up the last block."""
    batch, length, groups, _ = key.shape
    bias = jnp.zeros((batch, length)) if key_bias is None else key_bias.astype(jnp.float32)
    room = index.key_blocks * index.block_k
    bias = jnp.pad(bias, ((0, 0), (0, room - length)), constant_values=-jnp.inf)
    bias = jnp.broadcast_to(bias[:, None], (batch, groups, room))
    return {
        "key": _blocks(key, index.block_k),
        "value": _blocks(value, index.block_k),
        "bias": bias.reshape(-1, index.block_k),
        "place": _places(index, batch, groups, index.key_blocks, index.block_k),
    }


def _places(index: BlockIndex, batch: int, heads: int, blocks: int, block: int) -> Int[Array, "T p"]:
    places = jnp.arange(blocks * block, dtype=jnp.int32).reshape(blocks, block)
    return jnp.tile(places, (batch * heads, 1))


def _blocks(x: Float[Array, "B N H d"], block: int) -> Float[Array, "T p d"]:
    """Heads first, padded with zeros to whole blocks."""
    x = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
    return x.reshape(-1, block, x.shape[-1])


def _row_blocks(x: Float[Array, "B H N"], block: int, fill: float) -> Float[Array, "T p"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block)), constant_values=fill).reshape(-1, block)


def _unblocks(x: Float[Array, "T p d"], batch: int, heads: int, length: int) -> Float[Array, "B N H d"]:
    return jnp.swapaxes(x.reshape(batch, heads, -1, x.shape[-1])[:, :, :length], 1, 2)


def _join(gathered: Array) -> Array:
    """`[P, W, q, ...]` to `[P, W q, ...]`."""
    return gathered.reshape(gathered.shape[0], -1, *gathered.shape[3:])


def _pad_last(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, size - x.shape[-1])))


def _shared(x: Array, batch: int, groups: int, heads: int) -> Array:
    """Blocks of key heads, repeated for each query head that reads them."""
    x = x.reshape(batch, groups, -1, *x.shape[1:])
    return jnp.repeat(x, heads // groups, axis=1).reshape(-1, *x.shape[3:])
