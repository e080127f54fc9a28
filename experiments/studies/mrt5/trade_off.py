# SPDX-License-Identifier: Apache-2.0
"""Bits per byte, sequence length left and measured time of encoder and decoder, for MrT5 and all its baselines."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies import plots, tables
from experiments.studies.mrt5 import published
from experiments.studies.mrt5.runs import Runs, Setup
from experiments.studies.study import Context

# The gate deletes nothing and is not used: so that layers are grouped as they are in the methods that start from here.
UNUSED = {"model.deletion.train": "", "model.deletion.evaluate": ""}
BASES = {
    "base": Setup("base", arg="gate=no_deletion", overrides=UNUSED, start=""),
    "base_softmax": Setup(
        "base_softmax", arg="gate=no_deletion", overrides={**UNUSED, "model.softmax": "standard"}, start=""
    ),
}
DELETIONS = ("mrt5", "random_deletion", "fixed_deletion")

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("target deletion %", lambda row: 100 * row["rate"] if row["rate"] else "-", 0),
    tables.Column("length left %", lambda row: 100 * row["kept"], 1),
    tables.Column("bits per byte", "bits_per_byte", 3),
    tables.Column("MMACs / example", lambda row: row["gmacs"] if row["gmacs"] == "-" else 1e3 * row["gmacs"], 1),
    tables.Column("ms / example", "milliseconds_per_example", 2),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)
TITLE = (
    "Byte-level T5; every row but the floor goes on from one dense model, and all are trained for as many steps after that. "
    "Time is that of encoding and scoring. Realised: time of the dense evaluation step over that of the method, same weights, "
    "same batch, interleaved medians, through the bucket ladder. Rows marked 'paper' are those of Kallini et al. 2025 at "
    "ByT5-small scale, on other data and another machine."
)

EQUAL_COLUMNS = (
    tables.Column("target deletion %", lambda row: 100 * row["rate"], 0),
    tables.Column("length left %", lambda row: 100 * row["kept"], 1),
    tables.Column("mrt5", "bits_per_byte", 3),
    tables.Column("random at that length", "random_deletion", 3),
    tables.Column("fixed at that length", "fixed_deletion", 3),
    tables.Column("seeds in which mrt5 is lower", "lower"),
)
EQUAL_TITLE = (
    "Bits per byte at equal sequence length left: the curves of random and fixed deletion (with the dense model at 100 %) are "
    "interpolated linearly, seed by seed, at the length that MrT5 left."
)

CONTROL_COLUMNS = (
    tables.Column("target deletion %", lambda row: 100 * row["rate"], 0),
    tables.Column("deleted on held-out text %", lambda row: 100 * (1 - row["kept"]), 1),
    tables.Column("mean over the last quarter of training %", lambda row: 100 * row["settled_mean"], 1),
    tables.Column("largest distance from the target there, points", lambda row: 100 * row["settled_worst"], 1),
)
CONTROL_TITLE = (
    "How well the controller meets its target. The distance is that of means over windows of ten logged steps in the last "
    "quarter of training."
)


def deletion_setups(methods: Iterable[str], rates: Sequence[float]) -> list[Setup]:
    """A setup for each deletion method at each rate."""
    by_class = {"model.deletion.by_class": True}
    return [Setup(method, rate, f"gate={method},rate={rate}", by_class) for method in methods for rate in rates]


def setups(settings: Mapping[str, Any]) -> list[Setup]:
    """All settings of the table."""
    dense = [Setup("dense", arg="gate=no_deletion", overrides=UNUSED)]
    if not settings.get("neighbours"):
        return [*dense, *deletion_setups(DELETIONS, settings["rates"])]
    standard = BASES["base_softmax"].overrides
    floor = {**UNUSED, **settings["floor"]} if "floor" in settings else None
    return [
        *dense,
        Setup("dense, standard softmax", arg="gate=no_deletion", overrides=standard, start="base_softmax"),
        *([Setup("decoder only", arg="gate=no_deletion", overrides=floor, start="")] if floor else []),
        *deletion_setups(DELETIONS, settings["rates"]),
        *(
            Setup(method, rate, f"chunker={chunker}", overrides)
            for method, rate, chunker, overrides in settings["neighbours"]
        ),
    ]


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the tables and the plots; returns the ids of the rows."""
    runs = Runs.of(context, "trade_off", settings, BASES)
    rows = []
    for seed in context.settings["seeds"]:
        for setup in setups(settings):
            more = functools.partial(_settled, runs, setup, seed) if setup.method == "mrt5" else dict
            rows.append(runs.row(setup, seed, more))
    _report(context, rows)
    _controller(context, runs, rows, settings)
    return [row["id"] for row in rows]


