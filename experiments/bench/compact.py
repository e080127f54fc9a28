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
from pallas_kernels.compact import compact, pack, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--spec", default="byt5_small_float32,vit_base_197", help="named shapes, or all")
    parser.add_argument("--implementation", default=None, help="of ours (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name in specs.NAMED if options.spec == "all" else options.spec.split(","):
        yield _row(options, name, specs.NAMED[name])


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
    functions = {form: measure.compiled_call(function, values, keep) for form, function in forms.items()}
    functions |= {f"{form}_both": measure.compiled_call(_both(f), values, keep) for form, f in forms.items()}
    functions["copy"] = measure.compiled_call(lambda x: -x, values[:, : (spec.tokens + spec.slots) // 2])
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2, calls=measure.kernel_calls())
    return {
        "spec": name,
        "shape": f"{spec.batch}x{spec.tokens}x{spec.width} to {spec.slots}",
        "device": measure.device_name(),
        "dtype": spec.dtype,
        "implementation": options.implementation or "best",
        "realised": round(times["argsort_both"].median / times["compact_both"].median, 4),
        "copy_share": round(times["copy"].median / times["compact"].median, 4),
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }


def _both(function: Any) -> Any:
    """The forward pass and the gradient of its rows."""

    def run(x: Any, keep: Any) -> Any:
        out, pull = jax.vjp(lambda x: function(x, keep), x)
        return out, pull(out)

    return run
