# SPDX-License-Identifier: Apache-2.0
"""Reductions and schedules compared on one data set: tables, curves and pictures."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.rates.schedules import Schedule
from adaptive.reduction.diffrate import ORDERS
from experiments import data, search
from experiments.studies import plots, tables
from experiments.studies.diffrate.runs import PUBLISHED, Runs, Setup, learned_name
from layers.learned_rates import as_reduce

BASELINES = ("tome", "diffrate", "diffrate_density", "dpc_knn", "ficoco_v", "evit", "class_attention")
# Cropr's queries are trained, so it stands among the tuned ones alone.
TUNED = ("tome", "dpc_knn", "ficoco_v", "cropr", "class_attention")
SEARCHES = search.METHODS

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("target % of MACs", lambda row: round(row["target"])),
    tables.Column("MACs %", "macs_share", 1),
    tables.Column("accuracy %", "accuracy", 2),
    tables.Column("cross-entropy", "cross_entropy", 3),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)
SEARCH_COLUMNS = (
    tables.Column("schedule", "method"),
    tables.Column("MACs %", "macs_share", 2),
    tables.Column("accuracy %", "accuracy", 2),
    tables.Column("cross-entropy", "cross_entropy", 3),
    tables.Column("new evaluations", "evaluations", 0),
    tables.Column("tokens after each layer, by seed", lambda row: " ".join(map(str, row["counts"]))),
)
EQUAL_COLUMNS = (
    tables.Column("target % of MACs", lambda row: round(row["target"])),
    tables.Column("schedule", "method"),
    tables.Column("MACs %", "macs_share", 2),
    tables.Column("accuracy %", "accuracy", 2),
    tables.Column("seeds above tome", "higher"),
    tables.Column("cross-entropy", "cross_entropy", 4),
    tables.Column("seeds below tome", "lower"),
)


def run(runs: Runs) -> list[str]:
    """Rows of one data set; writes its tables and pictures, and returns the ids of its rows."""
    seeds, settings = runs.seeds, runs.settings
    plain = [runs.row(Setup(""))]
    schedules: dict[str, dict[float, list[Schedule]]] = {order: {} for order in settings["orders"]}
    for budget in settings["budgets"]:
        for order in settings["orders"]:
            for seed in seeds:
                config, setup = runs.learned(budget, seed, order)
                schedules[order].setdefault(budget, []).append(Schedule(setup.prune, setup.counts))
                plain.append(runs.row(setup, seed=seed, config=config))
        plain += [runs.row(runs.uniform(method, budget)) for method in settings["baselines"]]
    _report_plain(runs, plain)
    compared = _compared(runs) if settings["whole"] else plain
    _equal(runs, compared)
    for order, found in schedules.items():
        _curves(runs, order, found)
    _picture(runs, schedules[PUBLISHED])
    searched = _searched(runs, plain)
    _report_searched(runs, searched)
    tuned = _tuned(runs)
    _report_tuned(runs, tuned)
    return list(dict.fromkeys(row["id"] for row in (*plain, *compared, *searched, *tuned)))


def _compared(runs: Runs) -> list[dict[str, Any]]:
    """Rows of learned schedules and of what they are compared with, on all test images."""
    rows = []
    # The published order last: it is the one that a part of the images settles.
    for order in reversed(runs.settings["orders"]):
        for budget in runs.settings["budgets"]:
            for seed in runs.seeds:
                config, setup = runs.learned(budget, seed, order)
                rows.append(runs.row(setup, seed=seed, config=config, whole=True))
            uniform = ("tome", ORDERS[order].method)
            rows += [runs.row(runs.uniform(method, budget), whole=True) for method in uniform]
    return list({row["id"]: row for row in rows}.values())


def _tuned(runs: Runs) -> list[dict[str, Any]]:
    """Rows after a short training under each schedule; the dense model is trained as long."""
    rows = []
    for seed in runs.context.settings["tuned_seeds"] if runs.settings["tuned_budgets"] else ():
        rows.append(runs.row(Setup(""), seed=seed, tuned=True))
        for budget in runs.settings["tuned_budgets"]:
            setups = [runs.learned(budget, seed, order)[1] for order in runs.settings["orders"]]
            setups += [runs.uniform(method, budget) for method in TUNED]
            rows += [runs.row(setup, seed=seed, tuned=True) for setup in setups]
    return rows


def _searched(runs: Runs, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the searches at one budget, and of the learned schedules at it."""
    settings = dict(runs.settings["search"])
    budget, methods = settings.pop("budget"), settings.pop("methods")
    rows = [row for row in plain if row["method"] == learned_name(PUBLISHED) and row["target"] == 100 * budget]
    for method in methods:
        for seed in runs.seeds:
            setup, facts = runs.searched(method, budget, seed, **settings)
            rows.append(runs.row(setup, seed=seed, more=facts))
    return rows


_PANELS = [
    ("macs_share", "MACs, % of dense", "accuracy", "accuracy %"),
    ("macs_share", "MACs, % of dense", "cross_entropy", "cross-entropy"),
]


