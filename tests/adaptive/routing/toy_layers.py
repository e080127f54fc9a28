# SPDX-License-Identifier: Apache-2.0
"""A small nonlinear model of layers for the tests of oracles, and its losses by plain loops."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.routing.patterns import Layered

UNITS = (2, 5)


def layered(layers, costs=(0, 0, 1), seed=0, count=None):
    """A model whose layers mix the tokens of a row, then turn each by a matrix of the choice; two arrays of losses."""
    keys = jax.random.split(jax.random.key(seed), 2)
    mix = jax.random.normal(keys[0], (layers, UNITS[1], UNITS[1]))
    turn = jax.random.normal(keys[1], (layers, len(costs), 4, 4))

    def shared(x, layer):
        if count is not None:
            count["shared"] += 1
        return x + 0.5 * jnp.tanh(jnp.einsum("ij,bjd->bid", mix[layer], x))

    def step(x, layer, choice):
        return x + jnp.sin(x @ turn[layer, choice])

    def readout(x):
        token = jnp.sum(jnp.abs(x), axis=-1)
        return {"token": token, "sequence": jnp.mean(token, axis=-1)}

    return Layered(layers, costs, shared, step, readout)


def start():
    return jax.random.normal(jax.random.key(7), (*UNITS, 4))


def run(model, pattern, x):
    """The readout after one pattern."""
    for layer, choice in enumerate(pattern):
        branches = [lambda x, layer=layer, c=c: model.step(x, layer, c) for c in range(model.choices)]
        x = jax.lax.switch(choice, branches, model.shared(x, layer))
    return model.readout(x)


def brute_force(model, every):
    """`{name: [P, *U]}` pattern by pattern."""
    one = jax.jit(lambda x, pattern: run(model, pattern, x))
    found = [one(start(), pattern) for pattern in every]
    return {name: np.stack([np.asarray(one[name]) for one in found]) for name in found[0]}
