# SPDX-License-Identifier: Apache-2.0
"""Throughput of published ViT shapes at 40 % fewer multiply-adds: implied and realised speedup by batch size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from adaptive.rates.schedules import Schedule, Space, cost_of
from experiments import measure
from experiments.studies import tables
from experiments.studies.study import Context
from layers.learned_rates import as_reduce
from layers.vit import ViT

BUDGET = 0.6
SHAPES = ("B/16", "L/16", "H/14")
TITLE = (
    "ViT shapes at 224 x 224 with random weights, a constant number of tokens pruned and as many merged at every layer but the "
    "first, to 60 % of the multiply-adds. Images a second; realised: time of the dense model over that of the reduced one, "
    "interleaved medians. Shapes that a suite leaves out say 'not run'."
)
COLUMNS = (
    tables.Column("shape", "shape"),
    tables.Column("batch", "batch"),
    tables.Column("dtype", "dtype"),
    tables.Column("dense images / s", "dense_rate", 2),
    tables.Column("reduced images / s", "reduced_rate", 2),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
    tables.Column("device", "device"),
)


def schedule_of(model: ViT, budget: float = BUDGET) -> Schedule:
    """Half of what goes is pruned, half merged, about as many at every layer but the first."""
    cost = cost_of(model.spec())
    space = Space(model.depth, model.num_tokens, cost, budget * cost((model.num_tokens,) * model.depth))
    counts = space.linear()
    before = (model.num_tokens, *counts[:-1])
    return Schedule(tuple(n - (n - m) // 2 for n, m in zip(before, counts, strict=True)), counts)


def run(context: Context) -> list[str]:
    """Rows of the suite's shapes, and their table."""
    chosen = dict(context.settings["shapes"])
    if not chosen:
        return []
    config = context.config("diffrate/digits.py")
    rows, made = [], []
    for shape in SHAPES:
        if shape not in chosen:
            rows.append({"group": shape, "shape": shape})
        for batch in chosen.get(shape, ()):
            name = f"shape-{shape.replace('/', '_')}-batch{batch}"
            context.say(f"timing {name}")
            row = context.rows.make(name, config, functools.partial(_measure, context, shape, batch))
            rows.append(row)
            made.append(row["id"])
    tables.write(context.results, "throughput", TITLE, rows, COLUMNS, receipts=())
    return made


def _measure(context: Context, shape: str, batch: int) -> dict[str, Any]:
    """Times one shape at one batch size: float32 on a CPU, bfloat16 elsewhere."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dense = ViT.named(shape, num_classes=1_000, dtype=dtype)
    schedule = schedule_of(dense)
    reduced = dense.clone(hooks=(as_reduce(schedule),))
    images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3), dtype)
    shapes = meta.unbox(jax.eval_shape(dense.init, jax.random.key(0), images))
    variables = measure.random_like(shapes, jax.random.key(1))
    calls = {
        name: measure.compiled_call(lambda v, x, model=model: model.apply(v, x)[0], variables, images)
        for name, model in (("dense", dense), ("reduced", reduced))
    }
    times = measure.interleaved(calls, repeats=context.settings["repeats"])
    cost = cost_of(dense.spec())
    return {
        "group": f"{shape}-{batch}",
        "shape": shape,
        "batch": batch,
        "dtype": jnp.dtype(dtype).name,
        "dense_rate": batch / times["dense"].median,
        "reduced_rate": batch / times["reduced"].median,
        "implied": cost((dense.num_tokens,) * dense.depth) / cost(schedule.counts),
        "realised": times["dense"].median / times["reduced"].median,
        "milliseconds": measure.milliseconds(times),
        "command": f"python -m experiments.reproduce --suite={context.suite} --only={context.name}",
    }
