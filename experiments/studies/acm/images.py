# SPDX-License-Identifier: Apache-2.0
"""ACM and its neighbours on images: accuracy against compute, ablations, corrupted inputs, measured speedup."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments import tasks
from experiments.studies import plots, tables
from experiments.studies.acm import pictures
from experiments.studies.acm.baselines import BASELINES
from experiments.studies.acm.runs import Runs, at_equal_compute, where_reached
from experiments.studies.study import Context
from experiments.tasks.acm import Acm

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("setting", "setting"),
    tables.Column("accuracy %", "accuracy", 2),
    tables.Column("MMACs / image", "mmacs", 2),
    tables.Column("share of dense MACs %", "share_of_dense", 1),
    tables.Column("share of learners' cost %", lambda row: 100 * row["share"] if row["method"] == "acm" else None, 1),
)
TITLE = (
    "A ViT on {data}; every method goes on from the same dense model of its seed. MACs count gates, routers and heads. "
    "The setting is a target share of the learners' cost for acm, learners for uniform, a threshold for exits, a target depth "
    "for avit, experts for moefication, a ratio for mc_moe, a target share for dydit."
)
EQUAL_COLUMNS = (
    tables.Column("acm target", "setting"),
    tables.Column("MMACs / image", "mmacs", 2),
    tables.Column("acm accuracy %", "accuracy", 2),
    tables.Column("against", "other"),
    tables.Column("its accuracy % at that compute", where_reached("reached"), 2),
    tables.Column("acm above by, points", where_reached("gain"), 2),
    tables.Column("seeds in which acm is above", "above"),
)
EQUAL_TITLE = (
    "Accuracy at equal compute, seed by seed: the curve of the other method (its better cheaper settings included, the dense "
    "model at its end) interpolated at the compute that ACM used; 'beyond its reach' below its cheapest setting."
)
ABLATIONS = {
    "all phases and losses": {},
    "without gate pre-training": {"model.acm.phases.gate_steps": 0},
    "without distillation": {"model.acm.phases.distill_steps": 0},
    "2 learners": {"model.acm.learners": 2},
    "8 learners": {"model.acm.learners": 8},
    "budget loss alone": {"model.acm.entropy_weight": 0.0, "model.acm.diversity_weight": 0.0},
    "without diversity": {"model.acm.diversity_weight": 0.0},
    "distillation loss at the end": {"model.acm.loss": "distillation"},
}
ABLATION_TARGET = 0.5


def acm_rows(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """ACM at every budget, from one distillation and one pre-training of gates."""
    for target in settings["targets"]:
        config = runs.config(model__acm__target=target)

        def build(config: Any = config, target: float = target) -> tuple[Any, Any]:
            result = runs.phases(config).tuned(runs.teacher(), runs.gated(), f"acm-{target:g}")
            return Acm.from_config(config), result.state.average

        yield runs.row("acm", f"{target:g}", config, build, speed=True)


def dense_row(runs: Runs) -> dict[str, Any]:
    """The dense model."""
    config = runs.phases(runs.config()).dense_config()
    return runs.row("dense", "", config, lambda: (tasks.build(config), runs.teacher()))


def run(context: Context, part: str, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, tables and plots of one data set; returns the ids of the rows."""
    rows, other = [], []
    for seed in context.settings["seeds"]:
        runs = Runs(context, part, settings, seed)
        rows += [dense_row(runs), *acm_rows(runs, settings)]
        for name in settings["baselines"]:
            rows += BASELINES[name](runs, settings)
        if settings["batches"]:
            other += speed_rows(runs, settings)
        if settings.get("ablations"):
            other += corrupted_rows(runs, settings)
        if seed == context.settings["seeds"][0]:
            if settings.get("ablations"):
                other += ablation_rows(runs)
            pictures.images(runs, context, settings["targets"])
    _report(context, part, rows)
    _report_others(context, part, other)
    return [row["id"] for row in (*rows, *other)]


def ablation_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """What each phase, loss and the number of learners is worth, at one target."""
    for name, changes in ABLATIONS.items():
        config = runs.config(**{"model.acm.target": ABLATION_TARGET, **changes})
        run_name = "ablation-" + name.replace(" ", "_").replace(",", "") if changes else f"acm-{ABLATION_TARGET:g}"

        def build(config: Any = config, changes: Any = changes, run_name: str = run_name) -> tuple[Any, Any]:
            params = _before_last_phase(runs, config, changes, run_name)
            return Acm.from_config(config), runs.phases(config).tuned(runs.teacher(), params, run_name).state.average

        yield runs.row("acm", name, config, build, kind="ablation")


def _before_last_phase(runs: Runs, config: Any, changes: Mapping[str, Any], run_name: str) -> Any:
    """Parameters with trained learners and gates: those of the budgets, unless a change concerns an earlier phase."""
    phases = runs.phases(config)
    own_learners = not changes.keys().isdisjoint({"model.acm.learners", "model.acm.phases.distill_steps"})
    if not own_learners and "model.acm.phases.gate_steps" not in changes:
        return runs.gated()
    params = phases.distilled(runs.teacher(), f"{run_name}-distilled") if own_learners else runs.distilled()
    return phases.gated(runs.teacher(), params, f"{run_name}-gated")


def noise(images: np.ndarray) -> np.ndarray:
    """Gaussian noise of deviation 0.5 of the normalised pixels, the same for every evaluation."""
    return images + np.random.default_rng(0).normal(scale=0.5, size=images.shape).astype(images.dtype)


