# SPDX-License-Identifier: Apache-2.0
"""How much to reduce at each layer: DiffRate's learned rates against searched and uniform schedules, and other reductions.

The parts, for each data set: accuracy against multiply-adds without and with a short training under the schedule; the schedules
that were learned, by layer; learned against searched against uniform schedules at equal multiply-adds; what of an image is kept
and merged, by layer. Then throughput of large shapes, and the published ImageNet rows.

Digits are embedded. CIFAR-10 needs `--data cifar10=FOLDER`, a folder of TensorFlow Datasets in array_record form.
"""

from __future__ import annotations

from typing import Any

from adaptive.reduction.diffrate import ORDERS
from experiments.studies.diffrate import compare, published, shapes
from experiments.studies.diffrate.runs import PUBLISHED, Runs
from experiments.studies.study import Context

_DIGITS = dict(config="diffrate/digits.py")
_CIFAR = dict(config="diffrate/cifar10.py", folder="cifar10")

# The smallest is about the least that methods reach which can only halve the tokens of a layer.
_BUDGETS = (0.85, 0.7, 0.6, 0.5, 0.4, 0.33)

# `budgets`: shares of the dense multiply-adds; `search`: at one of them. `orders` in which tokens go where rates are
# learned. `batches` of 64 test images are evaluated; 0: all. `whole`: what settles the comparison at equal compute is
# evaluated on all. `repeats` of timed steps; 0 times none. `seeds` of a set stand in for those of the suite.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        seeds=(0,),
        batches=16,
        repeats=3,
        sets={
            "digits": dict(
                **_DIGITS,
                base={"steps": 700},
                learn={},
                tune={"steps": 40, "optimizer.peak": 5e-4, "optimizer.warmup": 5},
                budgets=(0.7, 0.5),
                tuned_budgets=(),
                orders=(PUBLISHED,),
                whole=False,
                baselines=("tome", "class_attention"),
                search=dict(budget=0.5, trials=16, examples=256, methods=("evopress",)),
            )
        },
        shapes={},
    ),
    "quick": dict(
        seeds=(0, 1, 2),
        tuned_seeds=(0,),
        batches=32,
        repeats=0,
        sets={
            "cifar10": dict(
                **_CIFAR,
                base={},
                learn={},
                tune={"steps": 30, "optimizer.peak": 3e-4, "optimizer.warmup": 3},
                budgets=_BUDGETS,
                tuned_budgets=_BUDGETS,
                orders=tuple(ORDERS),
                whole=True,
                baselines=compare.BASELINES,
                search=dict(budget=0.4, trials=16, examples=256, methods=compare.SEARCHES),
            ),
            "digits": dict(
                **_DIGITS,
                base={"steps": 4_000},
                learn={"steps": 100},
                tune={"steps": 30, "optimizer.peak": 5e-4, "optimizer.warmup": 3, "eval.every": 0},
                budgets=_BUDGETS,
                tuned_budgets=_BUDGETS,
                orders=tuple(ORDERS),
                whole=False,
                baselines=compare.BASELINES,
                search=dict(budget=0.5, trials=16, examples=128, methods=compare.SEARCHES),
            ),
        },
        shapes=dict(batches={"B/16": (1, 8), "L/16": (1, 2), "H/14": (1,)}, repeats=3),
    ),
    "full": dict(
        seeds=(0, 1, 2),
        tuned_seeds=(0, 1, 2),
        batches=0,
        repeats=15,
        sets={
            name: dict(
                **kind,
                base={
                    "steps": 30_000,
                    "batch_size": 256,
                    "model.width": 192,
                    "model.depth": 12,
                    "model.heads": 3,
                    "model.mlp_dim": 768,
                    "optimizer.peak": 1e-3,
                    "optimizer.warmup": 1_000,
                },
                learn={"steps": 600, "batch_size": 256, "optimizer.peak": 0.01, "optimizer.warmup": 0},
                tune={"steps": 2_000, "optimizer.peak": 1e-4, "optimizer.warmup": 100},
                budgets=_BUDGETS,
                tuned_budgets=_BUDGETS,
                orders=tuple(ORDERS),
                whole=False,
                baselines=compare.BASELINES,
                search=dict(budget=0.5, trials=200, examples=2_048, methods=compare.SEARCHES),
            )
            for name, kind in (("cifar10", _CIFAR), ("digits", _DIGITS))
        },
        shapes=dict(batches=dict.fromkeys(shapes.SHAPES, (1, 8, 64)), repeats=15),
    ),
}


def run(context: Context) -> None:
    """Runs every data set that is at hand, then the shapes and the published rows."""
    made = []
    for name, settings in context.settings["sets"].items():
        folder = context.data.get(settings.get("folder", ""))
        if settings.get("folder") and not folder:
            note = f"Not run: no folder of {name} was given (--data {settings['folder']}=FOLDER)."
            context.say(note)
            context.results.mkdir(parents=True, exist_ok=True)
            (context.results / f"{name}_summary.md").write_text(f"{note}\n")
            continue
        chosen = {**settings, "data": {"data.data_dir": folder} if folder else {}}
        made += compare.run(Runs(context, name, chosen))
    made += shapes.run(context)
    made += published.run(context)
    context.rows.keep(dict.fromkeys(made))
