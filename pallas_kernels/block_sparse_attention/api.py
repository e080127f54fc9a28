# SPDX-License-Identifier: Apache-2.0
"""Public function of block-sparse attention.

Shapes: B batch, N queries, L keys, H heads, G key heads (G divides H), d head width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partition
from pallas_kernels.block_sparse_attention import gpu, gpu_backward, tpu, tpu_backward, xla
from pallas_kernels.block_sparse_attention.autodiff import Passes, attend
from pallas_kernels.block_sparse_attention.index import BlockIndex

SOFTMAX = ("standard", "off_by_one")
_INTERPRET = pltpu.InterpretParams()
_PASSES = {
    "tpu": Passes(tpu.forward, tpu_backward.backward),
    "interpret": Passes(
        functools.partial(tpu.forward, interpret=_INTERPRET),
        functools.partial(tpu_backward.backward, interpret=_INTERPRET),
    ),
    "gpu": Passes(gpu.forward, gpu_backward.backward),
    "gpu_interpret": Passes(
        functools.partial(gpu.forward, interpret=True),
        functools.partial(gpu_backward.backward, interpret=True),
    ),
    "xla": Passes(xla.forward, xla.backward),
}


def block_sparse_attention(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    *,
    key_bias: Float[Array, "B L"] | None = None,
    causal: bool = False,
    softmax: str = "standard",
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B N H d"] | tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """Attention of each query block to the key blocks that `index` lists for it, `[B, N, H, d]` in the dtype of `query`.

    Time and memory follow the number of listed blocks; nothing of size N x L is made.

    Args:
      query, key, value: `[B, N, H, d]`, `[B, L, G, d]`, `[B, L, G, d]`; query head h reads key head `h // (H / G)`.
      index: lists for N and L; shared by the batch or not, and by all heads, by those that share a key head, or not.
      key_bias: `[B, L]` added to the logits of each key (log mass, gate values); -inf removes a key.
      causal: query i, standing at key i + L - N, sees no key after it, in whatever block it is listed.
      softmax: "standard", or "off_by_one" with a 1 added to the denominator, so that a query may attend to nothing.
      sinks: `[H]` logits, each one more key without a value; with all zero it is softmax off by one.
      scale: factor of the products; `d ** -0.5` when None.
      return_lse: also return `[B, H, N]` float32, the log of the softmax denominator, sinks included, with which outputs over
        different keys can be joined; -inf for a query with nothing to attend to.
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available.

    The softmax is in float32. A query without any key gets zeros, with finite gradients. A block listed twice is a mistake
    that nothing looks for: its keys count twice.

    Raises:
      ValueError: shapes do not fit each other or the index, an unknown `softmax`, or sinks beside softmax off by one.
      NotImplementedError: the named implementation is not there or cannot do it: on TPUs blocks are multiples of 128; on GPUs
        they are multiples of 16, and heads at most 256 wide.

    Source: online softmax over blocks: Dao et al. 2022, algorithm 1; backward from the log-sum-exp: Dao 2023, algorithm 2.
    """
    _check(query, key, value, index, key_bias, causal, softmax, sinks)
    if softmax == "off_by_one":
        sinks = jnp.zeros(query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    implementations = {name: functools.partial(_attend, name, causal, float(scale)) for name in _PASSES}
    args = (query, key, value, index, key_bias, sinks)
    out, lse = dispatch.call("block_sparse_attention", implementations, implementation, *args)
    return (out, lse) if return_lse else out


def _attend(
    name: str,
    causal: bool,
    scale: float,
    query: Array,
    key: Array,
    value: Array,
    index: BlockIndex,
    key_bias: Array | None,
    sinks: Array | None,
) -> tuple[Array, Array]:
    """One implementation, on each device for its own rows of the batch."""
    lists = ("indices", "counts", "tile_of")
    own = {field: getattr(index, field) for field in lists if index.indices.shape[0] == query.shape[0]}

    def rows(query: Array, key: Array, value: Array, key_bias: Any, own: dict[str, Any], whole: Any) -> Any:
        index, sinks = whole
        index = dataclasses.replace(index, **own)
        return attend(_PASSES[name], causal, scale, query, key, value, index, key_bias, sinks)

    whole = (dataclasses.replace(index, **dict.fromkeys(own)), sinks)
    return partition.by_batch(rows)(query, key, value, key_bias, own, whole=whole)


def _check(
    query: Array,
    key: Array,
    value: Array,
    index: BlockIndex,
    key_bias: Array | None,
    causal: bool,
    softmax: str,
    sinks: Array | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be [B, N, heads, d]; got {query.shape} and {key.shape}")
    (batch, rows, heads, width), (_, columns, groups, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != width or value.shape != key.shape:
        raise ValueError(f"key {key.shape} and value {value.shape} must be [{batch}, L, G, {width}] to fit the query")
    if heads % groups:
        raise ValueError(f"the number of key heads must divide the number of query heads; got {groups} and {heads}")
    if (index.queries, index.keys) != (rows, columns):
        raise ValueError(
            f"the index is for {index.queries} queries and {index.keys} keys; got {rows} and {columns}: build it for these"
        )
    lead = index.indices.shape[:2]
    if lead[0] not in (1, batch) or lead[1] not in (1, groups, heads):
        raise ValueError(f"the index has [b, h] = {lead}; b must be 1 or {batch}, h one of 1, {groups}, {heads}")
    if key_bias is not None and key_bias.shape != (batch, columns):
        raise ValueError(f"key_bias must be [B, L] = {(batch, columns)}; got {key_bias.shape}")
    if causal and rows > columns:
        raise ValueError(f"causal attention needs at least as many keys as queries; got {columns} keys, {rows} queries")
    if softmax not in SOFTMAX:
        raise ValueError(f"softmax={softmax!r} is not one of {SOFTMAX}")
    if sinks is not None and softmax == "off_by_one":
        raise ValueError("softmax='off_by_one' is a sink of zeros itself; give sinks with softmax='standard'")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [H] = {(heads,)}; got {sinks.shape}")
