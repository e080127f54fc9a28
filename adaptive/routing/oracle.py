# SPDX-License-Identifier: Apache-2.0
"""The exhaustive oracle: the losses of all K^L patterns, with the layers of a common prefix run once.

Patterns form a tree. Each inner node runs the shared part of its layer once and then each choice, so that a model of L layers
needs (K^L - 1) / (K - 1) shared parts in place of L K^L. The tree is walked depth first in blocks: a block is expanded
breadth first to at most `capacity` states, which is the batch that every matrix product sees; then its states go one by one
into the next block. Memory holds one block for each L / log_K(capacity) layers, however many patterns there are.

What a token's pattern means is up to the model's steps. Where they run a pattern for all tokens of a sequence, the losses of
a token are those in a context that took the same pattern (reading A of the method card, the default of the study). Where they
attend to the keys and values of another run, only this token changes its path.

Shapes: L layers, K choices, P = K^L patterns, U units, C costs 0..max.

Source: Alizadeh et al. 2024 (Duo-LLM), stage 2.

Differs: the paper does not say which patterns earlier tokens take, nor how its oracle is computed; both are reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adaptive.routing import patterns as pattern_lib
from adaptive.routing.patterns import Layered


@flax.struct.dataclass
class Best:
    """The best pattern of each unit at each cost.

    Attributes:
      loss: `[C, *U]`, inf where no pattern has that cost.
      index: `[C, *U]` number of the pattern, as in `patterns.all_patterns`; the lowest among equals, -1 for none.
    """

    loss: Float[Array, "C *U"]
    index: Int[Array, "C *U"]

    def within(self) -> Best:
        """The best pattern that costs at most as much, in place of exactly."""

        def better(first: Best, second: Best) -> Best:
            return _lower(first, second.loss, second.index)

        return jax.lax.associative_scan(better, self)


def exhaustive(model: Layered, state: Any, *, capacity: int = 81) -> Any:
    """For each array of losses that the readout gives, the `Best` patterns of its elements at every cost, over all patterns.

    Args:
      model: the layers.
      state: before the first layer.
      capacity: most states in a block, at least K.

    Raises:
      ValueError: the capacity is below K, or the patterns are too many for their numbers (2^31).
    """
    highest = model.layers * max(model.costs)

    def visit(best: Any, losses: Any, first: Array, spent: Array, costs: np.ndarray) -> tuple[Any, None]:
        return jax.tree.map(lambda old, new: _meet(old, new, first, spent, costs), best, losses, is_leaf=_is_best), None

    def empty(unit: jax.ShapeDtypeStruct) -> Best:
        shape = (highest + 1, *unit.shape)
        return Best(jnp.full(shape, jnp.inf, unit.dtype), jnp.full(shape, -1, jnp.int32))

    best = jax.tree.map(empty, jax.eval_shape(model.readout, _after_layers(model, state)))
    return _walk(model, state, _blocks(model, capacity), visit, best)[0]


def all_losses(model: Layered, state: Any, *, capacity: int = 81) -> Any:
    """The readout's losses of every pattern, `[P, *U]` each, in the order of `patterns.all_patterns`; arguments as above."""

    def visit(carry: None, losses: Any, first: Array, spent: Array, costs: np.ndarray) -> tuple[None, Any]:
        del first, spent, costs
        return carry, losses

    blocks = _blocks(model, capacity)
    found = _walk(model, state, blocks, visit, None)[1]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(blocks) :]), found)


def best_by_cost(losses: Float[Array, "P *U"], costs: np.ndarray) -> Best:
    """The `Best` patterns from the losses of all, whose `costs [P]` are known: what `exhaustive` gives without keeping them.

    Raises:
      ValueError: there is not one cost for each pattern.
    """
    if costs.shape != (losses.shape[0],):
        raise ValueError(f"one cost for each of {losses.shape[0]} patterns is needed; got shape {costs.shape}")
    shape = (int(costs.max()) + 1, *losses.shape[1:])
    empty = Best(jnp.full(shape, jnp.inf, losses.dtype), jnp.full(shape, -1, jnp.int32))
    return _meet(empty, losses, jnp.int32(0), jnp.int32(0), costs)


