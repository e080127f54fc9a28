# SPDX-License-Identifier: Apache-2.0
"""How each data set of the study is run: one dense model, rates learned and schedules searched on it, rows of what they give.

Letters: L layers, N tokens with the class token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from adaptive.rates.schedules import Schedule, Space, cost_of
from adaptive.reduction.diffrate import ORDERS
from experiments import data, search, tasks, train
from experiments.evaluate import assess
from experiments.progress import Progress
from experiments.rundir import apply_overrides
from experiments.studies.graft import graft
from experiments.studies.study import Context
from experiments.tasks.rates import LearnRates
from experiments.train import TrainResult
from layers.vit import ViT

EVALUATION_BATCH = 64
# The order in which tokens go in the paper, of `ORDERS`.
PUBLISHED = "cls_attention"


def learned_name(order: str) -> str:
    """What tables call the rates that were learned for an order."""
    return f"{ORDERS[order].method}, learned"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A schedule that is evaluated.

    Attributes:
      method: registered reduction, "" for the dense model; counts: tokens after each layer.
      prune: tokens after pruning, where the method prunes and merges.
      label: as the tables name it; the method when empty.
      budget: share of the dense multiply-adds that was asked for.
    """

    method: str
    counts: tuple[int, ...] = ()
    prune: tuple[int, ...] = ()
    label: str = ""
    budget: float = 1.0

    @property
    def name(self) -> str:
        """As tables name the method."""
        return self.label or self.method or "dense"

    @property
    def overrides(self) -> dict[str, Any]:
        """Of a config, for this schedule."""
        if not self.method:
            return {}
        layered = {"model.reduction.layered": {"alive": self.prune}} if self.prune else {}
        return {"model.reduction.method": self.method, "model.reduction.counts": self.counts, **layered}


