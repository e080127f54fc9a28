# SPDX-License-Identifier: Apache-2.0
"""How hard a token is: the loss that extra compute would save, not the loss itself; and how alike two routings are.

A token whose loss is high on every path is uncertain, not hard in the useful sense.

Shapes: N tokens (any number of axes), L layers, G groups.

Source: Alizadeh et al. 2024 (Duo-LLM), section on token difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gain(cheap: Float[Array, "*N"], best: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Loss on the cheapest path minus the loss on the best one: >= 0 where the cheapest path is among the candidates."""
    return cheap - best


def concentration(gains: Float[Array, "*N"], shares: Sequence[float]) -> Float[Array, " S"]:
    """What part of the whole gain the hardest tokens hold, for each share of tokens in 0..1; NaN where nothing is gained.

    Raises:
      ValueError: a share outside 0..1.
    """
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"shares of tokens lie in 0..1; got {tuple(shares)}")
    ordered = jnp.sort(gains.reshape(-1))[::-1]
    running = jnp.concatenate([jnp.zeros(1), jnp.cumsum(ordered)])
    counts = jnp.asarray([round(share * ordered.size) for share in shares])
    return running[counts] / running[-1]


def correlation(first: Float[Array, "*N"], second: Float[Array, "*N"]) -> Float[Array, ""]:
    """Pearson's correlation over all tokens, such as of loss and gain."""
    return jnp.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1]


def by_group(values: Float[Array, "*N"], groups: Int[Array, "*N"], count: int) -> tuple[Array, Array]:
    """`(sum [G], tokens [G])` of each of `count` groups."""
    member = groups.reshape(-1) == jnp.arange(count)[:, None]
    return jnp.sum(jnp.where(member, values.reshape(-1), 0.0), axis=-1), jnp.sum(member, axis=-1)


def agreement(
    first: Int[Array, "*N L"], second: Int[Array, "*N L"], choices: int
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """`(share of tokens with the same choice, share that independent choices of the same frequencies would have)` by layer.

    Args:
      first, second: paths of choices in 0..`choices` - 1.

    Raises:
      ValueError: the paths differ in shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"paths of the same tokens and layers are needed; got {first.shape} and {second.shape}")
    layers = first.shape[-1]
    first, second = first.reshape(-1, layers), second.reshape(-1, layers)
    frequent = [jnp.mean(paths[..., None] == jnp.arange(choices), axis=0) for paths in (first, second)]
    return jnp.mean(first == second, axis=0), jnp.sum(frequent[0] * frequent[1], axis=-1)
