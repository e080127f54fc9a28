# SPDX-License-Identifier: Apache-2.0
"""ACM and its neighbours on bytes: bits per byte against compute for a decoder language model, and learners by byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import tasks
from experiments.studies import plots, tables
from experiments.studies.acm import pictures
from experiments.studies.acm.baselines import uniform
from experiments.studies.acm.images import acm_rows, dense_row
from experiments.studies.acm.runs import Runs, at_equal_compute, where_reached
from experiments.studies.study import Context

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("setting", "setting"),
    tables.Column("bits per byte", "bits_per_byte", 3),
    tables.Column("MMACs / sequence", "mmacs", 2),
    tables.Column("share of dense MACs %", "share_of_dense", 1),
    tables.Column("share of learners' cost %", lambda row: 100 * row["share"] if row["method"] == "acm" else None, 1),
)
TITLE = (
    "A byte-level decoder language model; every method goes on from the same dense model of its seed. Early exits are scored "
    "in parallel, with keys and values of all tokens in all layers, which flatters them, and pay for a head after each layer."
)
EQUAL_COLUMNS = (
    tables.Column("acm target", "setting"),
    tables.Column("MMACs / sequence", "mmacs", 2),
    tables.Column("acm bits per byte", "bits_per_byte", 3),
    tables.Column("against", "other"),
    tables.Column("its bits per byte at that compute", where_reached("reached"), 3),
    tables.Column("acm lower by", where_reached("gain"), 3),
)
EQUAL_TITLE = (
    "Bits per byte at equal compute, interpolated seed by seed; 'beyond its reach' below the other's cheapest setting."
)


def token_exits(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A head after every layer; each byte stops at the first that is confident."""
    config = runs.config().copy_and_resolve_references()
    with config.unlocked():
        config.task = "token_exit"
        del config.model["acm"]

    def params() -> Any:
        return runs.once("exits", lambda: runs.train("exits", config, params=runs.teacher()).state.average)

    for threshold in settings["thresholds"]:
        marked = config.copy_and_resolve_references()
        with marked.unlocked():
            marked.model.threshold = threshold

        def build(threshold: float = threshold, config: ConfigDict = config) -> tuple[Any, Any]:
            return dataclasses.replace(tasks.build(config), threshold=threshold), params()

        yield runs.row("early_exit", f"{threshold:g}", marked, build)


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, tables, plots and pictures; returns the ids of the rows."""
    rows = []
    for seed in context.settings["seeds"]:
        runs = Runs(context, "text", settings, seed)
        rows += [dense_row(runs), *acm_rows(runs, settings), *uniform(runs, settings), *token_exits(runs, settings)]
        if seed == context.settings["seeds"][0]:
            pictures.text(runs, context, settings["targets"])
    tables.write(context.results, "text", TITLE, rows, COLUMNS)
    level = {"bits_per_byte": float(np.mean([row["bits_per_byte"] for row in rows if row["method"] == "dense"]))}
    panels = [("share_of_dense", "share of dense MACs %", "bits_per_byte", "bits per byte")]
    shown = [row for row in rows if row["method"] != "dense"]
    plots.save(plots.trade_off(shown, panels, level=level), context.results, "text_trade_off")
    equal = [
        {**row, "group": f"{row['setting']} {row['other']}"}
        for other in ("uniform", "early_exit")
        for row in at_equal_compute(rows, "acm", other, "bits_per_byte", higher=False)
    ]
    tables.write(context.results, "text_equal_compute", EQUAL_TITLE, equal, EQUAL_COLUMNS, receipts=())
    pictures.budgets(context, "text", [row for row in rows if row["method"] == "acm"])
    return [row["id"] for row in rows]
