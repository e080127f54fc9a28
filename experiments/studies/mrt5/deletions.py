# SPDX-License-Identifier: Apache-2.0
"""Which bytes are deleted: by class of byte, and in a picture of held-out text."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, tasks
from experiments.byte_classes import CLASSES
from experiments.data import byte_vocab
from experiments.studies import plots, tables
from experiments.studies.mrt5.runs import Runs, Setup
from experiments.studies.mrt5.trade_off import BASES, DELETIONS, deletion_setups
from experiments.studies.study import Context

TITLE = "Share of bytes deleted, by class of byte, on held-out text (%)."
COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("target deletion %", lambda row: 100 * row["rate"], 0),
    *(tables.Column(name, lambda row, name=name: _percent(row[f"deleted/{name}"]), 1) for name in CLASSES),
)


def _percent(share: float | str) -> float | str:
    # Of a class that the text has no byte of no share is deleted: NaN, which rows hold as text.
    return "-" if math.isnan(float(share)) else 100 * share


def run(context: Context, settings: Mapping[str, Any]) -> None:
    """Writes the table of deleted bytes by class and the picture, both at the middle rate of the trade-off."""
    runs = Runs.of(context, "trade_off", settings, BASES)
    setups = deletion_setups(DELETIONS, (settings["rates"][len(settings["rates"]) // 2],))
    rows = [runs.row(setup, seed) for seed in context.settings["seeds"] for setup in setups]
    tables.write(context.results, "classes", TITLE, rows, COLUMNS)
    _picture(context, runs, setups, settings["shown"])


def _picture(context: Context, runs: Runs, setups: Sequence[Setup], shown_texts: int) -> None:
    """Draws held-out texts with the bytes that each method deletes."""
    lines = []
    for setup in setups:
        config, result = runs.fit(setup, context.settings["seeds"][0])
        task = tasks.build(config)
        dataset = data.build(config.data, split="test", batch_size=shown_texts, seed=config.seed)
        ids = next(iter(dataset.eval_batches(1)))["input_ids"]
        apply = functools.partial(task.model.apply, deletion="soft", rngs={"deletion": jax.random.key(0)})
        kept = jax.jit(lambda params, ids, apply=apply: apply({"params": params}, ids)[1]["kept"])
        keep = np.asarray(kept(result.state.params, jnp.asarray(ids)))
        # Sentinels and the end of sequence have no byte; they show as a dot.
        text = ids - byte_vocab.OFFSET
        plain = (text >= 0) & (text < byte_vocab.BYTES)
        shown = np.where(plain, text, 0).astype(np.uint8)
        title = f"{setup.method}: {100 * keep.mean():.0f} % of the bytes stay"
        lines += [(title, row.tobytes(), stays) for row, stays in zip(shown, keep, strict=True)]
    plots.save(plots.deleted_bytes(lines), context.results, "bytes")
