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
from pallas_kernels.bipartite_match import bipartite_match, reference, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--spec", default="vit_base_197_float32", help="named shapes, or all")
    parser.add_argument("--implementation", default=None, help="of ours (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name in specs.NAMED if options.spec == "all" else options.spec.split(","):
        yield _row(options, name, specs.NAMED[name])


def _row(options: argparse.Namespace, name: str, spec: specs.Spec) -> dict[str, Any]:
    shape = (spec.batch, spec.tokens, spec.channels)
    metric = jax.random.normal(jax.random.key(0), shape, jnp.dtype(spec.dtype))

    def matched(x: Any) -> Any:
        return bipartite_match(x[:, ::2], x[:, 1::2], implementation=options.implementation)

    def whole(x: Any) -> Any:
        bias = jnp.zeros((spec.batch, spec.tokens // 2))
        return reference.bipartite_match(x[:, ::2], x[:, 1::2], bias, metric="cosine", statistic="best")

    functions = {"match": measure.compiled_call(matched, metric), "matrix": measure.compiled_call(whole, metric)}
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2, calls=measure.kernel_calls())
    return {
        "spec": name,
        "shape": f"{spec.batch}x{spec.tokens}x{spec.channels}, even to odd",
        "device": measure.device_name(),
        "dtype": spec.dtype,
        "implementation": options.implementation or "best",
        "realised": round(times["matrix"].median / times["match"].median, 4),
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }
