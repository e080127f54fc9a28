# SPDX-License-Identifier: Apache-2.0
"""Which key blocks each query block attends to, as lists with counts, made from data under `jit` or once from a rule.

Shapes: B batch, N queries, L keys, H heads, R query blocks, C key blocks, K list capacity, T distinct partial tiles, p queries
in a block, q keys in a block; b is 1 or B and h is 1, the number of key heads, or H.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Listed for a block whose every pair is attended.
FULL = -1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "counts", "tile_of", "tiles"],
    meta_fields=["queries", "keys", "block_q", "block_k"],
)
@dataclasses.dataclass(frozen=True)
class BlockIndex:
    """Lists of key blocks for query blocks; an immutable pytree. Make one with a `from_` function, not by hand.

    Attributes:
      indices: `[b, h, R, K]` int32, different key-block numbers in any order; entries past the count are some valid number.
      counts: `[b, h, R]` int32, entries of each list; 0 is allowed.
      tile_of: `[b, h, R, K]` int32, the row of `tiles` that masks a listed block, `FULL` for none; or None: all are full.
      tiles: `[T, p, q]` bool, the distinct masks of partly attended blocks; or None.
      queries, keys: N and L, static. The last block of either may be shorter than the others.
      block_q, block_k: p and q, static.
    """

    indices: Int[Array, "b h R K"]
    counts: Int[Array, "b h R"]
    tile_of: Int[Array, "b h R K"] | None
    tiles: Bool[Array, "T p q"] | None
    queries: int
    keys: int
    block_q: int
    block_k: int

    @property
    def query_blocks(self) -> int:
        """R."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """C."""
        return -(-self.keys // self.block_k)

    def density(self) -> Float[Array, ""]:
        """Listed blocks over all blocks, a float32 scalar."""
        return jnp.mean(jnp.asarray(self.counts, jnp.float32)) / self.key_blocks

    def block_mask(self) -> Bool[Array, "b h R C"]:
        """`[b, h, R, C]`, True where a block is listed."""
        return _dense(self) > 0

    def token_mask(self) -> Bool[Array, "b h N L"]:
        """`[b, h, N, L]`, True where a query may attend to a key; for references and tests, as it is dense."""
        dense = _dense(self)
        mask = jnp.broadcast_to((dense > 0)[..., None, None], (*dense.shape, self.block_q, self.block_k))
        if self.tiles is not None:
            mask &= jnp.where((dense > 1)[..., None, None], jnp.asarray(self.tiles)[jnp.maximum(dense - 2, 0)], True)
        mask = jnp.swapaxes(mask, 3, 4)
        mask = mask.reshape(*dense.shape[:2], self.query_blocks * self.block_q, self.key_blocks * self.block_k)
        return mask[:, :, : self.queries, : self.keys]

    def transposed(self) -> BlockIndex:
        """Lists of query blocks for key blocks, built on the device; capacity R, as any key block may be in every list."""
        dense = jnp.swapaxes(_dense(self), 2, 3)
        return _pack(
            dense,
            None if self.tiles is None else jnp.swapaxes(self.tiles, 1, 2),
            capacity=self.query_blocks,
            queries=self.keys,
            keys=self.queries,
            block_q=self.block_k,
            block_k=self.block_q,
        )


def from_block_mask(mask: Bool[Array, "b h R C"], *, queries: int, keys: int, block_q: int, block_k: int) -> BlockIndex:
    """Lists of the True blocks of `mask [b, h, R, C]`, all of them full.

    A NumPy mask gives lists as long as the longest needs to be; a traced one gives lists of capacity C.

    Raises:
      ValueError: a mask that does not have one entry a block.
    """
    _check_sizes(queries, keys, block_q, block_k)
    blocks = (-(-queries // block_q), -(-keys // block_k))
    if mask.ndim != 4 or mask.shape[2:] != blocks:
        raise ValueError(f"mask must be [b, h, R, C] with R, C = {blocks}; got {mask.shape}")
    static = isinstance(mask, np.ndarray)
    capacity = max(1, int(mask.sum(-1).max(initial=0))) if static else blocks[1]
    sizes = dict(queries=queries, keys=keys, block_q=block_q, block_k=block_k)
    return _pack(mask.astype(np.int32), None, capacity=capacity, **sizes)


def from_scores(
    scores: Float[Array, "b h R C"], k: int, *, queries: int, keys: int, block_q: int, block_k: int
) -> BlockIndex:
    """Lists of the `k` best key blocks by `scores [b, h, R, C]`; a score of -inf keeps a block out. Works under `jit`.

    No gradient flows through the choice.

    Raises:
      ValueError: scores that do not have one entry a block, or `k` outside of 1 to C.
    """
    _check_sizes(queries, keys, block_q, block_k)
    blocks = (-(-queries // block_q), -(-keys // block_k))
    if scores.ndim != 4 or scores.shape[2:] != blocks:
        raise ValueError(f"scores must be [b, h, R, C] with R, C = {blocks}; got {scores.shape}")
    if not 1 <= k <= blocks[1]:
        raise ValueError(f"k={k} blocks must be between 1 and the {blocks[1]} key blocks")
    best, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    listed = best > -jnp.inf
    # Blocks that are not listed sort behind all others.
    indices = jnp.sort(jnp.where(listed, chosen, blocks[1]), axis=-1)
    return BlockIndex(
        jnp.minimum(indices, blocks[1] - 1),
        listed.sum(-1, dtype=jnp.int32),
        None,
        None,
        queries,
        keys,
        block_q,
        block_k,
    )


def from_rule(
    rule: Callable[[np.ndarray, np.ndarray], np.ndarray], *, queries: int, keys: int, block_q: int, block_k: int
) -> BlockIndex:
    """Lists of the blocks that `rule(i [p, 1], j [1, L]) -> bool [p, L]` touches, masked inside where it says so.

    Evaluated in NumPy, one block of queries at a time; equal partial tiles are stored once. The result is `[1, 1, R, K]`.

    Raises:
      ValueError: sizes below 1.
    """
    _check_sizes(queries, keys, block_q, block_k)
    shape = (-(-queries // block_q), -(-keys // block_k))
    dense = np.zeros((1, 1, *shape), np.int32)
    tiles: dict[bytes, int] = {}
    columns = np.arange(shape[1] * block_k)[None, :]
    for row in range(shape[0]):
        rows = np.arange(row * block_q, (row + 1) * block_q)[:, None]
        seen = np.broadcast_to(rule(rows, columns), (block_q, columns.size)).astype(bool)
        # Pairs beyond the ends are cut off anyway, so they do not make a tile partial.
        real = (rows < queries) & (columns < keys)
        tile = seen.reshape(block_q, shape[1], block_k).transpose(1, 0, 2)
        whole = (seen | ~real).reshape(block_q, shape[1], block_k).all((0, 2))
        touched = (seen & real).reshape(block_q, shape[1], block_k).any((0, 2))
        for column in np.flatnonzero(touched):
            number = 1 if whole[column] else 2 + tiles.setdefault(tile[column].tobytes(), len(tiles))
            dense[0, 0, row, column] = number
    bank = None
    if tiles:
        bank = np.stack([np.frombuffer(key, bool).reshape(block_q, block_k) for key in tiles])
    capacity = max(1, int((dense > 0).sum(-1).max()))
    sizes = dict(queries=queries, keys=keys, block_q=block_q, block_k=block_k)
    return _pack(dense, bank, capacity=capacity, **sizes)


def _check_sizes(queries: int, keys: int, block_q: int, block_k: int) -> None:
    for name, size in (("queries", queries), ("keys", keys), ("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def _dense(index: BlockIndex) -> Int[Array, "b h R C"]:
    """0: not listed, 1: full, 2 + t: masked by tile t."""
    listed = jnp.arange(index.indices.shape[-1]) < jnp.asarray(index.counts)[..., None]
    value = 1 if index.tile_of is None else jnp.asarray(index.tile_of) + 2
    shape = (*index.indices.shape[:-1], index.key_blocks)
    places = jnp.where(listed, index.indices, index.key_blocks)
    dense = jnp.zeros(shape, jnp.int32)
    return jnp.put_along_axis(
        jnp.pad(dense, [(0, 0)] * 3 + [(0, 1)]), places, jnp.broadcast_to(value, places.shape), axis=-1, inplace=False
    )[..., :-1]


def _pack(
    dense: Int[Array, "b h R C"], tiles: Bool[Array, "T p q"] | None, *, capacity: int, **sizes: int
) -> BlockIndex:
    """Lists of the non-zero entries of the form that `_dense` makes."""
    xp = np if isinstance(dense, np.ndarray) else jnp
    kinds = 2 + (0 if tiles is None else tiles.shape[0])
    blocks = dense.shape[-1]
    # One integer holds number and kind, so one sort without a payload orders both.
    packed = xp.where(dense > 0, xp.arange(blocks, dtype=np.int32) * kinds + dense, blocks * kinds)
    packed = xp.sort(packed, axis=-1)[..., :capacity]
    counts = xp.sum(dense > 0, axis=-1).astype(np.int32)
    indices = xp.minimum(packed // kinds, blocks - 1).astype(np.int32)
    if tiles is None:
        return BlockIndex(indices, counts, None, None, **sizes)
    tile_of = xp.where(packed < blocks * kinds, packed % kinds - 2, FULL).astype(np.int32)
    return BlockIndex(indices, counts, tile_of, tiles, **sizes)
