# SPDX-License-Identifier: Apache-2.0
"""MrT5's gate after each encoder layer in turn, at one target rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.studies import plots, tables
from experiments.studies.mrt5 import published
from experiments.studies.mrt5.runs import Runs, Setup
from experiments.studies.mrt5.trade_off import BASES
from experiments.studies.study import Context

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("gate after layer", "layer"),
    tables.Column("length left %", lambda row: 100 * row["kept"], 1),
    tables.Column("bits per byte", "bits_per_byte", 3),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)
TITLE = (
    "MrT5 with its gate after each encoder layer, from the same dense model. Rows marked 'paper' are those of Kallini et al. "
    "2025 at ByT5-small scale (12 encoder layers); their speedup is over ByT5 without a gate."
)


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the table and the plot; returns the ids of the rows."""
    runs = Runs.of(context, "trade_off", settings, BASES)
    rate, rows = settings["rate"], []
    for seed in context.settings["seeds"]:
        for layer in settings["layers"]:
            setup = Setup(
                f"mrt5_after_layer{layer}", rate, f"gate=mrt5,rate={rate}", {"model.gate_layer": layer}
            )  # fmt: skip
            rows.append({**runs.row(setup, seed, lambda layer=layer: {"layer": layer}), "method": "mrt5"})
    tables.write(context.results, "placement", TITLE, [*rows, *published.placement()], COLUMNS)
    panels = [
        ("layer", "gate after layer", "bits_per_byte", "bits per byte"),
        ("layer", "gate after layer", "realised", "realised speedup"),
    ]
    plots.save(plots.trade_off(rows, panels), context.results, "placement")
    return [row["id"] for row in rows]
