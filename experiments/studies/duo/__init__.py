# SPDX-License-Identifier: Apache-2.0
"""Routers against oracles on one language model of bytes: Duo-LLM, and depth methods beside it.

A model whose feed-forward layers have a small and a big module is trained on random paths; then the loss of every path is
computed for every byte of held-out text, and routers are trained for every budget. Parts: loss against compute; one big module
alone; where router and oracle differ; which bytes are hard; speed and quality of SkipDecode and confidence exits by batch;
Mixture-of-Depths against dense models at equal compute of training.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.duo import budgets, choices, depth, isoflop
from experiments.studies.duo.measured import Measured
from experiments.studies.study import LONG_TEXT, Context

_ROUTER = {"optimizer.peak": 0.01, "optimizer.warmup": 10, "eval.every": 0}
# The paper has 12 layers, 16 times the width between modules; 8 layers keep the losses of all paths within memory.
_FULL = {
    "model.width": 512,
    "model.layers": 8,
    "model.heads": 8,
    "model.big": 2_048,
    "model.small": 128,
    "data.targets_length": 256,
    "batch_size": 64,
    "optimizer.peak": 1e-3,
    "optimizer.warmup": 500,
}

# `overrides`: of the model's training; `router`: on top of them; `sequences`: of each held-out split that are measured.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        seeds=(0,),
        overrides={"model.layers": 4, "steps": 300},
        router={"steps": 60, **_ROUTER},
        sequences=16,
        shown=5,
    ),
    "quick": dict(
        seeds=(0, 1, 2),
        overrides={"steps": 1_200, **LONG_TEXT},
        router={"steps": 100, **_ROUTER},
        sequences=32,
        shown=6,
        depth=dict(
            seeds=(0,),
            overrides={"model.width": 128, "batch_size": 16, "steps": 300, **LONG_TEXT},
            speedups=(1.33, 2.0),
            thresholds=(0.9, 0.5),
            batches=(1, 8),
            quality_batches=2,
            repeats=5,
        ),
        isoflop=dict(
            seeds=(0,),
            overrides={"model.depth": 6, "batch_size": 16, "optimizer.warmup": 20, "eval.every": 0, **LONG_TEXT},
            widths=(48, 64, 96),
            shares=(0.125,),
            steps=120,
            batches=20,
        ),
    ),
    "full": dict(
        seeds=(0, 1, 2),
        overrides={"steps": 30_000, **_FULL, **LONG_TEXT},
        router={"steps": 2_000, **_ROUTER},
        sequences=16,
        shown=4,
        depth=dict(
            seeds=(0, 1, 2),
            overrides={
                "model.width": 512,
                "model.depth": 24,
                "model.heads": 8,
                "model.kv_heads": 4,
                "model.mlp_dim": 1_536,
                "data.length": 512,
                "batch_size": 64,
                "steps": 20_000,
                **LONG_TEXT,
            },
            speedups=(1.33, 2.0, 3.0, 4.0, 5.0),
            thresholds=(0.95, 0.9, 0.8, 0.6, 0.3),
            batches=(1, 8, 64),
            quality_batches=4,
            repeats=9,
        ),
        isoflop=dict(
            seeds=(0, 1, 2),
            overrides={"data.length": 512, "batch_size": 64, **LONG_TEXT},
            widths=(256, 384, 512, 768),
            shares=(0.125, 0.5),
            steps=10_000,
            batches=50,
        ),
    ),
}


def run(context: Context) -> None:
    """Runs every part."""
    settings = context.settings
    measured = [
        Measured(context, seed, settings["overrides"], settings["router"], settings["sequences"])
        for seed in settings["seeds"]
    ]
    made = budgets.run(context, measured)
    made += choices.run(context, measured, settings["shown"])
    for name, part in (("depth", depth), ("isoflop", isoflop)):
        if name in settings:
            made += part.run(context, settings[name])
    context.rows.keep(dict.fromkeys(made))
