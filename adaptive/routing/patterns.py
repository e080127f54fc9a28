# SPDX-License-Identifier: Apache-2.0
"""Patterns: one choice for each layer; and a model as oracles see it, layer by layer.

Shapes: L layers, K choices, P = K^L patterns, U units: whatever gets a pattern of its own (tokens, sequences).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Layered:
    """A model that is run layer by layer, one choice a layer.

    Attributes:
      layers: L; costs: what each choice costs in a layer, K whole numbers (0, 0, 1 counts big modules).
      shared: `(state, layer) -> state`, what runs whatever is chosen (attention).
      step: `(state, layer, choice) -> state`, the chosen rest of the layer; layer and choice are Python ints.
      readout: `state -> losses`, a pytree of arrays; the best pattern is found for each element of each of them.

    A state is a pytree of arrays.

    Raises:
      ValueError: there are no layers, fewer than two choices, or costs that are no whole numbers >= 0.
    """

    layers: int
    costs: tuple[int, ...]
    shared: Callable[[Any, int], Any]
    step: Callable[[Any, int, int], Any]
    readout: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"a pattern needs at least one layer; got {self.layers}")
        check_costs(self.costs)

    @property
    def choices(self) -> int:
        """K."""
        return len(self.costs)


def check_costs(costs: Sequence[int]) -> tuple[int, ...]:
    """The costs as a tuple.

    Raises:
      ValueError: fewer than two choices, or costs that are no whole numbers >= 0.
    """
    if len(costs) < 2 or any(cost < 0 or int(cost) != cost for cost in costs):
        raise ValueError(f"costs are whole numbers >= 0, one for each of two choices or more; got {tuple(costs)}")
    return tuple(int(cost) for cost in costs)


def check_budget(budget: int, layers: int, costs: Sequence[int]) -> int:
    """The budget, the most that a pattern may cost.

    Raises:
      TypeError: it is no whole number.
      ValueError: no pattern is so cheap, or the budget exceeds what all layers together can cost.
    """
    costs = check_costs(costs)
    low, high = layers * min(costs), layers * max(costs)
    try:
        budget = operator.index(budget)
    except TypeError as error:
        raise TypeError(f"a budget is a whole number of cost units over all layers; got {budget!r}") from error
    if not low <= budget <= high:
        raise ValueError(
            f"the budget must lie in {low}..{high}, what {layers} layers with costs {costs} can cost; got {budget}"
        )
    return budget


def check_pattern(pattern: Any, layers: int, choices: int) -> np.ndarray:
    """One pattern `[L]` as an array of int32.

    Raises:
      ValueError: its length is not L, or a choice lies outside 0..K-1.
    """
    pattern = np.asarray(pattern)
    if pattern.shape != (layers,):
        raise ValueError(f"a pattern has one choice for each of {layers} layers; got shape {pattern.shape}")
    if pattern.min() < 0 or pattern.max() >= choices:
        raise ValueError(f"choices lie in 0..{choices - 1}; got {pattern.tolist()}")
    return pattern.astype(np.int32)


def all_patterns(layers: int, choices: int) -> np.ndarray:
    """`[P, L]` in the order of the oracle: the first layer's choice changes slowest."""
    return decode(np.arange(choices**layers), layers, choices)


def decode(index: Int[Array, "..."] | np.ndarray, layers: int, choices: int) -> Any:
    """`[..., L]` choices of the patterns with these numbers (NumPy or JAX)."""
    return index[..., None] // choices ** np.arange(layers - 1, -1, -1) % choices


def cost_of(patterns: Any, costs: Sequence[int]) -> np.ndarray:
    """`[...]` what patterns `[..., L]` cost, on the host."""
    return np.asarray(costs)[np.asarray(patterns)].sum(axis=-1)
