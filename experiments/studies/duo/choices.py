# SPDX-License-Identifier: Apache-2.0
"""How the choices of router and oracle differ, by layer and by class of byte, and which bytes are hard."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptive.routing import difficulty
from adaptive.width import duo
from experiments.byte_classes import CLASSES, class_of
from experiments.data import byte_vocab
from experiments.studies import plots, tables
from experiments.studies.duo.measured import Measured
from experiments.studies.study import Context

# Shares of the hardest bytes whose part in the whole gain is told.
HARDEST = (0.01, 0.1, 0.5)

LAYER_TITLE = (
    "Share of bytes that meet the big module of each layer, at a mean of {budget} of {layers} big modules, and how often "
    "router and oracle agree, beside what independent choices of the same frequencies would."
)
LAYER_COLUMNS = (
    tables.Column("layer", "layer"),
    tables.Column("oracle's big %", "oracle_big", 1),
    tables.Column("router's big %", "router_big", 1),
    tables.Column("agreement %", "agreement", 1),
    tables.Column("by chance %", "chance", 1),
)
CLASS_TITLE = (
    "Bytes by class of the byte that is predicted: loss with small modules everywhere, gain of the best path with at most "
    "{budget} of {layers} big modules over it (the difficulty), mean number of big modules, and agreement over all layers."
)
CLASS_COLUMNS = (
    tables.Column("class", "class"),
    tables.Column("bytes %", "share", 1),
    tables.Column("loss, all small", "loss", 3),
    tables.Column("gain", "gain", 3),
    tables.Column("oracle's big", "oracle_big", 2),
    tables.Column("router's big", "router_big", 2),
    tables.Column("agreement %", "agreement", 1),
)
DIFFICULTY_TITLE = (
    "Difficulty of a byte: loss with small modules everywhere minus that of its best path among all patterns, and the same for "
    "shuffled labels. Part of the whole gain that the hardest bytes hold, and correlation with the loss itself."
)
DIFFICULTY_COLUMNS = (
    tables.Column("labels", "labels"),
    tables.Column("mean gain", "gain", 3),
    *(tables.Column(f"in the hardest {100 * share:g} %", f"hardest{share:g}", 3) for share in HARDEST),
    tables.Column("correlation with the loss", "correlation", 3),
    tables.Column("gain of big everywhere", "all_big", 3),
)


def run(context: Context, measured: Sequence[Measured], shown: int) -> list[str]:
    """Makes the rows, the tables, the plot by layer and the heat map over `shown` lines of text; returns the rows' ids."""
    layers = measured[0].model.layers
    budget = layers // 2
    rows: dict[str, list[dict[str, Any]]] = {"layers": [], "classes": [], "difficulty": []}

    def add(table: str, one: Measured, name: str, build: functools.partial) -> None:
        rows[table].append(context.rows.make(f"{name}-seed{one.seed}", one.config, build))

    for one in measured:
        chosen = functools.cache(functools.partial(_chosen, one, budget))
        for layer in range(layers):
            add("layers", one, f"layer{layer}", functools.partial(_layer, chosen, layer))
        for index, name in enumerate(CLASSES):
            add("classes", one, f"class-{name}", functools.partial(_class, one, chosen, index))
        for labels in ("true", "shuffled"):
            add("difficulty", one, f"difficulty-{labels}", functools.partial(_difficulty, one, labels))
    about = {"budget": budget, "layers": layers}
    tables.write(
        context.results, "layers", LAYER_TITLE.format(**about), rows["layers"], LAYER_COLUMNS, receipts=context.receipts
    )
    tables.write(
        context.results,
        "classes",
        CLASS_TITLE.format(**about),
        rows["classes"],
        CLASS_COLUMNS,
        receipts=context.receipts,
    )
    tables.write(
        context.results,
        "difficulty",
        DIFFICULTY_TITLE,
        rows["difficulty"],
        DIFFICULTY_COLUMNS,
        receipts=context.receipts,
    )
    _figures(context, measured[0], rows["layers"], shown)
    return [row["id"] for table in rows.values() for row in table]


