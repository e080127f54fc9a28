# SPDX-License-Identifier: Apache-2.0
"""From matches of even with odd tokens to the map that merges them: who joins, in which slot, with which weight.

Shapes: B batch, N tokens, A = ceil(N/2) even tokens, K = floor(N/2) odd ones, M slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.bipartite_match import pairs_tpu, pairs_xla

_TPU = partition.by_batch(pairs_tpu.pair_up)


class Pairs(NamedTuple):
    """A merge of pairs.

    Attributes:
      heads: `[B, M]` int32, token that heads each slot; -1 for a slot that is left over.
      assign: `[B, N]` int32, slot of each token. weight: `[B, N]` float32, its share of the slot's mass.
    """

    heads: Int[Array, "B M"]
    assign: Int[Array, "B N"]
    weight: Float[Array, "B N"]


def pair_up(
    similarity: Float[Array, "B A"],
    partner: Int[Array, "B A"],
    mass: Float[Array, "B N"],
    *,
    removed: int,
    threshold: float | Float[Array, ""] | None = None,
    ordered: bool,
    protected: bool = False,
    implementation: str | None = None,
) -> Pairs:
    """The `removed` most similar even tokens join their odd partners; slots are the other even tokens, then all odd ones.

    A gradient flows from the weights to `mass` alone.

    Args:
      similarity, partner: `[B, A]` of each even token, and the number of its odd partner; ties go to the lower index.
      mass: `[B, N]`, not negative; an even token without any is padding and joins before all others, a slot without any has
        weights 0.
      removed: r in 0..A; M = N - r.
      threshold: even tokens above this similarity join too; slots left over then have no head.
      protected: the first token joins nothing unless all do.
      ordered: unmerged even tokens stay in their order; by falling similarity otherwise.
      implementation: "tpu", "xla", "interpret", or None for the best available.

    Raises:
      ValueError: shapes do not fit, or `removed` is out of range.
      NotImplementedError: the named implementation is not there or cannot take the shape.
    """
    even, odd = -(-mass.shape[1] // 2), mass.shape[1] // 2
    if similarity.shape != (mass.shape[0], even) or partner.shape != similarity.shape:
        raise ValueError(
            f"similarity and partner must be [B, ceil(N/2)] = {(mass.shape[0], even)}; got {similarity.shape}, {partner.shape}"
        )
    if not 0 <= removed <= even or not odd:
        raise ValueError(
            f"removed must lie in 0..{even}, with at least one odd token of {mass.shape[1]}; got {removed}"
        )
    above = None if threshold is None else similarity > threshold
    return _pair_up((removed, ordered, protected, implementation), similarity, partner, above, mass.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair_up(options, similarity, partner, above, mass):
    removed, ordered, protected, implementation = options
    implementations = {"tpu": _TPU, "xla": pairs_xla.pair_up, "interpret": functools.partial(_TPU, interpret=True)}
    static = {"removed": removed, "ordered": ordered, "protected": protected}
    arrays = (similarity, partner, mass) if above is None else (similarity, partner, mass, above)
    return Pairs(*dispatch.call("pair_up", implementations, implementation, *arrays, **static))


def _forward(options, similarity, partner, above, mass):
    pairs = _pair_up(options, similarity, partner, above, mass)
    return pairs, (mass, pairs.assign, pairs.heads.shape[1])


def _backward(options, saved, moved):
    mass, assign, slots = saved
    weights = functools.partial(pairs_xla.shares, assign=assign, slots=slots)
    return None, None, None, jax.vjp(weights, mass)[1](moved.weight)[0]


_pair_up.defvjp(_forward, _backward)
