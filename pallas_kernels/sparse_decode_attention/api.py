# SPDX-License-Identifier: Apache-2.0
"""Public functions of sparse decoding.

Shapes: B batch, T query rows, H heads, G key heads (G divides H), d head width, P pages of the cache, S slots of a page,
L pages listed, C slots of a plain cache, K selected tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.sparse_decode_attention import gpu, tpu, xla

_IMPLEMENTATIONS = {
    "tpu": tpu.sparse_decode_attention,
    "gpu": gpu.sparse_decode_attention,
    "gpu_interpret": functools.partial(gpu.sparse_decode_attention, interpret=True),
    "xla": xla.sparse_decode_attention,
    "interpret": functools.partial(tpu.sparse_decode_attention, interpret=True),
}


def sparse_decode_attention(
    query: Float[Array, "B T H d"],
    key_pages: Float[Array, "*b G P S d"],
    value_pages: Float[Array, "*b G P S d"],
    pages: Int[Array, "B g L"],
    lengths: Int[Array, "B g"],
    *,
    bias: Float[Array, "*b G P S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Attention over the listed pages: `(out [B, T, H, d] in the dtype of query, log-sum-exp [B, T, H] float32)`.

    Work grows with the longest list (XLA) or with the sum of all lists (TPU, GPU). The log-sum-exp serves to join the result
    with attention over other keys. Decoding only: there is no gradient.

    Args:
      query: `[B, T, H, d]`; query head h reads key head `h // (H / G)`, and every row sees every listed key.
      key_pages, value_pages: `[G, P, S, d]`, a pool for all rows, or `[B, G, P, S, d]`, pages of each row's own: a plain cache
        `[B, G, P S, d]` in another shape.
      pages: `[B, G, L]` pages of each key head in any order, or `[B, 1, L]` when all heads share them; a page is listed once.
      lengths: `[B, G]` (or `[B, 1]`) tokens listed: all slots of the listed pages but for the end of the last one, in 0..L S.
        Entries of `pages` past the length are not looked at.
      bias: `[G, P, S]` or `[B, G, P, S]`, as the pages, added to the logits of each slot (log mass); -inf removes it.
      sinks: `[H]` logits that enter the denominator alone; 0 is softmax-off-by-one.
      scale: factor of the products; `d ** -0.5` when None.
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available. Of several devices
        each has its own rows, with their caches; a pool is whole on all.

    A row without any key gets zeros and a log-sum-exp of -inf, or of its sink.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    _check(query, key_pages, value_pages, pages, lengths, bias, sinks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    cache, lists = (key_pages, value_pages, bias), (pages.astype(jnp.int32), lengths.astype(jnp.int32))
    implementations = {name: functools.partial(_attend, kernel, scale) for name, kernel in _IMPLEMENTATIONS.items()}
    return dispatch.call("sparse_decode_attention", implementations, implementation, query, cache, lists, sinks)


def _attend(kernel: Callable[..., Any], scale: float, query: Array, cache: Any, lists: Any, sinks: Array | None) -> Any:
    """One implementation, on each device for its own rows of the batch."""

    def rows(query: Array, lists: Any, own: Any, *, whole: Any) -> Any:
        shared, sinks = whole
        keys, values, bias = shared if own is None else own
        return kernel(query, keys, values, *lists, bias=bias, sinks=sinks, scale=scale)

    own, shared = (cache, None) if cache[0].ndim == 5 else (None, cache)
    return partition.by_batch(rows)(query, lists, own, whole=(shared, sinks))


def pack_tokens(
    cache: Float[Array, "B G C d"], index: Int[Array, "B G K"], page: int
) -> tuple[Float[Array, "G P S d"], Int[Array, "B G L"]]:
    """Copies selected tokens of a plain cache into pages of their own: `(pages [G, B L, S, d], list [B, G, L])`, S = `page`.

    For a selection by single tokens that is used for several steps: one copy now, whole pages at each step. The lengths are the
    numbers of selected tokens; the end of the last page repeats a token and lies past them.

    Args:
      cache: `[B, G, C, d]` keys, or values.
      index: `[B, G, K]` slots, in 0..C-1 (those past a head's own number may be anything in that range).
      page: slots of a page.

    Raises:
      ValueError: shapes do not fit, or the page has no slot.
    """
    if cache.ndim != 4 or index.ndim != 3 or cache.shape[:2] != index.shape[:2] or page < 1:
        raise ValueError(
            f"cache must be [B, G, C, d], index [B, G, K] and page positive; got {cache.shape}, {index.shape}, {page}"
        )
    batch, heads, count = index.shape
    listed = -(-count // page)
    index = jnp.pad(index, ((0, 0), (0, 0), (0, listed * page - count)), mode="edge")
    rows = jnp.take_along_axis(cache, index[..., None], axis=2).reshape(batch, heads, listed, page, -1)
    pages = jnp.moveaxis(rows, 1, 0).reshape(heads, batch * listed, page, -1)
    places = jnp.arange(batch * listed, dtype=jnp.int32).reshape(batch, 1, listed)
    return pages, jnp.broadcast_to(places, (batch, heads, listed))


def _check(query, key_pages, value_pages, pages, lengths, bias, sinks) -> None:
    if query.ndim != 4 or key_pages.ndim not in (4, 5) or pages.ndim != 3:
        raise ValueError(
            f"query must be [B, T, H, d], key_pages [G, P, S, d] or [B, G, P, S, d], pages [B, G, L]; got {query.shape}, "
            f"{key_pages.shape}, {pages.shape}"
        )
    (batch, _, heads, width), groups = query.shape, key_pages.shape[-4]
    lead = key_pages.shape[:-4]
    if (
        heads % groups
        or lead not in ((), (batch,))
        or key_pages.shape[-1] != width
        or value_pages.shape != key_pages.shape
    ):
        raise ValueError(
            f"key_pages and value_pages must be [G, P, S, {width}] or [{batch}, G, P, S, {width}] with G dividing {heads}; got "
            f"{key_pages.shape} and {value_pages.shape}"
        )
    if pages.shape[:2] not in ((batch, groups), (batch, 1)) or lengths.shape != pages.shape[:2] or 0 in pages.shape:
        raise ValueError(
            f"pages must be [B, {groups} or 1, L] and lengths [B, {groups} or 1] with B = {batch} and at least one page; got "
            f"{pages.shape} and {lengths.shape}"
        )
    if bias is not None and bias.shape != key_pages.shape[:-1]:
        raise ValueError(
            f"bias must be {'[B, G, P, S]' if lead else '[G, P, S]'} = {key_pages.shape[:-1]}; got {bias.shape}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [H] = ({heads},); got {sinks.shape}")