def _chosen(one: Measured, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(oracle's paths, router's paths [S, T, L], gain [S, T])` at a budget."""
    members = one.members(budget)
    paths = one.patterns[members][one.losses["true"][members].argmin(axis=0)]
    within = np.concatenate([one.members(count) for count in range(budget + 1)])
    best = one.losses["true"][within].min(axis=0)
    gains = difficulty.gain(one.losses["true"][one.uniform(duo.SMALL)], best)
    return paths, one.routed(budget)[1], np.asarray(gains)


def _layer(chosen: Any, layer: int) -> Mapping[str, Any]:
    oracle, router, _ = chosen()
    same, chance = difficulty.agreement(jnp.asarray(oracle), jnp.asarray(router), len(duo.CHOICES))
    return {
        "group": f"layer{layer}",
        "layer": layer,
        "oracle_big": 100 * float((oracle[..., layer] == duo.BIG).mean()),
        "router_big": 100 * float((router[..., layer] == duo.BIG).mean()),
        "agreement": 100 * float(same[layer]),
        "chance": 100 * float(chance[layer]),
    }


def _class(one: Measured, chosen: Any, index: int) -> Mapping[str, Any]:
    oracle, router, gains = chosen()
    groups = class_of(jnp.asarray(one.test.labels))
    values = {
        "loss": one.losses["true"][one.uniform(duo.SMALL)],
        "gain": gains,
        "oracle_big": (oracle == duo.BIG).sum(axis=-1),
        "router_big": (router == duo.BIG).sum(axis=-1),
        "agreement": 100 * (oracle == router).mean(axis=-1),
    }
    found = {name: difficulty.by_group(jnp.asarray(array), groups, len(CLASSES)) for name, array in values.items()}
    count = float(found["loss"][1][index])
    # A class without a byte in the text has no mean.
    means = {name: float(total[index]) / count if count else "-" for name, (total, _) in found.items()}
    return {"group": CLASSES[index], "class": CLASSES[index], "share": 100 * count / groups.size, **means}


def _difficulty(one: Measured, labels: str) -> Mapping[str, Any]:
    losses = one.losses[labels]
    small = losses[one.uniform(duo.SMALL)]
    gains = difficulty.gain(small, losses.min(axis=0))
    parts = difficulty.concentration(jnp.asarray(gains), HARDEST)
    return {
        "group": labels,
        "labels": labels,
        "gain": float(gains.mean()),
        **{f"hardest{share:g}": float(part) for share, part in zip(HARDEST, parts, strict=True)},
        "correlation": float(difficulty.correlation(jnp.asarray(small), jnp.asarray(gains))),
        "all_big": float((small - losses[one.uniform(duo.BIG)]).mean()),
    }


def _figures(context: Context, one: Measured, layers: list[dict[str, Any]], shown: int) -> None:
    """Bars of big modules by layer, and the text with the difficulty of each byte."""
    groups = tables.grouped(layers)
    bars = {
        f"layer {group[0]['layer']}": {
            name: float(np.mean([row[f"{name}_big"] for row in group])) for name in ("oracle", "router")
        }
        for group in groups
    }
    plots.save(plots.bars(bars, "bytes that meet the big module (%)"), context.results, "layers")
    small = one.losses["true"][one.uniform(duo.SMALL)]
    gains = difficulty.gain(small, one.losses["true"].min(axis=0))
    lines = []
    for title, values in (
        ("loss with small modules everywhere (nats)", small),
        ("gain of the best path (nats)", gains),
    ):
        text = [(one.test.labels[row] - byte_vocab.OFFSET).astype(np.uint8).tobytes() for row in range(shown)]
        lines.append((title, b"".join(text), np.concatenate(values[:shown])))
    plots.save(plots.text_heat(lines), context.results, "difficulty")
