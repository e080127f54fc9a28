# SPDX-License-Identifier: Apache-2.0
"""Searches for good patterns where all K^L are too many: greedy, beam and evolutionary, under a budget.

All of them are given `evaluate(patterns [*U, L]) -> losses [*U]`, the loss of each unit on its own pattern. A unit is a
sequence, whose tokens all take its pattern, or a token whose context is that of a fixed reference run; the caller's `evaluate`
decides. Units are searched side by side, and no loss ever ends above that of the start.

Shapes: L layers, K choices, U units (any number of axes), W beams, J candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.routing.patterns import check_budget, check_costs, check_pattern, cost_of

Evaluate = Callable[[Int[Array, "*U L"]], Float[Array, "*U"]]
Found = tuple[Int[Array, "*U L"], Float[Array, "*U"]]


def greedy(
    evaluate: Evaluate,
    start: Sequence[int],
    units: tuple[int, ...],
    budget: int,
    costs: Sequence[int],
    *,
    rounds: int | None = None,
) -> Found:
    """Changes one layer a round, the one that lowers the loss most, as long as the budget holds: `(patterns, losses)`.

    Each round evaluates all L K patterns that differ from the present one in one layer at most.

    Args:
      evaluate: see the head of this module.
      start: pattern `[L]` within the budget; units: shape of U.
      budget: most that a pattern may cost; costs: of each choice.
      rounds: L when None.

    Raises:
      TypeError, ValueError: an impossible budget, or a start that is too long, too short or too dear.
    """
    layers, costs, patterns = _begin(start, units, budget, costs)
    choices = len(costs)
    layer, choice = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(layers), jnp.arange(choices), indexing="ij"))

    def one_round(_: Any, found: Found) -> Found:
        patterns, losses = found

        def changed(number: Array) -> tuple[Array, Array]:
            proposal = patterns.at[..., layer[number]].set(choice[number])
            return proposal, _affordable(evaluate, proposal, budget, costs)

        proposals, values = jax.lax.map(changed, jnp.arange(layers * choices))
        best = jnp.argmin(values, axis=0)
        value = jnp.min(values, axis=0)
        proposal = jnp.take_along_axis(proposals, best[None, ..., None], axis=0)[0]
        return _keep_lower(patterns, losses, proposal, value)

    return jax.lax.fori_loop(0, layers if rounds is None else rounds, one_round, (patterns, evaluate(patterns)))


def beam(
    evaluate: Evaluate,
    start: Sequence[int],
    units: tuple[int, ...],
    budget: int,
    costs: Sequence[int],
    *,
    width: int = 4,
) -> Found:
    """Decides layer by layer and keeps the `width` best beginnings of each unit: `(patterns, losses)`.

    A beginning is judged by the loss of the pattern that goes on with `start`; a budget counts the whole pattern. With K^L
    beams and a start of the lowest cost, this is the exhaustive oracle.

    Args:
      width: W; other arguments and errors are those of `greedy`.

    Raises:
      TypeError, ValueError: as `greedy`, or a width below 1.
    """
    if width < 1:
        raise ValueError(f"a beam search needs at least one beam; got width={width}")
    layers, costs, patterns = _begin(start, units, budget, costs)
    beams, losses = patterns[None], evaluate(patterns)[None]
    for layer in range(layers):
        grown, values = [], []
        for choice in range(len(costs)):
            if choice == int(start[layer]):
                grown, values = [*grown, beams], [*values, losses]
                continue
            proposal = beams.at[..., layer].set(choice)
            grown.append(proposal)
            # A beam that is none (fewer beginnings than beams so far) stays none.
            value = jax.lax.map(lambda one: _affordable(evaluate, one, budget, costs), proposal)
            values.append(jnp.where(jnp.isinf(losses), jnp.inf, value))
        grown, values = jnp.concatenate(grown), jnp.concatenate(values)
        kept = jnp.argsort(values, axis=0, stable=True)[:width]
        beams = jnp.take_along_axis(grown, kept[..., None], axis=0)
        losses = jnp.take_along_axis(values, kept, axis=0)
    return beams[0], losses[0]


def evolve(
    evaluate: Evaluate,
    start: Sequence[int],
    units: tuple[int, ...],
    budget: int,
    costs: Sequence[int],
    key: Array,
    *,
    generations: int = 32,
    offspring: int = 8,
) -> Found:
    """(1 + lambda) evolution: each generation mutates the pattern of every unit `offspring` times and keeps the best.

    A mutation makes one to three changes, their number the lower of two draws; a change exchanges the choices of two layers,
    which leaves the cost as it is, or redraws the choice of one. A pattern above the budget is rejected.

    Args:
      key: of the draws; other arguments and errors are those of `greedy`.

    Raises:
      TypeError, ValueError: as `greedy`, or no generation or offspring.

    Source: Sieberling et al. 2024 (EvoPress): (1 + lambda), number of mutations min(U{1..3}, U{1..3}), elitism.

    Differs: one stage of selection on the same data, so that elitism is exact; redrawing a choice, since costs need not grow
    by the level.
    """
    if generations < 1 or offspring < 1:
        raise ValueError(f"generations and offspring must be at least 1; got {generations} and {offspring}")
    _, costs, patterns = _begin(start, units, budget, costs)

    def generation(found: Found, key: Array) -> tuple[Found, None]:
        patterns, losses = found

        def child(key: Array) -> tuple[Array, Array]:
            proposal = _mutate(patterns, key, len(costs))
            return proposal, _affordable(evaluate, proposal, budget, costs)

        proposals, values = jax.lax.map(child, jax.random.split(key, offspring))
        best = jnp.argmin(values, axis=0)
        proposal = jnp.take_along_axis(proposals, best[None, ..., None], axis=0)[0]
        return _keep_lower(patterns, losses, proposal, jnp.min(values, axis=0)), None

    return jax.lax.scan(generation, (patterns, evaluate(patterns)), jax.random.split(key, generations))[0]


def _begin(start: Sequence[int], units: tuple[int, ...], budget: int, costs: Sequence[int]) -> tuple[int, tuple, Array]:
    """`(L, costs, patterns [*U, L])` after all checks."""
    costs = check_costs(costs)
    pattern = check_pattern(start, len(start), len(costs))
    budget = check_budget(budget, len(pattern), costs)
    if cost_of(pattern, costs) > budget:
        raise ValueError(f"the start {pattern.tolist()} costs {cost_of(pattern, costs)}, above the budget of {budget}")
    return len(pattern), costs, jnp.broadcast_to(pattern, (*units, len(pattern)))


def _affordable(evaluate: Evaluate, patterns: Array, budget: int, costs: tuple[int, ...]) -> Array:
    """Losses, inf above the budget."""
    cost = jnp.sum(jnp.asarray(costs)[patterns], axis=-1)
    return jnp.where(cost <= budget, evaluate(patterns), jnp.inf)


def _keep_lower(patterns: Array, losses: Array, proposal: Array, value: Array) -> Found:
    better = value < losses
    return jnp.where(better[..., None], proposal, patterns), jnp.where(better, value, losses)


def _mutate(patterns: Array, key: Array, choices: int) -> Array:
    """Patterns `[*U, L]` with one to three changes each."""
    units, layers = patterns.shape[:-1], patterns.shape[-1]
    count_key, key = jax.random.split(key)
    count = jnp.min(jax.random.randint(count_key, (2, *units), 1, 4), axis=0)

    def change(step: Any, patterns: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        first, second = (jax.random.randint(k, (*units, 1), 0, layers) for k in keys[:2])
        redraw_key, kind_key = jax.random.split(keys[2])
        place = jnp.arange(layers)
        at_first, at_second = (jnp.take_along_axis(patterns, where, axis=-1) for where in (first, second))
        swapped = jnp.where(place == first, at_second, jnp.where(place == second, at_first, patterns))
        drawn = jax.random.randint(redraw_key, (*units, 1), 0, choices)
        redrawn = jnp.where(place == first, drawn, patterns)
        changed = jnp.where(jax.random.bernoulli(kind_key, 0.5, (*units, 1)), swapped, redrawn)
        return jnp.where((step < count)[..., None], changed, patterns)

    return jax.lax.fori_loop(0, 3, change, patterns)