def _about(runs: Runs) -> str:
    return (
        f"A tiny ViT trained on {runs.name}. The learned rates prune and merge; every other method runs ToMe's constant "
        "schedule of the same multiply-adds. One MAC is one multiply-accumulate. Realised: time of the dense evaluation step "
        "over that of the reduced one, same weights, same batch, interleaved medians."
    )


def _report_plain(runs: Runs, rows: list[dict]) -> None:
    """Tables of what was not trained under its schedule, and the trade-off as a plot."""
    results, name = runs.context.results, runs.name
    tables.write(results, f"{name}_plain", f"Without any training under the schedule. {_about(runs)}", rows, COLUMNS)
    plots.save(plots.trade_off(rows[1:], _PANELS, level=rows[0]), results, f"{name}_plain")


def _report_tuned(runs: Runs, rows: list[dict]) -> None:
    """The same for what was trained under its schedule, if any was."""
    if not rows:
        return
    results, name, steps = runs.context.results, runs.name, runs.settings["tune"]["steps"]
    title = f"After {steps} steps of training under the schedule, the dense model included. {_about(runs)}"
    tables.write(results, f"{name}_tuned", title, rows, COLUMNS)
    dense = [row for row in rows if row["method"] == "dense"]
    level = {key: float(np.mean([row[key] for row in dense])) for key in ("accuracy", "cross_entropy")}
    figure = plots.trade_off([row for row in rows if row["method"] != "dense"], _PANELS, level=level)
    plots.save(figure, results, f"{name}_tuned")


def _report_searched(runs: Runs, rows: list[dict]) -> None:
    """The table of schedules at one budget."""
    title = (
        f"Schedules at equal multiply-adds on {runs.name}, all of them run by DiffRate's reduction. The searched ones prune "
        "and merge as many; they were searched on training images, and seeds differ in those."
    )
    tables.write(runs.context.results, f"{runs.name}_schedules", title, rows, SEARCH_COLUMNS)


def _equal(runs: Runs, compared: list[dict]) -> None:
    """Learned schedules against uniform ones, budget by budget: those of ToMe, and those of the same reduction."""
    orders = runs.settings["orders"]
    shown = [*map(learned_name, orders), *(ORDERS[order].method for order in orders), "tome"]
    lines = []
    for budget in runs.settings["budgets"]:
        at = [row for row in compared if row["target"] == 100 * budget]
        tome = next((row for row in at if row["method"] == "tome"), None)
        if tome is None:
            continue
        for name in shown:
            rows = [row for row in at if row["method"] == name]
            higher = sum(row["accuracy"] > tome["accuracy"] for row in rows)
            lower = sum(row["cross_entropy"] < tome["cross_entropy"] for row in rows)
            found = {"higher": f"{higher} of {len(rows)}", "lower": f"{lower} of {len(rows)}"}
            lines += [{**row, **(found if name != "tome" else dict.fromkeys(found, "-"))} for row in rows]
    if lines:
        title = (
            f"Learned schedules against uniform ones at equal multiply-adds on {runs.name}, without training"
            f"{', on all test images' if runs.settings['whole'] else ''}. "
            "diffrate sorts tokens by class attention, as published; diffrate_density by density peaks."
        )
        tables.write(runs.context.results, f"{runs.name}_equal", title, lines, EQUAL_COLUMNS, receipts=())


def _curves(runs: Runs, order: str, schedules: dict[float, list[Schedule]]) -> None:
    """Tokens after each layer that were learned, and how many of those that went were pruned."""
    left, pruned = {}, {}
    for budget, found in schedules.items():
        left[f"{100 * budget:g} %"] = [schedule.counts for schedule in found]
        pruned[f"{100 * budget:g} %"] = [
            np.subtract((runs.model.num_tokens, *schedule.counts[:-1]), schedule.prune) for schedule in found
        ]
    figure = plots.by_layer({"tokens after the layer": left, "tokens pruned at the layer": pruned})
    name = f"{runs.name}_learned" if order == PUBLISHED else f"{runs.name}_learned_{order}"
    plots.save(figure, runs.context.results, name)


def _picture(runs: Runs, schedules: dict[float, list[Schedule]]) -> None:
    """What is kept, merged and dropped after each layer, for a few test images, at the smallest budget."""
    config, result = runs.base
    dataset = data.build(config.data, split="test", batch_size=4, seed=0)
    images = next(iter(dataset.eval_batches(1)))["image"]
    schedule = schedules[min(schedules)][0]
    model, origins, titles = runs.model, [], []
    for layer in range(model.depth):
        # The schedule up to here and nothing after it leaves the tokens as they are after this layer.
        rest = model.depth - layer - 1
        until = Schedule(
            schedule.prune[: layer + 1] + (model.num_tokens,) * rest,
            schedule.merge[: layer + 1] + (model.num_tokens,) * rest,
        ).on(model.num_tokens)
        reduced = model.clone(hooks=(as_reduce(until),))
        apply = jax.jit(lambda params, x, reduced=reduced: reduced.apply({"params": params}, x)[1]["token_set"].origin)
        origins.append(np.asarray(apply(result.state.params, jnp.asarray(images))))
        titles.append(f"layer {layer + 1}: {until.counts[layer]}")
    figure = plots.merged_patches(images, origins, model.grid[1:], titles, skip=1)
    plots.save(figure, runs.context.results, f"{runs.name}_regions")
