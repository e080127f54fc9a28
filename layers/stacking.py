# SPDX-License-Identifier: Apache-2.0
"""Parameters of unrolled layers (`block_0`, ...) to those of scanned ones (`blocks`, a leading layer axis), and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_AXIS = "layers"


def stack(params: Mapping[str, Any], *, prefix: str = "block") -> dict[str, Any]:
    """`{prefix}_0 ... {prefix}_{L-1}` stacked under `{prefix}s`; other entries unchanged.

    Args:
      params: a parameter tree with arrays or boxed (partitioned) leaves, which gain the logical axis "layers".
      prefix: name of a layer without its number.

    Raises:
      ValueError: there are no such layers, or a number is missing.
    """
    pattern = re.compile(rf"{re.escape(prefix)}_(\d+)")
    numbered = {int(match[1]): name for name in params if (match := pattern.fullmatch(name))}
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"no complete run {prefix}_0, {prefix}_1, ... among {sorted(params)}")
    layers = [params[numbered[index]] for index in range(len(numbered))]
    rest = {name: value for name, value in params.items() if name not in numbered.values()}
    return rest | {f"{prefix}s": jax.tree.map(_stack_leaf, *layers, is_leaf=_boxed)}


def unstack(params: Mapping[str, Any], *, prefix: str = "block") -> dict[str, Any]:
    """The inverse of `stack`.

    Raises:
      ValueError: there is no `{prefix}s`, or its leaves differ in the number of layers.
    """
    if f"{prefix}s" not in params:
        raise ValueError(f"no {prefix}s among {sorted(params)}")
    stacked = params[f"{prefix}s"]
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(nn.unbox(stacked))}
    if len(lengths) != 1:
        raise ValueError(f"the leaves of {prefix}s differ in the number of layers: {sorted(lengths)}")
    rest = {name: value for name, value in params.items() if name != f"{prefix}s"}
    layers = {
        f"{prefix}_{index}": jax.tree.map(lambda leaf, index=index: _take_leaf(leaf, index), stacked, is_leaf=_boxed)
        for index in range(lengths.pop())
    }
    return rest | layers


def _boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _stack_leaf(*leaves: Any) -> Any:
    if _boxed(leaves[0]):
        first = leaves[0]
        return first.replace(value=jnp.stack([leaf.value for leaf in leaves]), names=(LAYER_AXIS, *first.names))
    return jnp.stack(leaves)


def _take_leaf(leaf: Any, index: int) -> Any:
    if _boxed(leaf):
        return leaf.replace(value=leaf.value[index], names=leaf.names[1:])
    return leaf[index]