def _report(context: Context, rows: list[dict[str, Any]]) -> None:
    tables.write(context.results, "table", TITLE, [*rows, *published.trade_off()], COLUMNS)
    dense = {"bits_per_byte": float(np.mean([row["bits_per_byte"] for row in rows if row["method"] == "dense"]))}
    shown = [{**row, "left": 100 * row["kept"]} for row in rows if row["method"] not in ("dense", "decoder only")]
    panels = [
        ("left", "length left %", "bits_per_byte", "bits per byte"),
        ("milliseconds_per_example", "ms / example", "bits_per_byte", "bits per byte"),
        ("implied", "implied speedup", "realised", "realised speedup"),
    ]
    plots.save(plots.trade_off(shown, panels, level=dense), context.results, "trade_off")
    equal = equal_length(rows)
    if equal:
        tables.write(context.results, "equal_length", EQUAL_TITLE, equal, EQUAL_COLUMNS, receipts=())


def equal_length(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of MrT5 with the bits per byte that random and fixed deletion have at the length it left, seed by seed."""
    found = []
    rows = [row for row in rows if row["method"] in ("dense", *DELETIONS)]
    for row in rows:
        if row["method"] != "mrt5":
            continue
        others = {method: _at_length(rows, method, row) for method in DELETIONS[1:]}
        lower = all(row["bits_per_byte"] < bits for bits in others.values() if bits != tables.BEYOND)
        found.append({**row, **others, "lower": f"seed {row['seed']}: {'yes' if lower else 'no'}"})
    return found


def _at_length(rows: Iterable[Mapping[str, Any]], method: str, row: Mapping[str, Any]) -> float | str:
    """Between two points of a method's curve; beyond its shortest length there is nothing to compare with."""
    same_seed = [r for r in rows if r["seed"] == row["seed"]]
    curve = sorted((r["kept"], r["bits_per_byte"]) for r in same_seed if r["method"] in (method, "dense"))
    lengths, bits = zip(*curve, strict=True)
    # Half a point of length is what targets are met to.
    if row["kept"] < lengths[0] - 0.005:
        return tables.BEYOND
    return float(np.interp(row["kept"], lengths, bits))


def _settled(runs: Runs, setup: Setup, seed: int) -> dict[str, float]:
    """How near the share of deleted bytes stayed to the target in the last quarter of training."""
    _, shares = runs.trace(setup, seed, "deleted")
    last = np.array(shares[-max(len(shares) // 4, 1) :])
    width = min(10, len(last))
    windows = np.convolve(last, np.full(width, 1 / width), mode="valid")
    return {"settled_mean": float(last.mean()), "settled_worst": float(np.abs(windows - setup.rate).max())}


def _controller(context: Context, runs: Runs, rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
    """The table of targets met, and the share of deleted bytes by step."""
    learned = [row for row in rows if row["method"] == "mrt5"]
    tables.write(context.results, "controller", CONTROL_TITLE, learned, CONTROL_COLUMNS, receipts=())
    lines = {}
    for setup in deletion_setups(("mrt5",), settings["rates"]):
        for seed in context.settings["seeds"]:
            steps, shares = runs.trace(setup, seed, "deleted")
            lines[f"{100 * setup.rate:.0f} %, seed {seed}"] = (steps, [100 * share for share in shares])
    levels = [100 * rate for rate in settings["rates"]]
    figure = plots.curves(lines, "step", "bytes deleted %", levels=levels)
    plots.save(figure, context.results, "controller")