def shuffled(labels: Int[Array, "..."], key: Array) -> Int[Array, "..."]:
    """All labels in a random order: the control that shows how low a minimum over patterns gets without signal."""
    return jax.random.permutation(key, labels.reshape(-1)).reshape(labels.shape)


# --- The walk -------------------------------------------------------------------------------------------------------


def _blocks(model: Layered, capacity: int) -> tuple[int, ...]:
    """How many layers each block expands, as even as can be."""
    if capacity < model.choices:
        raise ValueError(f"a block holds at least the {model.choices} choices of one layer; got capacity={capacity}")
    if model.choices**model.layers >= 2**31:
        raise ValueError(
            f"{model.choices}^{model.layers} patterns are too many to number in int32; search with beam, greedy or evolve"
        )
    # Whole powers in integers: a logarithm rounds.
    depth = next(d for d in range(model.layers, 0, -1) if model.choices**d <= capacity)
    count = math.ceil(model.layers / depth)
    return tuple(len(part) for part in np.array_split(np.arange(model.layers), count))


def _walk(model: Layered, state: Any, blocks: tuple[int, ...], visit: Callable[..., Any], carry: Any) -> Any:
    """`(carry, outputs)` of `visit` over the leaves of each last block, in the order of the patterns."""

    def below(carry: Any, state: Any, block: int, layer: int, index: Array, spent: Array) -> tuple[Any, Any]:
        states = jax.tree.map(lambda x: x[None], state)
        for deeper in range(layer, layer + blocks[block]):
            states = _expand(model, states, deeper)
        costs = pattern_lib.cost_of(pattern_lib.all_patterns(blocks[block], model.choices), model.costs)
        first = index * len(costs)
        if block + 1 == len(blocks):
            return visit(carry, jax.vmap(model.readout)(states), first, spent, costs)

        def one(carry: Any, item: Any) -> tuple[Any, Any]:
            return below(carry, item[0], block + 1, layer + blocks[block], item[1], item[2])

        numbers = first + jnp.arange(len(costs), dtype=jnp.int32)
        return jax.lax.scan(one, carry, (states, numbers, spent + jnp.asarray(costs, jnp.int32)))

    return below(carry, state, 0, 0, jnp.int32(0), jnp.int32(0))


def _expand(model: Layered, states: Any, layer: int) -> Any:
    """States `[F, ...]` before a layer to `[F K, ...]` after it; the children of a state stand side by side."""
    shared = jax.vmap(lambda state: model.shared(state, layer))(states)
    children = [
        jax.vmap(lambda state, choice=choice: model.step(state, layer, choice))(shared)
        for choice in range(model.choices)
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *children)


def _after_layers(model: Layered, state: Any) -> Any:
    """Shapes of the state after the last layer."""

    def first_pattern(state: Any) -> Any:
        for layer in range(model.layers):
            state = model.step(model.shared(state, layer), layer, 0)
        return state

    return jax.eval_shape(first_pattern, state)


def _meet(best: Best, losses: Array, first: Array, spent: Array, costs: np.ndarray) -> Best:
    """`best` with patterns `first`, `first + 1`, ... of cost `spent + costs` taken into account."""
    for cost in np.unique(costs):
        members = np.flatnonzero(costs == cost)
        chosen = losses[members]
        lowest, number = jnp.min(chosen, axis=0), first + jnp.asarray(members, jnp.int32)[jnp.argmin(chosen, axis=0)]
        met = _lower(jax.tree.map(lambda x, cost=cost: x[spent + cost], best), lowest, number)
        best = jax.tree.map(lambda whole, part, cost=cost: whole.at[spent + cost].set(part), best, met)
    return best


def _lower(best: Best, loss: Array, index: Array) -> Best:
    """The lower of two losses; the first of equal ones."""
    better = loss < best.loss
    return Best(jnp.where(better, loss, best.loss), jnp.where(better, index, best.index))


def _is_best(value: Any) -> bool:
    return isinstance(value, Best)
