# SPDX-License-Identifier: Apache-2.0
"""Compaction at the named shapes: time against a plain copy and against a gather by argsort and a scatter.

`realised` is the speedup over the argsort gather, forward and backward together; `copy_share` is the time of copying the
rows that compaction must read and write, over the time of compaction.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.bench import kernels
from pallas_kernels.compact import compact, pack, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "byt5_small_float32,vit_base_197")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        yield _row(options, name, spec)


def _row(options: argparse.Namespace, name: str, spec: specs.Spec) -> dict[str, Any]:
    key, gate_key = jax.random.split(jax.random.key(0))
    values = jax.random.normal(key, (spec.batch, spec.tokens, spec.width), jnp.dtype(spec.dtype))
    draw = jax.random.uniform(gate_key, values.shape[:2])
    keep = draw < jnp.sort(draw, axis=-1)[:, spec.slots, None] if spec.slots < spec.tokens else draw >= 0

    def packed(x: Any, keep: Any) -> Any:
        return compact(x, pack(keep, spec.slots), implementation=options.implementation)

    def argsorted(x: Any, keep: Any) -> Any:
        order = jnp.argsort(~keep, axis=-1, stable=True)[:, : spec.slots]
        return jnp.take_along_axis(x, order[..., None], axis=1)

    def scattered(x: Any, keep: Any) -> Any:
        place = jnp.where(keep, jnp.cumsum(keep, axis=-1) - 1, spec.slots)
        out = jnp.zeros((spec.batch, spec.slots, spec.width), x.dtype)
        return out.at[jnp.arange(spec.batch)[:, None], place].set(x, mode="drop")

    forms = {"compact": packed, "argsort": argsorted, "scatter": scattered}
    both = {f"{form}_both": kernels.forward_and_gradient(function) for form, function in forms.items()}
    functions = {form: measure.compiled_call(function, values, keep) for form, function in (forms | both).items()}
    functions["copy"] = measure.compiled_call(lambda x: -x, values[:, : (spec.tokens + spec.slots) // 2])
    times = kernels.times_of(options, functions)
    shape = f"{spec.batch}x{spec.tokens}x{spec.width} to {spec.slots}"
    facts = {
        "realised": times["argsort_both"].median / times["compact_both"].median,
        "copy_share": times["copy"].median / times["compact"].median,
    }
    return kernels.row(options, name, spec, shape, times, **facts)
