# SPDX-License-Identifier: Apache-2.0
"""How every part of the study trains and evaluates: a dense model first, then each method goes on from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from adaptive import registry
from experiments import data, tasks, train
from experiments.evaluate import assess
from experiments.rundir import apply_overrides
from experiments.studies.graft import graft
from experiments.studies.study import Context
from experiments.train import TrainResult

# Larger batches than in training: a small model's time is otherwise that of starting operations.
EVALUATION_BATCH = 128


@dataclasses.dataclass(frozen=True)
class Setup:
    """One setting of a table; its rows differ in the seed only.

    Attributes:
      method: as the tables name it.
      rate: target share of bytes deleted, or None.
      arg: argument of the config file.
      overrides: of the config, by dotted key.
      start: name of the dense setup whose parameters it goes on from; "" starts from random ones.
    """

    method: str
    rate: float | None = None
    arg: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: str = "base"

    @property
    def name(self) -> str:
        """Of its group of rows, and of its runs: a directory name that no shell has to quote."""
        method = re.sub(r"[^\w=.]+", "_", self.method)
        return method if self.rate is None else f"{method}-{self.rate:g}"


@dataclasses.dataclass(frozen=True)
class Runs:
    """Trains and evaluates setups of one part of the study.

    Attributes:
      context: of the study; part: folder of the runs.
      config: file under `configs/`.
      bases: the dense setups by name; `base`, `tune`: overrides for their training, and for all other training.
      gate: overrides for the training of learned gates.
      trained: the dense models, once they are.
    """

    context: Context
    part: str
    config: str
    bases: Mapping[str, Setup]
    base: Mapping[str, Any]
    tune: Mapping[str, Any]
    gate: Mapping[str, Any]
    trained: dict[str, TrainResult] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        context: Context,
        part: str,
        settings: Mapping[str, Any],
        bases: Mapping[str, Setup],
        everywhere: Mapping[str, Any] = MappingProxyType({}),
    ) -> Runs:
        """The runs that the settings of a part describe; `everywhere` are overrides of all of them."""
        base, tune = ({**settings[name], **everywhere} for name in ("base", "tune"))
        return cls(context, part, settings["config"], bases, base, tune, settings.get("gate", {}))

    def fit(self, setup: Setup, seed: int) -> tuple[ConfigDict, TrainResult]:
        """`(config, result)` of a setup trained from its dense model; a finished run is only read."""
        config = self._tuned(setup, seed)
        params = graft(config, self._base(setup.start).state.params) if setup.start else None
        return config, self.context.train(self._run(setup, seed), config, params=params)

    def row(self, setup: Setup, seed: int, more: Callable[[], Mapping[str, Any]] = dict) -> dict[str, Any]:
        """The row of a setup on the test split: every scalar that the evaluation found, by its name, and what `more` adds.

        Nothing is trained for a row that is there.
        """
        build = functools.partial(self._evaluate, setup, seed, more)
        return self.context.rows.make(self._run(setup, seed), self._tuned(setup, seed), build)

    def _run(self, setup: Setup, seed: int) -> str:
        return f"{self.part}/{setup.name}-seed{seed}"

    def _tuned(self, setup: Setup, seed: int) -> ConfigDict:
        config = self._config(setup, {**self.tune, **setup.overrides, "seed": seed})
        gate = config.model.get("gate", "")
        learned = gate and registry.describe(gate).trained == "yes"
        return apply_overrides(config, dict(self.gate)) if learned else config

    def _base(self, name: str) -> TrainResult:
        """One dense model for all seeds, as the paper has one ByT5."""
        if name not in self.trained:
            setup = self.bases[name]
            config = self._config(setup, {**self.base, **setup.overrides, "seed": 0})
            self.trained[name] = self.context.train(f"{self.part}/{setup.name}", config)
        return self.trained[name]

    def _config(self, setup: Setup, overrides: Mapping[str, Any]) -> ConfigDict:
        return apply_overrides(self.context.config(self.config, setup.arg), dict(overrides))

    def _evaluate(self, setup: Setup, seed: int, more: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        config, result = self.fit(setup, seed)
        run, task, settings = self._run(setup, seed), tasks.build(config), self.context.settings
        self.context.say(f"evaluating {run}")
        dataset = data.build(config.data, split="test", batch_size=EVALUATION_BATCH, seed=config.seed)
        program = train.build_program(config, task, dataset.spec)
        sizes = dict(batches=settings["batches"], repeats=settings["repeats"])
        found = assess(program, task, result.state.params, result.state.extra, dataset, **sizes)
        dense = task.dense() == task
        return {
            **found,
            "group": f"{self.part}/{setup.name}",
            "method": setup.method,
            "rate": setup.rate,
            # The dense row is compared with itself, which only measures noise.
            "realised": 1.0 if dense else found["realised"],
            "milliseconds_per_example": found["milliseconds"]["dense" if dense else "adaptive"] / EVALUATION_BATCH,
            "command": self.context.evaluate_command(run, "test", {"batch_size": EVALUATION_BATCH}),
            **more(),
        }

    def trace(self, setup: Setup, seed: int, metric: str) -> tuple[list[int], list[float]]:
        """`(steps, values)` of a training metric that a run wrote."""
        path = self.context.runs / self._run(setup, seed) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        points = [(row["step"], row[f"train/{metric}"]) for row in rows if f"train/{metric}" in row]
        return [step for step, _ in points], [value for _, value in points]
