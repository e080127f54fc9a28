# SPDX-License-Identifier: Apache-2.0
"""How every part of the study trains and evaluates: one dense model a seed, from which every method goes on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import data, train
from experiments.acm import Phases
from experiments.evaluate import assess
from experiments.rundir import apply_overrides
from experiments.studies import tables
from experiments.studies.study import Context
from experiments.tasks.acm import loads
from experiments.train import TrainResult

# Larger than in training: a small model's time is otherwise that of starting operations.
EVALUATION_BATCH = 128


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one part and one seed.

    Attributes:
      context: of the study; part: folder of the runs.
      settings: of the part: `config`, `overrides`, `arg` of the config file where it takes one, and `evaluated` where it looks
        at another number of batches than the suite (0: all).
      made: parameters that several rows start from, once they are.
    """

    context: Context
    part: str
    settings: Mapping[str, Any]
    seed: int
    made: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def config(self, **changes: Any) -> ConfigDict:
        """The config of the last phase with `changes`, whose names may hold dots as two underscores."""
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        base = self.context.config(self.settings["config"], self.settings.get("arg", ""))
        return apply_overrides(base, {**self.settings["overrides"], **changes, "seed": self.seed})

    def train(self, name: str, config: ConfigDict, **options: Any) -> TrainResult:
        """Trains a run, continues it, or reads it."""
        return self.context.train(f"{self.part}/{name}-seed{self.seed}", config, **options)

    def phases(self, config: ConfigDict) -> Phases:
        """The phases of a config, as runs of this part."""
        return Phases(config, self.train)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def teacher(self) -> Any:
        """Parameters of the dense model."""
        return self.once("dense", self.phases(self.config()).dense)

    def distilled(self) -> Any:
        """Parameters with learners that imitate it."""
        return self.once("distilled", lambda: self.phases(self.config()).distilled(self.teacher()))

    def gated(self) -> Any:
        """Parameters with trained gates as well."""
        return self.once("gated", lambda: self.phases(self.config()).gated(self.teacher(), self.distilled()))

    def dataset(self, split: str = "test", batch_size: int = EVALUATION_BATCH) -> Any:
        """A split of the data."""
        return data.build(self.config().data, split=split, batch_size=batch_size, seed=self.seed)

    def row(
        self,
        method: str,
        setting: str,
        config: ConfigDict,
        build: Callable[[], tuple[Any, Any]],
        *,
        kind: str = "trade_off",
        dataset: Callable[[], Any] | None = None,
        speed: bool = False,
    ) -> dict[str, Any]:
        """The row of a method in a setting; `build` gives task and parameters, and is not called for a row that is there."""
        group = f"{self.part}/{kind}/{method}" + (f"-{setting}" if setting else "")
        make = functools.partial(self._evaluate, group, method, setting, kind, build, dataset, speed)
        return self.context.rows.make(f"{group}-seed{self.seed}", config, make)

    def _evaluate(
        self, group: str, method: str, setting: str, kind: str, build: Any, dataset: Any, speed: bool
    ) -> dict[str, Any]:
        task, params = build()
        self.context.say(f"evaluating {group}-seed{self.seed}")
        dataset = self.dataset() if dataset is None else dataset()
        program = train.build_program(self.config(), task, dataset.spec)
        evaluated = self.settings.get("evaluated", self.context.settings["evaluated"])
        options = dict(batches=evaluated or None, repeats=self.context.settings["repeats"])
        found = assess(program, task, params, task.init_extra(), dataset, speed=speed, **options)
        load = loads(found)
        plain = {name: float(v) for name, v in found.items() if isinstance(v, float | np.floating)}
        plain = {name: value for name, value in plain.items() if not name.startswith(("load/", "macs/"))}
        quality = {"accuracy": 100 * found["accuracy"]} if "accuracy" in found else {}
        return {
            **plain,
            **quality,
            "load": {path: list(shares.values()) for path, shares in load.items()},
            "group": group,
            "kind": kind,
            "part": self.part,
            "method": method,
            "setting": setting,
            "mmacs": 1e3 * found["gmacs"],
            "share_of_dense": 100 / found["implied"],
            "command": f"python -m experiments.reproduce --suite={self.context.suite} --only=acm",
        }


def at_equal_compute(
    rows: list[dict[str, Any]], method: str, other: str, quality: str, *, higher: bool
) -> list[dict[str, Any]]:
    """Rows of `method`, each with what `other` (and the dense model) reaches at the same compute, seed by seed.

    Between two settings of `other` it is interpolated linearly; below its cheapest one it is None: it cannot go there.
    """
    found = []
    for row in (row for row in rows if row["method"] == method):
        curve = sorted(
            (r["mmacs"], r[quality]) for r in rows if r["method"] in (other, "dense") and r["seed"] == row["seed"]
        )
        curve = _best_so_far(curve, higher)
        spent, reached = zip(*curve, strict=True)
        value = None if row["mmacs"] < spent[0] else float(np.interp(row["mmacs"], spent, reached))
        gain = None if value is None else (row[quality] - value) * (1 if higher else -1)
        found.append({**row, "other": other, "reached": value, "gain": gain})
    return found


def where_reached(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """Of a table's row: an entry that is None where the other method cannot go."""
    return lambda row: tables.BEYOND if row[name] is None else row[name]


def _best_so_far(curve: list[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The curve of whoever may always take a cheaper setting that is better."""
    best, kept = None, []
    for spent, reached in curve:
        best = reached if best is None else (max if higher else min)(best, reached)
        kept.append((spent, best))
    return kept