@dataclasses.dataclass(frozen=True)
class Runs:
    """One data set of the study.

    Attributes:
      context: of the study; name: of the data set, and the folder of its runs.
      settings: `config`, `data` and the overrides `base`, `learn`, `tune`, from the study's suites.
      objectives: of searches, by seed and number of calibration images, once they are compiled.
      rates: what `learned` found, by its arguments.
    """

    context: Context
    name: str
    settings: Mapping[str, Any]
    objectives: dict[tuple[int, int], search.Objective] = dataclasses.field(default_factory=dict, repr=False)
    rates: dict[tuple[float, int, str], tuple[ConfigDict, Setup]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of learning and searching."""
        return self.settings.get("seeds", self.context.settings["seeds"])

    @functools.cached_property
    def base(self) -> tuple[ConfigDict, TrainResult]:
        """The dense model: one for all seeds, as the paper starts from one checkpoint."""
        config = self._config("", {**self.settings["base"], "seed": 0})
        return config, self.context.train(f"{self.name}/base", config)

    @functools.cached_property
    def model(self) -> ViT:
        """The dense module."""
        return tasks.build(self.base[0]).model

    @functools.cached_property
    def images(self) -> data.Dataset:
        """The test images, the same for all rows: what a data set keeps of them is made once."""
        return data.build(self.base[0].data, split="test", batch_size=EVALUATION_BATCH, seed=0)

    def space(self, budget: float, **options: Any) -> Space:
        """Schedules within a share of the dense multiply-adds."""
        cost = cost_of(self.model.spec())
        dense = cost((self.model.num_tokens,) * self.model.depth)
        return Space(self.model.depth, self.model.num_tokens, cost, budget * dense, **options)

    def share(self, counts: Sequence[int]) -> float:
        """Multiply-adds of counts over those of the dense model."""
        space = self.space(1.0)
        return space.cost(tuple(counts)) / space.budget

    def uniform(self, method: str, budget: float) -> Setup:
        """A method under ToMe's constant schedule: about as many tokens go at every layer, at most half of them."""
        return Setup(method, self.space(budget, first=0, halving=True).linear(), budget=budget)

    def learned(self, budget: float, seed: int, order: str = PUBLISHED) -> tuple[ConfigDict, Setup]:
        """`(config, setup)` of DiffRate's rates, learned for a budget and an order of the tokens."""
        if (budget, seed, order) not in self.rates:
            self.rates[budget, seed, order] = self._learn(budget, seed, order)
        return self.rates[budget, seed, order]

    def _learn(self, budget: float, seed: int, order: str) -> tuple[ConfigDict, Setup]:
        arg, run = f"rates,target={budget}", f"rates-{budget:g}-seed{seed}"
        if order != PUBLISHED:
            arg, run = f"{arg},order={order}", f"{order}-{run}"
        config = self._config(arg, {**self.settings["base"], **self.settings["learn"], "seed": seed})
        params = graft(config, self.base[1].state.params)
        result = self.context.train(f"{self.name}/{run}", config, params=params)
        task: LearnRates = tasks.build(config)
        method = ORDERS[order].method
        return config, self.joint(task.schedule(result.state.params), learned_name(order), budget, method)

    def joint(self, schedule: Schedule, label: str, budget: float, method: str = "diffrate") -> Setup:
        """A schedule of pruning and merging."""
        return Setup(method, schedule.merge, schedule.prune, label, budget)

    def searched(
        self, method: str, budget: float, seed: int, trials: int, examples: int
    ) -> tuple[Setup, dict[str, Any]]:
        """`(setup, facts)` of a search on calibration images of the training split."""
        objective = self._objective(seed, examples)
        before = objective.evaluations
        with Progress(trials, label=f"{self.name} {method} seed {seed}", min_seconds=5.0) as progress:
            objective.watch(progress)
            counts = search.run(method, self.space(budget, first=0), objective, trials=trials, seed=seed)
        facts = {"calibration_loss": objective(counts), "evaluations": objective.evaluations - before}
        return self.joint(objective.schedule(counts), method, budget), facts

    def _objective(self, seed: int, examples: int) -> search.Objective:
        """The objective of one calibration set, compiled once for all searches on it."""
        if (seed, examples) not in self.objectives:
            config, result = self.base
            self.objectives[seed, examples] = search.Objective(
                self.model,
                result.state.params,
                search.calibration(config, examples=examples, seed=seed),
                path=self.context.runs / self.name / "searches.jsonl",
                identity=search.identity_of(config, result.step, examples, seed),
            )
        return self.objectives[seed, examples]

    def tuned(self, setup: Setup, seed: int) -> tuple[ConfigDict, TrainResult, str]:
        """`(config, result, run)` of the model trained on for a short time under a schedule."""
        overrides = {**self.settings["base"], **self.settings["tune"], **setup.overrides, "seed": seed}
        config = self._config("", overrides)
        run = f"{self.name}/tuned-{setup.method or 'dense'}-{setup.budget:g}-seed{seed}"
        params = graft(config, self.base[1].state.params)
        return config, self.context.train(run, config, params=params), run

    def row(
        self,
        setup: Setup,
        *,
        seed: int = 0,
        config: ConfigDict | None = None,
        tuned: bool = False,
        whole: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The row of a setup on the test split.

        Args:
          seed: of what led to the setup; config: of that, where it is not the dense model's.
          tuned: trained on under the schedule.
          whole: on all test images, however few of them the suite looks at, and not timed.
          more: facts that stand in the row as well.
        """
        kind = "tuned" if tuned else "whole" if whole else "plain"
        made_by = self.base[0] if config is None else config
        identifier = f"{self.name}/{kind}/{setup.name}-{setup.budget:g}-seed{seed}"
        made_by = apply_overrides(made_by.copy_and_resolve_references(), {**setup.overrides, "seed": seed})
        if tuned:
            made_by = apply_overrides(made_by, dict(self.settings["tune"]))
        build = functools.partial(self._evaluate, setup, seed, kind, dict(more or {}))
        return self.context.rows.make(identifier, made_by, build)

    def _evaluate(self, setup: Setup, seed: int, kind: str, more: dict[str, Any]) -> dict[str, Any]:
        config, result = self.base
        run = f"{self.name}/base"
        if kind == "tuned":
            config, result, run = self.tuned(setup, seed)
        self.context.say(f"evaluating {self.name}: {setup.name} at {setup.budget:g} ({kind})")
        overrides = {**setup.overrides, "batch_size": EVALUATION_BATCH}
        changed = apply_overrides(config.copy_and_resolve_references(), overrides)
        task = tasks.build(changed)
        program = train.build_program(changed, task, self.images.spec)
        whole, repeats = kind == "whole", self.context.settings["repeats"]
        batches = 0 if whole else self.context.settings["batches"]
        sizes = dict(batches=batches or None, speed=bool(repeats) and not whole, repeats=repeats)
        found = assess(program, task, result.state.params, {}, self.images, **sizes)
        counts = setup.counts or (self.model.num_tokens,) * self.model.depth
        return {
            "group": f"{self.name}/{kind}/{setup.name}-{setup.budget:g}",
            "data": self.name,
            "tuned": kind == "tuned",
            "method": setup.name,
            "target": 100 * setup.budget,
            "accuracy": 100 * found["accuracy"],
            "cross_entropy": found["cross_entropy"],
            "macs_share": 100 * self.share(counts),
            "mmacs": 1e3 * found["gmacs"],
            "counts": list(counts),
            "prune": list(setup.prune or counts),
            "implied": found["implied"],
            # The dense row is compared with itself, which only measures noise.
            "realised": found.get("realised") if setup.method else 1.0,
            "milliseconds": found.get("milliseconds"),
            "command": self.context.evaluate_command(run, "test", overrides, batches),
            **more,
        }

    def _config(self, arg: str, overrides: Mapping[str, Any]) -> ConfigDict:
        chosen = {**self.settings.get("data", {}), **overrides}
        return apply_overrides(self.context.config(self.settings["config"], arg), chosen)
