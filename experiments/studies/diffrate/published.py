# SPDX-License-Identifier: Apache-2.0
"""The rows that the paper reports on ImageNet-1k: multiply-adds by our count, and accuracy here where data are at hand.

`--data imagenet=FOLDER` (TensorFlow Datasets, `imagenet2012`) and `--data imagenet_checkpoints=FOLDER`, which holds checkpoints
in Hugging Face's layout under their published names (`deit-small-patch16-224`), fill the column "here".
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from adaptive import flops
from adaptive.rates.schedules import Schedule
from experiments import evaluate
from experiments.import_hf import import_checkpoint
from experiments.rundir import apply_overrides
from experiments.studies import tables
from experiments.studies.diffrate.runs import EVALUATION_BATCH, Setup
from experiments.studies.study import Context
from layers.vit import ViT

# Kept tokens after pruning and after merging, class token included. Source: `compression_rate.json` of the public code of
# Chen et al. 2023 (DiffRate); name: shape and target in 1e9 multiply-adds.
SCHEDULES = {
    "DeiT-Ti 0.8": Schedule(
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    "DeiT-S 2.3": Schedule(
        (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
        (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
    ),
    "DeiT-S 2.9": Schedule(
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    "DeiT-B 8.7": Schedule(
        (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
        (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
    ),
    "DeiT-B 11.5": Schedule(
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
    "MAE-B 11.5": Schedule(
        (197, 196, 182, 172, 162, 147, 131, 109, 101, 94, 70, 49),
        (197, 192, 178, 164, 150, 133, 115, 101, 96, 82, 49, 49),
    ),
    "MAE-L 42.3": Schedule(
        (
            197,
            197,
            197,
            195,
            194,
            193,
            191,
            187,
            182,
            180,
            173,
            149,
            142,
            134,
            125,
            121,
            111,
            106,
            91,
            87,
            77,
            39,
            38,
            32,
        ),
        (
            197,
            197,
            196,
            194,
            193,
            192,
            187,
            183,
            181,
            173,
            154,
            146,
            137,
            127,
            123,
            114,
            105,
            98,
            87,
            75,
            43,
            45,
            32,
            32,
        ),
    ),
}
# Multiply-adds of those schedules as the public code counts them, in 1e9, and the top-1 that it reports without training.
MACS = {
    "DeiT-Ti 0.8": 0.8088,
    "DeiT-S 2.3": 2.3272,
    "DeiT-S 2.9": 2.9053,
    "DeiT-B 8.7": 8.7306,
    "DeiT-B 11.5": 11.5172,
    "MAE-B 11.5": 11.5171,
    "MAE-L 42.3": 42.2904,
}
TOP1 = {"DeiT-S 2.9": 79.538, "DeiT-B 11.5": 81.498, "MAE-B 11.5": 82.864, "MAE-L 42.3": 85.658}
# Fine-tuned MAE classifiers average patches, which no layout that is read here has, so that those rows stay "not run".
CHECKPOINTS = {
    "DeiT-Ti": "deit-tiny-patch16-224",
    "DeiT-S": "deit-small-patch16-224",
    "DeiT-B": "deit-base-patch16-224",
}
_CONFIG = "vit/imagenet.py"
_SHAPES = {"DeiT-Ti": "Ti/16", "DeiT-S": "S/16", "DeiT-B": "B/16", "MAE-B": "B/16", "MAE-L": "L/16"}

TITLE = (
    "DiffRate's published schedules on ImageNet-1k with off-the-shelf weights: top-1 as the public code reports it, "
    "multiply-adds as it reports them and by our count. '-': not reported. Here: needs an ImageNet folder and checkpoints "
    "(`--data imagenet=FOLDER --data imagenet_checkpoints=FOLDER`)."
)
COLUMNS = (
    tables.Column("schedule", "name"),
    tables.Column("GMACs, paper", "paper_gmacs", 3),
    tables.Column("GMACs, our count", "gmacs", 3),
    tables.Column("top-1 %, paper", "paper_top1", 2),
    tables.Column("top-1 %, here", "accuracy", 2),
    tables.Column("dense top-1 %, here", "dense_accuracy", 2),
)


def model_of(name: str) -> ViT:
    """The backbone of a published schedule, dense."""
    return ViT.named(_SHAPES[name.partition(" ")[0]], num_classes=1_000)


def gmacs(name: str) -> float:
    """1e9 multiply-adds of a published schedule by `adaptive.flops`."""
    model = model_of(name)
    schedule = SCHEDULES[name].on(model.num_tokens)
    return flops.count(model, counts=schedule.counts).macs / 1e9


def run(context: Context) -> list[str]:
    """The table; returns the ids of the rows that were measured."""
    rows, made = [], []
    for name in SCHEDULES:
        row = {
            "group": name,
            "name": name,
            "paper_gmacs": MACS[name],
            "gmacs": gmacs(name),
            "paper_top1": TOP1.get(name, "-"),
        }
        family = name.partition(" ")[0]
        if directory := _checkpoint(context, family):
            schedule = SCHEDULES[name].on(model_of(name).num_tokens)
            dense = _measured(context, directory, Setup(""), f"{family} dense")
            reduced = _measured(context, directory, Setup("diffrate", schedule.merge, schedule.prune), name)
            row |= {"accuracy": reduced["accuracy"], "dense_accuracy": dense["accuracy"]}
            made += [dense["id"], reduced["id"]]
        rows.append(row)
    tables.write(context.results, "imagenet", TITLE, rows, COLUMNS, receipts=())
    return made


def _checkpoint(context: Context, family: str) -> pathlib.Path | None:
    """The directory of a family's weights, where images and weights are at hand."""
    folder, name = context.data.get("imagenet_checkpoints"), CHECKPOINTS.get(family)
    if not (context.data.get("imagenet") and folder and name):
        return None
    directory = pathlib.Path(folder) / name
    return directory if directory.is_dir() else None


def _measured(context: Context, directory: pathlib.Path, setup: Setup, name: str) -> dict[str, Any]:
    """The row of one checkpoint under one schedule on ImageNet's validation images."""
    overrides = {**setup.overrides, "batch_size": EVALUATION_BATCH, "data.data_dir": context.data["imagenet"]}
    config = apply_overrides(context.config(_CONFIG), overrides)
    build = functools.partial(_evaluate, context, directory, overrides, name)
    return context.rows.make(f"imagenet/{name}", config, build)


def _evaluate(context: Context, directory: pathlib.Path, overrides: dict[str, Any], name: str) -> dict[str, Any]:
    run = f"imagenet/{directory.name}"
    if not (context.runs / run / "config.json").exists():
        place = {"data.data_dir": context.data["imagenet"]}
        import_checkpoint(directory, context.runs / run, recipe=str(context.config_path(_CONFIG)), overrides=place)
    context.say(f"evaluating {name} on ImageNet")
    batches = context.settings["batches"] or None
    found = evaluate.evaluate(str(context.runs / run), overrides=overrides, split="test", batches=batches, speed=False)
    command = context.evaluate_command(run, "test", {**overrides, "data.data_dir": "FOLDER"})
    return {"accuracy": 100 * found["accuracy"], "gmacs": found["gmacs"], "command": command}
