# SPDX-License-Identifier: Apache-2.0
"""Merging at the named shapes: time against the product with the whole matrix and against a plain copy.

`realised` is the speedup over the product with the M x N matrix, forward and backward together; `copy_share` is the time of
copying the rows that merging must read and write, over the time of merging.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from pallas_kernels.merge import merge, reference, specs


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
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.random.normal(keys[0], (spec.batch, spec.tokens, spec.width), jnp.dtype(spec.dtype))
    # The first M tokens head a slot each, the others join any; which ones they are changes no time.
    joined = jax.random.randint(keys[1], (spec.batch, spec.tokens - spec.slots), 0, spec.slots)
    heads = jnp.broadcast_to(jnp.arange(spec.slots), (spec.batch, spec.slots))
    assign = jnp.concatenate([heads, joined], axis=1).astype(jnp.int32)
    weight = jax.random.uniform(keys[2], assign.shape)

    def merged(x: Any, assign: Any, weight: Any) -> Any:
        return merge(x, assign, weight, spec.slots, implementation=options.implementation)

    def product(x: Any, assign: Any, weight: Any) -> Any:
        return reference.merge(x, assign, weight, spec.slots)

    functions = {}
    for form, function in (("merge", merged), ("product", product)):
        functions[form] = measure.compiled_call(function, values, assign, weight)
        functions[f"{form}_both"] = measure.compiled_call(_both(function), values, assign, weight)
    functions["copy"] = measure.compiled_call(lambda x: -x, values[:, : (spec.tokens + spec.slots) // 2])
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2, calls=measure.kernel_calls())
    return {
        "spec": name,
        "shape": f"{spec.batch}x{spec.tokens}x{spec.width} to {spec.slots}",
        "device": measure.device_name(),
        "dtype": spec.dtype,
        "implementation": options.implementation or "best",
        "realised": round(times["product_both"].median / times["merge_both"].median, 4),
        "copy_share": round(times["copy"].median / times["merge"].median, 4),
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }


def _both(function: Any) -> Any:
    """The forward pass and the gradient of its rows."""

    def run(x: Any, assign: Any, weight: Any) -> Any:
        out, pull = jax.vjp(lambda x: function(x, assign, weight), x)
        return out, pull(out)

    return run
