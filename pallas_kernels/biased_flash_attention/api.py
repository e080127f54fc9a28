# SPDX-License-Identifier: Apache-2.0
"""Public functions of biased attention.

Shapes: B batch, Q queries, K keys, H heads, G key heads (G divides H), d head width.
"""

from __future__ import annotations

import functools

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.biased_flash_attention import gpu, reference, tpu, xla
from pallas_kernels.biased_flash_attention.settings import Settings
from pallas_kernels.position_bias import PositionBias

SOFTMAX = ("standard", "off_by_one")
STATISTICS = ("sum", "max")
_INTERPRET = {"interpret": pltpu.InterpretParams()}
_GPU_INTERPRET = {"interpret": True}
_ATTENTION = {
    "tpu": tpu.KERNELS.biased_attention,
    "interpret": functools.partial(tpu.KERNELS.biased_attention, **_INTERPRET),
    "gpu": gpu.KERNELS.biased_attention,
    "gpu_interpret": functools.partial(gpu.KERNELS.biased_attention, **_GPU_INTERPRET),
    "xla": xla.biased_attention,
}
_STATISTICS = {
    "tpu": tpu.KERNELS.attention_column_stats,
    "interpret": functools.partial(tpu.KERNELS.attention_column_stats, **_INTERPRET),
    "gpu": gpu.KERNELS.attention_column_stats,
    "gpu_interpret": functools.partial(gpu.KERNELS.attention_column_stats, **_GPU_INTERPRET),
    "xla": xla.attention_column_stats,
}


def biased_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None = None,
    bias: Float[Array, "b H Q K"] | PositionBias | None = None,
    causal: bool = False,
    softmax: str = "standard",
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B Q H d"] | tuple[Float[Array, "B Q H d"], Float[Array, "B H Q"]]:
    """Attention `softmax(scale q k + bias + key_bias) v`, `[B, Q, H, d]` in the dtype of `query`.

    Args:
      query, key, value: `[B, Q, H, d]`, `[B, K, G, d]`, `[B, K, G, d]`; query head h reads key head `h // (H / G)`.
      key_bias: `[B, K]` added to the logits of each key (log mass, gate values); -inf removes a key.
      bias: `[1 or B, H, Q, K]` added to the logits; or a `PositionBias`, of which kernels make no such array, and whose table
        has a gradient.
      causal: query i, standing at key i + K - Q, sees no key after it.
      softmax: "standard", or "off_by_one" with a 1 added to the denominator, so that a query may attend to nothing.
      scale: factor of the products; `d ** -0.5` when None.
      return_lse: also return `[B, H, Q]` float32, the log of the softmax denominator, -inf where there is nothing in it; what
        `attention_column_stats` can start from.
      implementation: "tpu", "gpu", "xla", "interpret", "gpu_interpret", or None for the best available.

    The softmax is in float32. A query without any key left gets zeros, with finite gradients.

    Raises:
      ValueError: shapes do not fit, or an unknown `softmax`.
      NotImplementedError: the named implementation is not there or cannot do it: TPUs and GPUs take no `bias` of all pairs; on
        TPUs positions of a head's keys and queries, and for column statistics its queries, must fit in VMEM; on GPUs heads
        are at most 256 wide.

    Source: key bias log(size): Bolya et al. 2023, eq. 1; softmax off by one: Miller 2023, as used by Kallini et al. 2025.
    """
    _check(query, key, value, key_bias, bias, causal, softmax)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    settings = Settings(key_bias, bias, causal, softmax, scale)
    out, lse = dispatch.call("biased_attention", _ATTENTION, implementation, query, key, value, settings)
    return (out, lse) if return_lse else out


def attention_column_stats(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None = None,
    bias: Float[Array, "b H Q K"] | PositionBias | None = None,
    causal: bool = False,
    softmax: str = "standard",
    scale: float | None = None,
    query_weight: Float[Array, "B Q"] | None = None,
    statistic: str = "sum",
    lse: Float[Array, "B H Q"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H K"]:
    """Attention that each key receives, times `query_weight [B, Q]`, summed over queries or its "max": `[B, H, K]` float32.

    Weights under "max" must not be negative, so that 0 stands for a key that no query sees.
    The map is never held whole: rows are computed, summed and dropped block by block, in the backward pass too. The last W
    rows alone are `query[:, -W:]`, also under a causal mask. `lse` is what `biased_attention` returned for the same
    arguments; it saves kernels two thirds of the products. Other arguments and errors are those of `biased_attention`;
    a `statistic` that is neither raises ValueError.
    """
    _check(query, key, None, key_bias, bias, causal, softmax)
    if query_weight is not None and query_weight.shape != query.shape[:2]:
        raise ValueError(f"query_weight must be [B, Q] = {query.shape[:2]}; got {query_weight.shape}")
    if lse is not None and lse.shape != (query.shape[0], query.shape[2], query.shape[1]):
        raise ValueError(f"lse must be [B, H, Q] = {(query.shape[0], *query.shape[2:0:-1])}; got {lse.shape}")
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r} is not one of {STATISTICS}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    settings = Settings(key_bias, bias, causal, softmax, scale)
    args = (query, key, settings, query_weight, statistic, lse)
    return dispatch.call("attention_column_stats", _STATISTICS, implementation, *args)


def attention_score_excess(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    threshold: float = 5.0,
    bias: Float[Array, "b H Q K"] | PositionBias | None = None,
    scale: float | None = None,
    query_mask: Bool[Array, "B Q"] | None = None,
    key_mask: Bool[Array, "B K"] | None = None,
    implementation: str | None = None,
) -> Float[Array, " B"]:
    """Mean of `max(S, threshold) - threshold` over heads, real queries and real keys: `[B]` float32, 0 without a pair.

    S are the logits `scale q k + bias`, without any key bias. No more of them exists at a time than the rows of a block of
    queries, in the backward pass too.

    Args:
      threshold: logits up to here are free.
      query_mask, key_mask: `[B, Q]`, `[B, K]` True for what is real; all when None.

    Other arguments and errors are those of `biased_attention`.

    Source: Kallini et al. 2025 and the public code (scores loss of the trainer), for one map.

    Differs: the public code counts padding too, with its queries as they are and its keys as 0, so that its mean depends on
    the amount of padding.
    """
    _check(query, key, None, None, bias, False, "standard")
    for name, mask, other in (("query_mask", query_mask, query), ("key_mask", key_mask, key)):
        if mask is not None and mask.shape != other.shape[:2]:
            raise ValueError(f"{name} must be [B, N] = {other.shape[:2]}; got {mask.shape}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"threshold": threshold, "bias": bias, "scale": scale, "query_mask": query_mask, "key_mask": key_mask}
    return dispatch.call(
        "attention_score_excess", {"xla": xla.attention_score_excess}, implementation, query, key, **options
    )


def attention_map(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None = None,
    bias: Float[Array, "b H Q K"] | PositionBias | None = None,
    causal: bool = False,
    softmax: str = "standard",
    scale: float | None = None,
) -> Float[Array, "B H Q K"]:
    """The whole map `[B, H, Q, K]` in float32, for small cases and pictures; arguments and errors of `biased_attention`."""
    _check(query, key, None, key_bias, bias, causal, softmax)
    options = {"key_bias": key_bias, "bias": bias, "causal": causal, "softmax": softmax, "scale": scale}
    return reference.attention_map(query, key, **options)


def _check(
    query: Array,
    key: Array,
    value: Array | None,
    key_bias: Array | None,
    bias: Array | PositionBias | None,
    causal: bool,
    softmax: str,
) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be [B, N, heads, d]; got {query.shape} and {key.shape}")
    (batch, rows, heads, width), (_, columns, groups, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(f"key {key.shape} does not fit query {query.shape}: batch and head width must agree")
    if heads % groups:
        raise ValueError(f"the number of key heads must divide the number of query heads; got {groups} and {heads}")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {value.shape} must have the batch, length and heads of key {key.shape}")
    if key_bias is not None and key_bias.shape != (batch, columns):
        raise ValueError(f"key_bias must be [B, K] = {(batch, columns)}; got {key_bias.shape}")
    if bias is not None and (bias.shape[0] not in (1, batch) or bias.shape[1:] != (heads, rows, columns)):
        raise ValueError(f"bias must be [1 or {batch}, H, Q, K] with {(heads, rows, columns)}; got {bias.shape}")
    if causal and rows > columns:
        raise ValueError(f"causal attention needs at least as many keys as queries; got {columns} keys, {rows} queries")
    if softmax not in SOFTMAX:
        raise ValueError(f"softmax={softmax!r} is not one of {SOFTMAX}")
