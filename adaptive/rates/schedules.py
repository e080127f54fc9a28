# SPDX-License-Identifier: Apache-2.0
"""Schedules: how many tokens each layer keeps by pruning and by merging, as static ints, and families of them.

Letters: L layers, N tokens with the class token, F multiply-adds of one image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tokens left at each layer, the class token included.

    Attributes:
      prune: after pruning; merge: after merging what pruning left. A number above what there is changes nothing.

    Raises:
      ValueError: the two differ in length, or a number is below 1.
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.prune) != len(self.merge):
            raise ValueError(f"a schedule has one number a layer for both; got {len(self.prune)} and {len(self.merge)}")
        for name in ("prune", "merge"):
            object.__setattr__(self, name, tuple(int(number) for number in getattr(self, name)))
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"every layer keeps at least 1 token; got {name}={getattr(self, name)}")

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Schedule:
        """A schedule of one operation: `counts` tokens after each layer, however they come about."""
        return cls(tuple(counts), tuple(counts))

    @classmethod
    def split(cls, counts: Sequence[int], tokens: int, pruned: float) -> Schedule:
        """`counts` tokens after each layer of a model of `tokens`; of those that go, the share `pruned` is pruned.

        Raises:
          ValueError: a share outside [0, 1].
        """
        if not 0.0 <= pruned <= 1.0:
            raise ValueError(f"pruned={pruned} is the share of removed tokens that is pruned, in [0, 1]")
        before = (tokens, *counts[:-1])
        prune = (n - round(pruned * (n - m)) for n, m in zip(before, counts, strict=True))
        return cls(tuple(prune), tuple(counts))

    def on(self, tokens: int) -> Schedule:
        """The same for a model of `tokens`: numbers that exceed what is there are replaced by it."""
        prune, merge, now = [], [], tokens
        for pruned, merged in zip(self.prune, self.merge, strict=True):
            prune.append(min(now, pruned))
            now = min(prune[-1], merged)
            merge.append(now)
        return Schedule(tuple(prune), tuple(merge))

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens after each layer."""
        return self.merge

    def check(self, layers: int, tokens: int) -> Schedule:
        """This schedule `on(tokens)`, if it fits a backbone of `layers` layers.

        Raises:
          ValueError: another number of layers, or more tokens than there are.
        """
        if len(self.merge) != layers:
            raise ValueError(f"the schedule has {len(self.merge)} layers and the backbone {layers}: {self.merge}")
        if max(self.prune + self.merge) > tokens:
            raise ValueError(f"the schedule keeps up to {max(self.prune + self.merge)} tokens of {tokens}: {self}")
        return self.on(tokens)


Cost = Callable[[tuple[int, ...]], float]


def cost_of(spec: Any) -> Cost:
    """`counts -> F` of a spec of `adaptive.flops`."""
    return lambda counts: float(sum(spec.macs(counts=counts).values()))


@dataclasses.dataclass(frozen=True)
class Space:
    """The schedules that a search may choose: non-increasing counts under a budget.

    Attributes:
      layers, tokens: L and N.
      cost: F of counts; it must grow with every count.
      budget: highest F.
      least: fewest tokens of a layer.
      first: layers from 0 on that keep all.
      halving: at most half of the tokens (the class token not counted) can go at one layer, as bipartite matching has it.

    Raises:
      ValueError: no schedule meets the budget.
    """

    layers: int
    tokens: int
    cost: Cost
    budget: float
    least: int = 2
    first: int = 1
    halving: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.tokens or not 0 <= self.first < self.layers:
            raise ValueError(
                f"least={self.least} must lie in 1..{self.tokens} and first={self.first} in 0..{self.layers - 1}"
            )
        low, high = self.cost(self.smallest), self.cost((self.tokens,) * self.layers)
        if not low <= self.budget:
            raise ValueError(
                f"no schedule meets a budget of {self.budget:.6g} multiply-adds: the smallest, {self.smallest}, needs "
                f"{low:.6g} and the dense model {high:.6g}. Raise the budget, or lower "
                f"least={self.least} or first={self.first}."
            )

    @property
    def smallest(self) -> tuple[int, ...]:
        """The fewest tokens at every layer."""
        return self.repair((self.least,) * self.layers)

    def repair(self, counts: Sequence[float]) -> tuple[int, ...]:
        """The nearest counts of the space from above: whole, non-increasing, first layers whole, halving obeyed."""
        fixed, now = [], self.tokens
        for layer, count in enumerate(counts):
            floor = self.least if not self.halving else max(self.least, now - (now - 1) // 2)
            wanted = now if layer < self.first else math.ceil(count - 1e-6)
            now = min(now, max(wanted, floor))
            fixed.append(now)
        return tuple(fixed)

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether the counts belong to the space and meet the budget."""
        return self.repair(counts) == tuple(counts) and self.cost(tuple(counts)) <= self.budget

    def fill(self, family: Callable[[float], Sequence[float]]) -> tuple[int, ...]:
        """The costliest member of a one-parameter family that meets the budget.

        Args:
          family: `scale in [0, 1] -> counts`, growing in every layer; repaired before they are costed.

        Then tokens are given back one at a time, last layer first, while the budget allows, so that schedules of one budget
        differ by less than a token of one layer.
        """
        low, high = 0.0, 1.0
        if self.cost(self.repair(family(high))) <= self.budget:
            return self.top_up(self.repair(family(high)))
        for _ in range(40):
            middle = 0.5 * (low + high)
            within = self.cost(self.repair(family(middle))) <= self.budget
            low, high = (middle, high) if within else (low, middle)
        best = self.repair(family(low))
        if self.cost(best) > self.budget:
            best = self.smallest
        return self.top_up(best)

    def top_up(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Adds single tokens where the budget allows, the deepest layers first."""
        counts = tuple(counts)
        while True:
            for layer in range(self.layers - 1, -1, -1):
                more = (*counts[:layer], counts[layer] + 1, *counts[layer + 1 :])
                if more[layer] <= self.tokens and self.fits(more):
                    counts = more
                    break
            else:
                return counts

    def linear(self) -> tuple[int, ...]:
        """The uniform schedule: about the same number of tokens goes at every layer that compresses (ToMe's constant r)."""

        def family(scale: float) -> list[float]:
            removed = (1 - scale) * self.tokens
            return [self.tokens - removed * max(layer + 1 - self.first, 0) for layer in range(self.layers)]

        return self.fill(family)

    def level(self) -> tuple[int, ...]:
        """All that goes, goes at the first layer that compresses."""
        return self.fill(lambda scale: [scale * self.tokens] * self.layers)

    def random(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A schedule whose share of tokens lost at each layer is drawn uniformly from the simplex."""
        share = np.cumsum(rng.dirichlet(np.ones(self.layers - self.first)))
        depth = np.concatenate([np.zeros(self.first), share])
        return self.fill(lambda scale: list(self.tokens - (1 - scale) * self.tokens * depth * self.layers))
