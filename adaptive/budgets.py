# SPDX-License-Identifier: Apache-2.0
"""Budgets: how many tokens survive, at one layer and over all layers, as static data.

Letters: L layers, N tokens, r tokens removed at a layer.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import flax.struct


@flax.struct.dataclass
class Threshold:
    """Keep what scores above `value`, at most `cap` tokens.

    Attributes:
      value: score that a token must exceed (may be traced).
      cap: static number of output slots; the rest of them is padding.
    """

    value: float
    cap: int = flax.struct.field(pytree_node=False)


Budget = int | Threshold


def capacity(budget: Budget) -> int:
    """Static number of output slots under `budget`."""
    return budget.cap if isinstance(budget, Threshold) else int(budget)


def check(budget: Budget, length: int, method: str = "the method") -> Budget:
    """`budget` if it fits `length` tokens; an integer of any type comes back as an int.

    Raises:
      TypeError: the budget is neither a whole number nor a threshold.
      ValueError: the number of surviving tokens is not in `1..length`.
    """
    if not isinstance(budget, Threshold):
        try:
            budget = operator.index(budget)
        except TypeError as error:
            raise TypeError(f"{method}: a budget is a whole number of tokens; got {budget!r}") from error
    slots = capacity(budget)
    if not 1 <= slots <= length:
        raise ValueError(
            f"{method}: a budget of {slots} surviving tokens is outside 1..{length}; "
            f"the budget is the number of tokens that survive, not the number removed"
        )
    return budget


def removal_schedule(spec: int | tuple[int, float] | Sequence[int], layers: int) -> tuple[int, ...]:
    """Tokens to remove at each layer, `layers` ints.

    Args:
      spec: `r` for the same number everywhere; `(r, inflection)` with a float inflection in [-1, 1] for a linear ramp whose
        mean is r (-1.0 decreases from 2r to 0, 0.0 is constant, 1.0 increases); or a list of ints, padded with zeros.
      layers: L.

    Raises:
      ValueError: negative numbers, more entries than layers, an inflection outside [-1, 1].

    Source: Bolya et al. 2023 (ToMe), section 4.1 and appendix; `parse_r` of the public code.
    """
    if isinstance(spec, int):
        values = (spec,) * layers
    elif len(spec) == 2 and isinstance(spec[1], float):
        values = _ramp(int(spec[0]), spec[1], layers)
    else:
        values = tuple(int(r) for r in spec)
        if len(values) > layers:
            raise ValueError(f"the schedule has {len(values)} entries for {layers} layers: {values}")
        values += (0,) * (layers - len(values))
    if min(values, default=0) < 0:
        raise ValueError(f"a schedule removes 0 or more tokens at each layer; got {values}")
    return values


def _ramp(mean: int, inflection: float, layers: int) -> tuple[int, ...]:
    if not -1.0 <= inflection <= 1.0:
        raise ValueError(f"the inflection of a schedule lies in [-1, 1]; got {inflection}")
    low = int(mean * (1 - inflection))
    step = (2 * mean - 2 * low) / max(layers - 1, 1)
    return tuple(int(low + step * layer) for layer in range(layers))


def token_counts(
    schedule: Sequence[int], tokens: int, *, protected: int = 0, clamp: bool = False, halving: bool = True
) -> tuple[int, ...]:
    """Tokens left after each layer of a removal schedule.

    Args:
      schedule: tokens removed at each layer.
      tokens: N before the first layer.
      protected: tokens that are never removed (1 with a class token).
      clamp: remove as many as can be removed where the schedule asks for more, and say so in a warning.
      halving: at most half of the unprotected tokens can go at a layer (bipartite matching); False for pruning, which can
        take all but the protected ones and must leave one.

    Raises:
      ValueError: a layer removes more tokens than it can and `clamp` is False.
    """
    counts = []
    for layer, removed in enumerate(schedule):
        free = tokens - protected
        most = max(free // 2 if halving else min(free, tokens - 1), 0)
        if removed > most:
            message = (
                f"layer {layer} is to remove {removed} of {tokens} tokens, "
                f"but at most {most} can go ({protected} protected)"
            )
            if not clamp:
                raise ValueError(f"{message}; lower r, or pass clamp=True to remove {most} there")
            warnings.warn(f"{message}; {most} are removed", stacklevel=2)
        tokens -= min(removed, most)
        counts.append(tokens)
    return tuple(counts)
