# SPDX-License-Identifier: Apache-2.0
"""Throughput of published ViT shapes at 40 % fewer multiply-adds: implied and realised speedup by batch size."""

from __future__ import annotations

from typing import Any

import jax

from experiments.bench import vit
from experiments.bench.diffrate import schedule_of
from experiments.studies import tables
from experiments.studies.study import Context
from layers.learned_rates import as_reduce
from layers.vit import ViT

BUDGET = 0.6
SHAPES = ("B/16", "L/16", "H/14")
TITLE = (
    "ViT shapes at 224 x 224 with random weights, about as many tokens removed at every layer but the first, half of them "
    "pruned and half merged, to 60 % of the multiply-adds. Images a second; realised: time of the dense model over that of the "
    "reduced one, interleaved medians; matching and merging: time of one reduction at full length over that of one dense "
    "block. Shapes that a suite leaves out say 'not run'."
)
COLUMNS = (
    tables.Column("shape", "shape"),
    tables.Column("batch", "batch"),
    tables.Column("dtype", "dtype"),
    tables.Column("dense images / s", "dense_rate", 2),
    tables.Column("reduced images / s", "reduced_rate", 2),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
    tables.Column("realised / implied", "realised_share", 2),
    tables.Column("matching and merging, % of a block", lambda row: _percent(row.get("overhead")), 1),
    tables.Column("repeats", "repeats"),
    tables.Column("device", "device"),
)


def run(context: Context) -> list[str]:
    """Rows of the suite's shapes, and their table; returns the ids of the rows."""
    settings = context.settings["shapes"]
    if not settings:
        return []
    config = context.config("diffrate/digits.py")
    rows, made = [], []
    for shape in SHAPES:
        if shape not in settings["batches"]:
            rows.append({"group": shape, "shape": shape})
        for batch in settings["batches"].get(shape, ()):
            name = f"shape-{shape.replace('/', '_')}-batch{batch}"
            row = context.rows.make(name, config, lambda shape=shape, batch=batch: _measure(context, shape, batch))
            rows.append(row)
            made.append(row["id"])
    tables.write(context.results, "throughput", TITLE, rows, COLUMNS, receipts=())
    return made


def _measure(context: Context, shape: str, batch: int) -> dict[str, Any]:
    """Times one shape at one batch size: float32 on a CPU, bfloat16 elsewhere."""
    context.say(f"timing {shape} at batch {batch}")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dense = ViT.named(shape, num_classes=1_000, dtype=dtype)
    hook = as_reduce(schedule_of(dense, BUDGET))
    repeats = context.settings["shapes"]["repeats"]
    row = vit.row(shape, dense, hook, vit.random_params(dense), batch, repeats)
    rates = row.pop("images_per_second")
    command = (
        f"python -m experiments.bench diffrate --variant={shape} --batch={batch} --dtype={dtype} --repeats={repeats}"
    )
    return row | {
        "group": f"{shape}-{batch}",
        "shape": shape,
        "batch": batch,
        "dense_rate": rates["dense"],
        "reduced_rate": rates["reduced"],
        "command": command,
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
