# SPDX-License-Identifier: Apache-2.0
"""Searches for per-layer token counts: they propose counts and are told a loss, lower is better.

Every search is a function of a `Space`, an `evaluate` and a seed, and proposes the same counts again when it runs again. So an
`evaluate` that remembers (`experiments.search.Objective`) makes it resumable, and never computes anything twice.

Letters: L layers, N tokens with the class token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from adaptive.rates.schedules import Space

Counts = tuple[int, ...]


class Evaluate(Protocol):
    """A loss of counts on a calibration set."""

    def __call__(self, counts: Counts, share: float = 1.0) -> float:
        """The mean loss over the first `share` of the calibration set."""
        ...


def uniform_search(space: Space, evaluate: Evaluate) -> Counts:
    """The baseline that searches nothing: `Space.linear`."""
    counts = space.linear()
    evaluate(counts)
    return counts


def random_search(space: Space, evaluate: Evaluate, *, trials: int, seed: int) -> Counts:
    """The best of `trials` different random schedules that spend the budget."""
    rng, seen = np.random.default_rng(seed), {}
    # A small space may hold fewer schedules than trials.
    for _ in range(20 * trials):
        counts = space.random(rng)
        if counts not in seen:
            seen[counts] = evaluate(counts)
        if len(seen) == trials:
            break
    return min(seen, key=seen.__getitem__)


def g_search(space: Space, evaluate: Evaluate, *, tolerance: float) -> Counts:
    """The fewest tokens of each layer, from shallow to deep, that raise the loss by at most `tolerance`.

    At layer l a binary search finds the least k such that the model with the counts found so far, and k at l and all deeper
    layers, stays within the tolerance of the dense loss. About L log2 N evaluations; the budget of the space is not looked at.

    Raises:
      ValueError: a negative tolerance.

    Source: Zhao et al. 2024 (arXiv:2412.00556), G-Search, Scenario I. Only the abstract was at hand, so this is a
      reconstruction: counts do not increase with depth, which is what lets all deeper layers share k.
    Differs: the tolerance is in units of the loss, not a share of an accuracy.
    """
    if tolerance < 0:
        raise ValueError(f"the tolerance is a rise of the loss and must be at least 0; got {tolerance}")
    counts = (space.tokens,) * space.layers
    limit = evaluate(counts) + tolerance
    for layer in range(space.first, space.layers):
        low, high = space.repair((*counts[:layer], *(space.least,) * (space.layers - layer)))[layer], counts[layer]
        while low < high:
            middle = (low + high) // 2
            tried = space.repair((*counts[:layer], *(middle,) * (space.layers - layer)))
            low, high = (low, middle) if evaluate(tried) <= limit else (middle + 1, high)
        counts = space.repair((*counts[:layer], *(high,) * (space.layers - layer)))
    return counts


def g_search_budget(space: Space, evaluate: Evaluate, *, rounds: int = 6, highest: float = 1.0) -> Counts:
    """`g_search` at the least tolerance whose schedule meets the budget, found by bisection; unspent budget is given back.

    Raises:
      ValueError: even the tolerance `highest` does not lead to a schedule within the budget.
    """
    best = g_search(space, evaluate, tolerance=highest)
    if space.cost(best) > space.budget:
        raise ValueError(
            f"at a tolerance of {highest} G-Search still spends {space.cost(best):.6g} of a budget of {space.budget:.6g}; "
            "raise the highest tolerance"
        )
    low, high = 0.0, highest
    for _ in range(rounds):
        # The rise of the loss spans orders of magnitude, so the middle is closer to its lower end.
        middle = 0.25 * high if low == 0.0 else math.sqrt(low * high)
        counts = g_search(space, evaluate, tolerance=middle)
        if space.cost(counts) <= space.budget:
            best, high = counts, middle
        else:
            low = middle
    filled = space.top_up(best)
    evaluate(filled)
    return filled


def sigmoid_family(space: Space, steepness: float, least: float) -> Counts:
    """Counts along a falling sigmoid that spend the budget.

    The share kept at layer l is `least + (1 - least) / (1 + exp(steepness (l - centre)))`; the centre follows from the budget.

    Args:
      steepness: s per layer, >= 0; least: the share that the curve falls to, in [0, 1].

    Source: Zhao et al. 2024 (arXiv:2412.00556), P-Sigmoid; the parametrisation is a reconstruction.
    """
    reach = 20.0 / max(steepness, 0.05)

    def family(scale: float) -> list[float]:
        centre = -reach + scale * (space.layers + 2 * reach)
        exponents = [min(steepness * (layer - centre), 60.0) for layer in range(space.layers)]
        return [space.tokens * (least + (1 - least) / (1 + math.exp(exponent))) for exponent in exponents]

    return space.fill(family)


Point = tuple[float, float]
Suggest = Callable[[Sequence[tuple[Point, float]]], Point]
SIGMOID_BOUNDS = {"steepness": (0.1, 4.0), "least": (0.0, 0.9)}


def p_sigmoid(space: Space, evaluate: Evaluate, *, trials: int, suggest: Suggest) -> Counts:
    """The best sigmoid schedule of the budget, its two parameters chosen by a Bayesian optimiser.

    Args:
      trials: proposals; those whose rounded counts were seen before are told to the optimiser and cost nothing.
      suggest: `[((steepness, least), loss), ...] -> (steepness, least)` within `SIGMOID_BOUNDS`; the same for the same history.

    Source: Zhao et al. 2024 (arXiv:2412.00556), P-Sigmoid, Scenario II; a reconstruction from the abstract.
    """
    told: list[tuple[Point, float]] = []
    seen: dict[Counts, float] = {}
    for _ in range(trials):
        point = suggest(told)
        counts = sigmoid_family(space, *point)
        if counts not in seen:
            seen[counts] = evaluate(counts)
        told.append((point, seen[counts]))
    return min(seen, key=seen.__getitem__)


def evopress(
    space: Space,
    evaluate: Evaluate,
    *,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[float, int]] = ((0.25, 4), (1.0, 1)),
    step: int | None = None,
    seed: int,
) -> Counts:
    """Evolutionary search with level switches and selection in stages of growing calibration sets.

    From the uniform schedule, each generation makes `offspring` mutants of the parent: f = min(U1, U2) level switches with U
    uniform in {1, 2, 3}, each of which lets `step` tokens go at one layer that went at another, followed by what the budget
    asks for. Each stage keeps the best of those that are left; the parent joins the last one.

    Args:
      stages: `(share of the calibration set, survivors)`; the last share is 1 and leaves one.
      step: tokens of a level switch; N / 16 when None.

    Raises:
      ValueError: stages that do not end with one survivor of the whole set.

    Source: Sieberling et al. 2024 (EvoPress, arXiv:2410.14649), algorithm 1; the mutation is that of the public code.
    Differs: stages look at the first share of one calibration set rather than at a fresh draw, so that fitness has no noise, no
      schedule is evaluated twice, and the parent never gets worse; levels are removed tokens, whose price depends on the layer,
      so that a mutant is brought back to the budget by single tokens.
    """
    if not stages or stages[-1] != (1.0, 1):
        raise ValueError(f"the last stage must be (1.0, 1): the whole calibration set, one survivor; got {stages}")
    rng = np.random.default_rng(seed)
    step = max(space.tokens // 16, 1) if step is None else step
    parent = space.linear()
    evaluate(parent)
    tried = {parent}
    for _ in range(generations):
        brood: list[Counts] = []
        for _ in range(20 * offspring):
            child = _mutant(space, parent, step, rng)
            if child not in tried:
                tried.add(child)
                brood.append(child)
            if len(brood) == offspring:
                break
        for share, survivors in stages[:-1]:
            brood = sorted(brood, key=lambda counts, share=share: evaluate(counts, share))[:survivors]
        parent = min([parent, *brood], key=evaluate)
    return parent


def _mutant(space: Space, counts: Counts, step: int, rng: np.random.Generator) -> Counts:
    """A few level switches, then single tokens until the budget holds and is spent."""
    removed = -np.diff([space.tokens, *counts])
    layers = np.arange(space.first, space.layers)
    for _ in range(min(rng.integers(1, 4, 2))):
        source, target = rng.choice(layers, 2)
        moved = min(step, removed[source])
        removed[source] -= moved
        removed[target] += moved
    child = space.repair(space.tokens - np.cumsum(removed))
    while space.cost(child) > space.budget:
        layer = rng.choice(layers)
        child = space.repair([count - (place >= layer) for place, count in enumerate(child)])
    return space.top_up(child)
