# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching at the named shapes against the whole matrix of similarities.

`realised` is the speedup over making the matrix and searching its rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.bench import kernels
from pallas_kernels.bipartite_match import bipartite_match, reference, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "vit_base_197_float32")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        yield _row(options, name, spec)


def _row(options: argparse.Namespace, name: str, spec: specs.Spec) -> dict[str, Any]:
    shape = (spec.batch, spec.tokens, spec.channels)
    metric = jax.random.normal(jax.random.key(0), shape, jnp.dtype(spec.dtype))

    def matched(x: Any) -> Any:
        return bipartite_match(x[:, ::2], x[:, 1::2], implementation=options.implementation)

    def whole(x: Any) -> Any:
        bias = jnp.zeros((spec.batch, spec.tokens // 2))
        return reference.bipartite_match(x[:, ::2], x[:, 1::2], bias, metric="cosine", statistic="best")

    functions = {"match": measure.compiled_call(matched, metric), "matrix": measure.compiled_call(whole, metric)}
    times = kernels.times_of(options, functions)
    shape = f"{spec.batch}x{spec.tokens}x{spec.channels}, even to odd"
    return kernels.row(options, name, spec, shape, times, realised=times["matrix"].median / times["match"].median)
