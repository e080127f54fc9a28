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
from experiments.bench import kernels
from pallas_kernels.merge import merge, reference, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "vit_base_197_float32")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        yield _row(options, name, spec)


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
        functions[f"{form}_both"] = measure.compiled_call(
            kernels.forward_and_gradient(function), values, assign, weight
        )
    functions["copy"] = measure.compiled_call(lambda x: -x, values[:, : (spec.tokens + spec.slots) // 2])
    times = kernels.times_of(options, functions)
    shape = f"{spec.batch}x{spec.tokens}x{spec.width} to {spec.slots}"
    facts = {
        "realised": times["product_both"].median / times["merge_both"].median,
        "copy_share": times["copy"].median / times["merge"].median,
    }
    return kernels.row(options, name, spec, shape, times, **facts)
