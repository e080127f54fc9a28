# SPDX-License-Identifier: Apache-2.0
"""Bits per byte and deletion language by language: a gate trained on English alone, and one trained on all languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import data
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.mrt5 import published
from experiments.studies.mrt5.runs import Runs, Setup
from experiments.studies.mrt5.trade_off import UNUSED
from experiments.studies.study import Context

ENGLISH = {"data.languages": ("en",)}
COLUMNS = (
    tables.Column("language", "language"),
    tables.Column("dense", "dense", 3),
    tables.Column("mrt5, all languages", "mrt5", 3),
    tables.Column("length left %", lambda row: 100 * row["mrt5_kept"], 1),
    tables.Column("mrt5, English gate", "mrt5_zero_shot", 3),
    tables.Column("its length left %", lambda row: 100 * row["mrt5_zero_shot_kept"], 1),
    tables.Column("random", "random_deletion", 3),
    tables.Column("paper: length left %", "published", 0),
)
TITLE = (
    "Bits per byte by language, hard deletion at a target of {rate:.0f} %. All start from one dense model of all languages; "
    "the English gate was then trained on English alone (zero-shot elsewhere), model and gate together, as were the others on "
    "all languages. The last column is of Kallini et al. 2025 at ByT5-small scale, on other text."
)


def setups(arg: str, rate: float, languages: tuple[str, ...]) -> list[Setup]:
    """The methods that the table compares; all are evaluated on all languages."""
    # A gate trained on English alone has to meet the other languages.
    everywhere = {"data.eval_languages": languages}
    return [
        Setup("dense", arg=f"{arg},gate=no_deletion", overrides={**UNUSED, **everywhere}),
        Setup("mrt5", rate, f"{arg},gate=mrt5,rate={rate}", everywhere),
        Setup("mrt5_zero_shot", rate, f"{arg},gate=mrt5,rate={rate}", {**ENGLISH, **everywhere}),
        Setup("random_deletion", rate, f"{arg},gate=random_deletion,rate={rate}", everywhere),
    ]


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the table by language and the plot; returns the ids of the rows."""
    folder = context.data.get("text")
    if not folder:
        note = "Not run: no folder of texts in several languages was given (--data text=FOLDER, files LANG_*.txt.gz)."
        context.say(note)
        context.results.mkdir(parents=True, exist_ok=True)
        (context.results / "languages_summary.md").write_text(f"{note}\n")
        return []
    arg, rate, text = settings["arg"], settings["rate"], {"data.path": folder}
    bases = {"base": Setup("base", arg=f"{arg},gate=no_deletion", overrides=UNUSED, start="")}
    languages = tuple(
        group.name for group in data.groups(apply_overrides(context.config(settings["config"], arg), text).data)
    )
    runs = Runs.of(context, "languages", settings, bases, text)
    rows = []
    for seed in context.settings["seeds"]:
        rows += [runs.row(setup, seed) for setup in setups(arg, rate, languages)]
    lines = by_language(rows)
    tables.write(context.results, "languages", TITLE.format(rate=100 * rate), lines, COLUMNS, receipts=())
    figure = plots.bars(
        {line["language"]: _mean(lines, line["language"]) for line in lines}, "bits per byte over the dense model's"
    )
    plots.save(figure, context.results, "languages")
    return [row["id"] for row in rows]


def by_language(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each language and seed, the methods side by side; languages by name, their mean last."""
    head = "bits_per_byte/"
    languages = sorted(name.removeprefix(head) for name in rows[0] if name.startswith(head))
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        methods = {row["method"]: row for row in rows if row["seed"] == seed}
        for language in languages:
            line = {"language": language, "seed": seed, "published": _published(language)}
            for method, row in methods.items():
                line |= {method: row[f"{head}{language}"], f"{method}_kept": row[f"kept/{language}"]}
            found.append({**line, "group": language})
        mean = {key: float(np.mean([line[key] for line in found if line["seed"] == seed])) for key in _numbers(methods)}
        found.append({"language": "mean", "group": "mean", "seed": seed, "published": "-", **mean})
    return found


def _published(language: str) -> float | str:
    return 100 - published.LANGUAGES[language] if language in published.LANGUAGES else "-"


def _numbers(methods: Mapping[str, Any]) -> list[str]:
    return [*methods, *(f"{method}_kept" for method in methods)]


def _mean(lines: list[dict[str, Any]], language: str) -> dict[str, float]:
    """What each method costs in a language, over all seeds."""
    chosen = [line for line in lines if line["language"] == language]
    return {
        method: float(np.mean([line[method] - line["dense"] for line in chosen]))
        for method in ("mrt5", "mrt5_zero_shot", "random_deletion")
    }
