# SPDX-License-Identifier: Apache-2.0
"""The staircase MLP at the named shapes against the dense MLP, for several mean shares of units.

`implied` is the dense MLP's multiply-adds over those of the units that rows need, `realised` the measured speedup, sorting and
putting back included; `overhead` is the time of that sorting over the dense MLP's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adaptive import ragged
from experiments import measure
from experiments.bench import kernels
from experiments.bench.flags import floats
from pallas_kernels.ragged_prefix_mlp import specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "vit_base_float32")
    parser.add_argument("--share", type=floats, default=(1.0, 0.5, 0.25), help="mean shares of units needed")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape and share."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        for share in options.share:
            yield _row(options, name, spec, share)


def _row(options: argparse.Namespace, name: str, spec: specs.Spec, share: float) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 5)
    dtype = jnp.dtype(spec.dtype)
    values = jax.random.normal(keys[0], (spec.rows, spec.width), dtype)
    up, down = (0.02 * jax.random.normal(keys[i], (spec.width, spec.hidden), dtype) for i in (1, 2))
    bias, down = 0.02 * jax.random.normal(keys[3], (spec.hidden,), dtype), down.T
    # Each row needs each unit with the same chance.
    need = jax.random.binomial(keys[4], spec.units, share, (spec.rows,)).astype(jnp.int32)

    def staircase(x: Any, need: Any, up: Any, bias: Any, down: Any) -> Any:
        stairs = ragged.Staircase.create(need, spec.units)
        return ragged.ragged_prefix_mlp(x, stairs, up, bias, down, implementation=options.implementation)

    def dense(x: Any, need: Any, up: Any, bias: Any, down: Any) -> Any:
        return jax.nn.gelu(x @ up + bias, approximate=True) @ down

    def sorting(x: Any, need: Any) -> Any:
        stairs = ragged.Staircase.create(need, spec.units)
        return stairs.unsort(2 * stairs.sort(x))

    weights = (values, need, up, bias, down)
    functions = {
        "staircase": measure.compiled_call(staircase, *weights),
        "dense": measure.compiled_call(dense, *weights),
        "sorting": measure.compiled_call(sorting, values, need),
        "staircase_gradient": measure.compiled_call(_gradient(staircase), *weights),
        "dense_gradient": measure.compiled_call(_gradient(dense), *weights),
    }
    times = kernels.times_of(options, functions)
    shape = f"{spec.rows}x{spec.width}, {spec.units} units of {spec.hidden // spec.units}, share {share}"
    facts = {
        "implied": spec.units / float(jnp.mean(need)),
        "realised": times["dense"].median / times["staircase"].median,
        "realised_gradient": times["dense_gradient"].median / times["staircase_gradient"].median,
        "overhead": times["sorting"].median / times["dense"].median,
    }
    return kernels.row(options, name, spec, shape, times, **facts)


def _gradient(function: Any) -> Any:
    """The forward pass and the gradients of rows and weights."""

    def run(x: Any, need: Any, *weights: Any) -> Any:
        out, pull = jax.vjp(lambda x, *weights: function(x, need, *weights), x, *weights)
        return pull(out)

    return run