def blur(images: np.ndarray) -> np.ndarray:
    """The mean over 3 x 3 pixels."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    return sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)) / images.dtype.type(9)


CORRUPTIONS = {"clean": lambda images: images, "noise": noise, "blur": blur}


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A data set whose images go through a function before they are evaluated."""

    inner: Any
    change: Callable[[np.ndarray], np.ndarray]

    @property
    def spec(self) -> Any:
        """That of the data set."""
        return self.inner.spec

    def eval_batches(self, limit: int | None = None) -> Iterator[Any]:
        """Batches of changed images."""
        for batch in self.inner.eval_batches(limit):
            yield {**batch, "image": self.change(np.asarray(batch["image"]))}


def corrupted_rows(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Dense, ACM at the middle target and half the learners for all, on corrupted images."""
    target = settings["targets"][len(settings["targets"]) // 2]
    acm_config, uniform_config = runs.config(model__acm__target=target), runs.config(model__acm__uniform=2)
    dense_config = runs.phases(runs.config()).dense_config()

    def acm_build() -> tuple[Any, Any]:
        result = runs.phases(acm_config).tuned(runs.teacher(), runs.gated(), f"acm-{target:g}")
        return Acm.from_config(acm_config), result.state.average

    def uniform_build() -> tuple[Any, Any]:
        result = runs.phases(uniform_config).tuned(runs.teacher(), runs.distilled(), "uniform-2")
        return Acm.from_config(uniform_config), result.state.average

    builds = {
        "dense": (dense_config, lambda: (tasks.build(dense_config), runs.teacher())),
        "acm": (acm_config, acm_build),
        "uniform": (uniform_config, uniform_build),
    }
    for name, change in CORRUPTIONS.items():
        for method, (config, build) in builds.items():
            if method == "uniform" and "uniform" not in settings["baselines"]:
                continue
            dataset = lambda change=change: Corrupted(runs.dataset(), change)  # noqa: E731
            yield runs.row(method, name, config, build, kind="corrupted", dataset=dataset)


def speed_rows(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Implied and realised speedup of ACM at the largest, middle and smallest target, for several batch sizes."""
    targets = settings["targets"]
    for target in dict.fromkeys((targets[0], targets[len(targets) // 2], targets[-1])):
        for size in settings["batches"]:
            config = runs.config(model__acm__target=target)

            def build(config: Any = config, target: float = target) -> tuple[Any, Any]:
                result = runs.phases(config).tuned(runs.teacher(), runs.gated(), f"acm-{target:g}")
                return Acm.from_config(config), result.state.average

            yield runs.row(
                "acm",
                f"{target:g}, batch {size}",
                config,
                build,
                kind="speed",
                dataset=lambda size=size: runs.dataset(batch_size=size),
                speed=True,
            )


def _report(context: Context, part: str, rows: list[dict[str, Any]]) -> None:
    title = TITLE.format(data="cluttered digits" if part == "images" else part)
    tables.write(context.results, "table" if part == "images" else part, title, rows, COLUMNS)
    level = {"accuracy": float(np.mean([row["accuracy"] for row in rows if row["method"] == "dense"]))}
    shown = [row for row in rows if row["method"] != "dense"]
    panels = [("share_of_dense", "share of dense MACs %", "accuracy", "accuracy %")]
    plots.save(plots.trade_off(shown, panels, level=level), context.results, f"{part}_trade_off")
    methods = dict.fromkeys(row["method"] for row in shown if row["method"] != "acm")
    equal = [found for other in methods for found in at_equal_compute(rows, "acm", other, "accuracy", higher=True)]
    equal = [{**row, "group": f"{row['setting']} {row['other']}", "above": _above(row)} for row in equal]
    tables.write(context.results, f"{part}_equal_compute", EQUAL_TITLE, equal, EQUAL_COLUMNS, receipts=())
    budget = [row for row in rows if row["method"] == "acm"]
    pictures.budgets(context, part, budget)


def _above(row: Mapping[str, Any]) -> str:
    if row["gain"] is None:
        return f"seed {row['seed']}: beyond its reach"
    return f"seed {row['seed']}: {'yes' if row['gain'] > 0 else 'no'}"


OTHER_TABLES = {
    "ablation": (
        "ablations",
        f"ACM at a target of {ABLATION_TARGET}, with something left out or changed.",
        (
            tables.Column("ACM", "setting"),
            tables.Column("accuracy %", "accuracy", 2),
            tables.Column("share of learners' cost %", lambda row: 100 * row["share"], 1),
            tables.Column("share of dense MACs %", "share_of_dense", 1),
        ),
    ),
    "corrupted": (
        "corrupted",
        "Accuracy on corrupted test images; noise has half the deviation of the pixels, blur is the mean over 3 x 3.",
        (
            tables.Column("images", "setting"),
            tables.Column("method", "method"),
            tables.Column("accuracy %", "accuracy", 2),
            tables.Column("share of dense MACs %", "share_of_dense", 1),
        ),
    ),
    "speed": (
        "speedup",
        "Speedup of ACM over all learners with no gates, same weights, interleaved medians on this machine; a model this small "
        "pays more for gates and sorting than a large one (`python -m experiments.bench acm`).",
        (
            tables.Column("target and batch", "setting"),
            tables.Column("share of dense MACs %", "share_of_dense", 1),
            tables.Column("implied speedup", "implied", 2),
            tables.Column("realised speedup", "realised", 2),
        ),
    ),
}


def _report_others(context: Context, part: str, rows: list[dict[str, Any]]) -> None:
    for kind, (name, title, columns) in OTHER_TABLES.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            tables.write(context.results, f"{part}_{name}", title, chosen, columns)
