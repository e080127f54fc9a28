# SPDX-License-Identifier: Apache-2.0
"""The rows that the paper reports on ImageNet-1k, with the multiply-adds of its schedules by our count."""

from __future__ import annotations

from adaptive import flops
from adaptive.rates.schedules import Schedule
from experiments.studies import tables
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
_SHAPES = {"DeiT-Ti": "Ti/16", "DeiT-S": "S/16", "DeiT-B": "B/16", "MAE-B": "B/16", "MAE-L": "L/16"}

TITLE = (
    "DiffRate's published schedules on ImageNet-1k with off-the-shelf weights: top-1 as the public code reports it, "
    "multiply-adds as it reports them and by our count. '-': not reported."
)
COLUMNS = (
    tables.Column("schedule", "name"),
    tables.Column("GMACs, paper", "paper_gmacs", 3),
    tables.Column("GMACs, our count", "gmacs", 3),
    tables.Column("top-1 %, paper", "paper_top1", 2),
    tables.Column("top-1 %, here", "top1", 2),
)


def model_of(name: str) -> ViT:
    """The backbone of a published schedule, dense."""
    return ViT.named(_SHAPES[name.partition(" ")[0]], num_classes=1_000)


def gmacs(name: str) -> float:
    """1e9 multiply-adds of a published schedule by `adaptive.flops`."""
    model = model_of(name)
    schedule = SCHEDULES[name].on(model.num_tokens)
    return flops.count(model, counts=schedule.counts).macs / 1e9


def run(context: Context) -> None:
    """The table."""
    rows = [
        {
            "group": name,
            "name": name,
            "paper_gmacs": MACS[name],
            "gmacs": gmacs(name),
            "paper_top1": TOP1.get(name, "-"),
            "top1": None,
        }
        for name in SCHEDULES
    ]
    tables.write(context.results, "imagenet", TITLE, rows, COLUMNS, receipts=())
