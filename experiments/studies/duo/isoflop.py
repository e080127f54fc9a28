# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Depths against dense models of several sizes that were all trained with as many multiply-accumulates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from adaptive import flops
from adaptive.depth import mixture_of_depths
from experiments import data, tasks, train
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.study import Context

TITLE = (
    "Models of several widths, each trained until it has spent the same multiply-accumulates (forward passes of {gmacs:.0f} "
    "GMACs): dense, and with every other block run for a share of the bytes (Mixture-of-Depths), which leaves more steps. "
    "Cross-entropy in nats on held-out text; with the predictor, no byte's routing depends on later ones, as in decoding; "
    "top-k sees the whole sequence."
)
COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("width", "width"),
    tables.Column("steps", "steps"),
    tables.Column("MMACs / example", "mmacs", 1),
    tables.Column("cross-entropy", "cross_entropy", 3),
    tables.Column("with top-k", "top_k", 3),
)


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the table and the plot; returns the ids of the rows."""
    rows = []
    budget = _budget(context, settings)
    for seed in settings["seeds"]:
        for width in settings["widths"]:
            for share in (0.0, *settings["shares"]):
                config = _config(context, settings, width, share, seed)
                config = apply_overrides(config, {"steps": max(round(budget / _macs(config)), 1)})
                name = f"isoflop-width{width}-share{share:g}-seed{seed}"
                rows.append(
                    context.rows.make(
                        name, config, functools.partial(_row, context, config, name, width, share, settings["batches"])
                    )
                )
    tables.write(context.results, "isoflop", TITLE.format(gmacs=budget / 1e9), rows, COLUMNS, receipts=context.receipts)
    panels = [("mmacs", "MMACs / example", "cross_entropy", "cross-entropy (nats)")]
    plots.save(plots.trade_off(rows, panels), context.results, "isoflop")
    return [row["id"] for row in rows]


def _config(context: Context, settings: Mapping[str, Any], width: int, share: float, seed: int) -> ConfigDict:
    sizes = {"model.width": width, "model.mlp_dim": 3 * width, "seed": seed}
    return apply_overrides(context.config("decoder/text.py", f"share={share}"), {**settings["overrides"], **sizes})


def _budget(context: Context, settings: Mapping[str, Any]) -> float:
    """MACs of forward passes: those of the dense model of the middle width over the settings' steps."""
    middle = settings["widths"][len(settings["widths"]) // 2]
    return settings["steps"] * _macs(_config(context, settings, middle, 0.0, 0))


def _macs(config: ConfigDict) -> float:
    """Of one update's forward pass."""
    model, length = tasks.build(config).model, config.data.length
    counts = None
    if model.routing is not None:
        few = mixture_of_depths.capacity(model.routing.share, length)
        counts = [few if model.routing.acts(layer) else length for layer in range(model.depth)]
    return flops.count(model, batch=config.batch_size, tokens=length, counts=counts).macs


def _row(context: Context, config: ConfigDict, name: str, width: int, share: float, batches: int) -> dict[str, Any]:
    params = context.train(name, config).state.params
    losses = {}
    dataset = data.build(config.data, split="test", batch_size=config.batch_size, seed=config.seed)
    for choice in ("predictor", "top_k") if share else ("dense",):
        task = tasks.build(config)
        if share:
            routing = dataclasses.replace(task.model.routing, choice=choice)
            task = dataclasses.replace(task, model=task.model.clone(routing=routing))
        program = train.build_program(config, task, dataset.spec)
        losses[choice] = train.evaluate(program, params, {}, dataset.eval_batches(batches))["cross_entropy"]
    method = f"MoD {100 * share:g} %" if share else "dense"
    return {
        "group": f"{method}-{width}",
        "method": method,
        "width": width,
        "steps": config.steps,
        "mmacs": _macs(config) / config.batch_size / 1e6,
        "cross_entropy": losses["predictor" if share else "dense"],
        "top_k": losses.get("top_k", "-"),
    }
