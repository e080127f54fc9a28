# SPDX-License-Identifier: Apache-2.0
"""Loss against compute for oracle, router and random router at every budget, and what one big module alone does."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.width import duo
from experiments.studies import plots, tables
from experiments.studies.duo.measured import Measured
from experiments.studies.study import Context

# What the same sums give in another order of the products.
_ROUNDING = 1e-4

# Key of a row, and its name in the plot.
LINES = {
    "oracle": "oracle",
    "oracle_skip": "oracle that may skip",
    "oracle_sequence": "oracle, one path a sequence",
    "realised": "oracle's paths, all at once",
    "fixed": "best fixed pattern",
    "router": "router",
    "random_router": "random router",
    "control": "oracle of shuffled labels",
}
TITLE = (
    "Cross-entropy of the next byte in nats on held-out text when a byte meets so many big modules on average. Oracle: for "
    "each byte the best of all patterns with exactly so many, where the whole sequence takes the pattern; it knows the byte "
    "that it predicts. All at once: each byte on its own best path, in one pass. Fixed: the pattern that is best on the valid "
    "split. Router: trained for the budget, threshold set on the valid split. Random router: big at random as often. Oracle "
    "of shuffled labels: paths chosen for labels of other bytes, scored on the true ones: choice without signal. "
    "Gain: what the oracle saves over small everywhere; on shuffled labels it shows how much a minimum over so many patterns "
    "gives without a signal. In order: oracle <= router <= random router."
)
COLUMNS = (
    tables.Column("big modules", "budget"),
    tables.Column("patterns", "patterns"),
    tables.Column("kMACs / byte", "kmacs", 0),
    tables.Column("oracle", "oracle", 3),
    tables.Column("oracle, may skip", "oracle_skip", 3),
    tables.Column("oracle a sequence", "oracle_sequence", 3),
    tables.Column("all at once", "realised", 3),
    tables.Column("fixed", "fixed", 3),
    tables.Column("router", "router", 3),
    tables.Column("router's big", "router_bigs", 2),
    tables.Column("random router", "random_router", 3),
    tables.Column("oracle of shuffled labels", "control", 3),
    tables.Column("gain", "gain", 3),
    tables.Column("gain on shuffled labels", "gain_shuffled", 3),
    tables.Column("in order", "ordered"),
)

SINGLE_TITLE = (
    "One big module only, small ones elsewhere, by layer, against small and big everywhere. By the oracle: for each byte in "
    "its best layer; by shuffled labels chosen for other bytes' labels."
)
SINGLE_COLUMNS = (
    tables.Column("big modules", "place"),
    tables.Column("cross-entropy", "cross_entropy", 3),
    tables.Column("kMACs / byte", "kmacs", 0),
)


def run(context: Context, measured: Sequence[Measured]) -> list[str]:
    """Makes the rows, tables and plots of both questions; returns the ids of the rows."""
    rows, single = [], []
    for one in measured:
        for budget in range(one.model.layers + 1):
            build = functools.partial(_row, one, budget)
            rows.append(context.rows.make(f"budget{budget}-seed{one.seed}", one.config, build))
        for place in _places(one):
            build = functools.partial(_single, one, place)
            single.append(context.rows.make(f"big-{place}-seed{one.seed}".replace(" ", "_"), one.config, build))
    tables.write(context.results, "budgets", TITLE, rows, COLUMNS, receipts=context.receipts)
    tables.write(context.results, "single", SINGLE_TITLE, single, SINGLE_COLUMNS, receipts=context.receipts)
    shown = [
        {"group": f"{name}-{row['budget']}", "method": label, "kmacs": row["kmacs"], "loss": row[name]}
        for row in rows
        for name, label in LINES.items()
    ]
    figure = plots.trade_off(shown, [("kmacs", "kMACs / byte", "loss", "cross-entropy (nats)")])
    plots.save(figure, context.results, "budgets")
    return [row["id"] for row in (*rows, *single)]


def _row(one: Measured, budget: int) -> Mapping[str, Any]:
    """Everything at one budget."""
    one.context.say(f"budget {budget} of seed {one.seed}")
    members = one.members(budget)
    losses, shuffled = (one.losses[name][members] for name in ("true", "shuffled"))
    small = one.uniform(duo.SMALL)
    routed, paths = one.routed(budget)
    found = {
        "oracle": losses.min(axis=0).mean(),
        "oracle_skip": one.losses["true"][one.members(budget, skip=True)].min(axis=0).mean(),
        "oracle_sequence": losses.mean(axis=2).min(axis=0).mean(),
        "realised": one.on_paths(one.patterns[members][losses.argmin(axis=0)]).mean(),
        "fixed": losses[one.valid_losses[members].mean(axis=(1, 2)).argmin()].mean(),
        "router": routed.mean(),
        "random_router": one.random_router(budget).mean(),
        "control": np.take_along_axis(losses, shuffled.argmin(axis=0)[None], axis=0).mean(),
    }
    low, middle, high = (found[name] for name in ("oracle", "router", "random_router"))
    return {
        "group": f"budget{budget}",
        "budget": budget,
        "patterns": len(members),
        "kmacs": one.kmacs(budget),
        **{name: float(value) for name, value in found.items()},
        "router_bigs": float((paths == duo.BIG).sum(axis=-1).mean()),
        "gain": float(one.losses["true"][small].mean() - found["oracle"]),
        "gain_shuffled": float(one.losses["shuffled"][small].mean() - shuffled.min(axis=0).mean()),
        "ordered": "yes" if low <= middle + _ROUNDING and middle <= high + _ROUNDING else "no",
    }


def _places(one: Measured) -> list[str]:
    layers = [f"layer {layer} only" for layer in range(one.model.layers)]
    return ["none", *layers, "one, by the oracle", "one, by shuffled labels", "all"]


def _single(one: Measured, place: str) -> Mapping[str, Any]:
    """One line of the table of single big modules."""
    members = one.members(1)
    losses, shuffled = (one.losses[name][members] for name in ("true", "shuffled"))
    count = 1
    if place in ("none", "all"):
        count = 0 if place == "none" else one.model.layers
        found = one.losses["true"][one.uniform(duo.BIG if count else duo.SMALL)]
    elif place == "one, by the oracle":
        found = losses.min(axis=0)
    elif place == "one, by shuffled labels":
        found = np.take_along_axis(losses, shuffled.argmin(axis=0)[None], axis=0)
    else:
        layer = int(place.split()[1])
        found = losses[np.flatnonzero(one.patterns[members][:, layer] == duo.BIG)[0]]
    return {"group": place, "place": place, "cross_entropy": float(found.mean()), "kmacs": one.kmacs(count)}
