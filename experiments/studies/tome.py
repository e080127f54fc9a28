# SPDX-License-Identifier: Apache-2.0
"""ToMe against random and class-attention pruning on one ViT, without training for any of them.

Trains the ViT of `configs/tome/digits.py` (dense), then applies each method at each rate in every layer: accuracy, tokens left,
FLOPs, implied and realised speedup, and a picture of which patches share a token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import data, tasks, train
from experiments.evaluate import assess
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.study import Context
from experiments.tasks.models import with_reduction
from experiments.train import TrainResult

METHODS = ("tome", "evit", "class_attention", "random")

# `rates`: tokens removed in every layer. `batches` of the test split are evaluated; 0: all.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(seeds=(0,), overrides={"steps": 1_000}, rates=(2, 4, 6, 8, 9), batches=32, repeats=5),
    "quick": dict(seeds=(0, 1, 2), overrides={"steps": 2_000}, rates=(2, 4, 6, 8, 9), batches=0, repeats=7),
    "full": dict(
        seeds=(0, 1, 2),
        overrides={
            "steps": 30_000,
            "batch_size": 256,
            "model.width": 384,
            "model.depth": 12,
            "model.heads": 6,
            "model.mlp_dim": 1_536,
            "data.image_size": 128,
            "data.examples": 200_000,
            "data.cache": False,
        },
        rates=(4, 8, 12, 16, 20),
        batches=0,
        repeats=15,
    ),
}

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("r", "r"),
    tables.Column("accuracy %", "accuracy", 2),
    tables.Column("tokens left", "tokens_left", 1),
    tables.Column("MMACs / image", "mmacs", 1),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)


def run(context: Context) -> None:
    """Trains, evaluates every method and rate, and writes the table, the plot and the picture."""
    rows, made = context.rows, []
    for seed in context.settings["seeds"]:
        config = apply_overrides(context.config("tome/digits.py"), {**context.settings["overrides"], "seed": seed})
        name = f"vit_seed{seed}"
        result = context.train(name, config)
        setups = [("dense", 0), *((method, r) for method in METHODS for r in context.settings["rates"])]
        for method, removed in setups:
            identifier = f"{method}-r{removed}-seed{seed}"
            context.say(f"evaluating {identifier}")
            build = functools.partial(_row, context, config, result, name, method, removed)
            made.append(rows.make(identifier, config, build)["id"])
        if seed == context.settings["seeds"][0]:
            _picture(context, config, result)
    _report(context, rows.keep(made))


def _row(
    context: Context, config: ConfigDict, result: TrainResult, run_name: str, method: str, removed: int
) -> dict[str, Any]:
    """Evaluates one method at one rate on the test split."""
    overrides = {} if method == "dense" else {"model.reduction.method": method, "model.reduction.r": removed}
    changed = apply_overrides(config.copy_and_resolve_references(), overrides)
    task = tasks.build(changed)
    dataset = data.build(config.data, split="test", batch_size=config.batch_size, seed=config.seed)
    program = train.build_program(changed, task, dataset.spec)
    found = assess(
        program,
        task,
        result.state.params,
        {},
        dataset,
        batches=context.settings["batches"] or None,
        repeats=context.settings["repeats"],
    )
    return {
        "group": f"{method}-r{removed}",
        "method": method,
        "r": removed,
        "accuracy": 100 * found["accuracy"],
        "cross_entropy": found["cross_entropy"],
        "tokens_left": found["tokens_left"],
        "mmacs": 1e3 * found["gmacs"],
        "implied": found["implied"],
        # The dense row is compared with itself, which only measures noise.
        "realised": 1.0 if method == "dense" else found["realised"],
        "milliseconds": found["milliseconds"],
        "command": context.evaluate_command(run_name, "test", overrides),
    }


def _picture(context: Context, config: ConfigDict, result: TrainResult) -> None:
    """Which patches share a token after the last layer, for a few test images."""
    dataset = data.build(config.data, split="test", batch_size=4, seed=config.seed)
    images = next(iter(dataset.eval_batches(1)))["image"]
    model = tasks.build(config).model
    rates = context.settings["rates"]
    columns = [("tome", rates[1]), ("tome", rates[-2]), ("class_attention", rates[-2])]
    origins = []
    for method, removed in columns:
        reduced = with_reduction(model, {"method": method, "r": removed})
        apply = jax.jit(lambda params, x, reduced=reduced: reduced.apply({"params": params}, x)[1]["token_set"].origin)
        origins.append(np.asarray(apply(result.state.params, jnp.asarray(images))))
    titles = [f"{method}, r = {removed}" for method, removed in columns]
    figure = plots.merged_patches(images, origins, model.grid[1:], titles, skip=int(model.has_class_token))
    plots.save(figure, context.results, "patches")


def _report(context: Context, rows: list[dict[str, Any]]) -> None:
    """The table and the plot from the rows."""
    title = (
        "ToMe and pruning applied without training to a ViT trained on cluttered digits; r tokens leave at each of its layers. "
        "One MAC is one multiply-accumulate. Realised: time of the dense evaluation step over that of the reduced one, same "
        "weights, same batch, interleaved medians; a small model on a CPU pays more for the reduction than a large one."
    )
    tables.write(context.results, "table", title, rows, COLUMNS)
    dense = {"accuracy": float(np.mean([row["accuracy"] for row in rows if row["method"] == "dense"]))}
    figure = plots.trade_off(
        [row for row in rows if row["method"] != "dense"],
        [
            ("mmacs", "MMACs / image", "accuracy", "accuracy %"),
            ("implied", "implied speedup", "realised", "realised speedup"),
        ],
        level=dense,
    )
    plots.save(figure, context.results, "trade_off")
