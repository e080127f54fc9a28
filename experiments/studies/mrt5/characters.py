# SPDX-License-Identifier: Apache-2.0
"""Diagnostics and character tasks: what deletion costs where the right answer is known byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.studies import tables
from experiments.studies.mrt5 import published
from experiments.studies.mrt5.runs import Runs, Setup
from experiments.studies.mrt5.trade_off import UNUSED
from experiments.studies.study import Context

METHODS = ("mrt5", "random_deletion")
COLUMNS = (
    tables.Column("task", "task"),
    tables.Column("method", "method"),
    tables.Column("length left %", lambda row: 100 * row["kept"], 1),
    tables.Column("sequences right %", lambda row: 100 * row["sequence_accuracy"], 1),
    tables.Column("realised speedup", "realised", 2),
)
TITLE = (
    "Share of targets that are right in every byte (teacher-forced). Each method goes on from a dense model of the same task. "
    "Rows marked 'paper' are those of Kallini et al. 2025: larger models on 64 to 128 bytes, and for the character tasks "
    "other data."
)
KIND_COLUMNS = (
    tables.Column("task", "task"),
    tables.Column("kind", "kind"),
    tables.Column("method", "method"),
    tables.Column("sequences right %", lambda row: 100 * row["right"], 1),
)
KIND_TITLE = "The character tasks by kind of example."


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows of every task, and the tables; returns the ids of the rows."""
    rows = []
    for task, chosen in settings["tasks"].items():
        arg, rate = chosen["arg"], chosen["rate"]
        dense = f"{arg},gate=no_deletion"
        bases = {"base": Setup("base", arg=dense, overrides=UNUSED, start="")}
        folder = task.replace(" ", "_")
        runs = Runs.of(context, folder, {**settings, **chosen}, bases)
        setups = [
            Setup("dense", arg=dense, overrides=UNUSED),
            *(Setup(method, rate, f"{arg},gate={method},rate={rate}") for method in METHODS),
        ]
        rows += [
            runs.row(setup, seed, lambda task=task: {"task": task}) for seed in settings["seeds"] for setup in setups
        ]
    tables.write(context.results, "characters", TITLE, [*rows, *published.tasks()], COLUMNS)
    kinds = by_kind(rows)
    if kinds:
        tables.write(context.results, "kinds", KIND_TITLE, kinds, KIND_COLUMNS, receipts=())
    return [row["id"] for row in rows]


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kind of example that an evaluation told apart."""
    head = "sequence_accuracy/"
    return [
        {**row, "group": f"{row['group']}/{name}", "kind": name.removeprefix(head), "right": value}
        for row in rows
        for name, value in row.items()
        if name.startswith(head)
    ]
