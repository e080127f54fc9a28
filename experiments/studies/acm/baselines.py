# SPDX-License-Identifier: Apache-2.0
"""The rows of the methods that ACM is compared with, on a ViT; each gives rows for all its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import tasks
from experiments.studies.acm.runs import Runs
from experiments.studies.graft import graft
from experiments.tasks.acm import Acm
from experiments.tasks.width import DynamicWidth, Grouped, RouterTraining, moefy, with_routers
from layers.experts import DynamicParts, ExpertParts

GROUPS = 16


def _plain(runs: Runs, task: str, **model: Any) -> ConfigDict:
    """The config of another task on the dense model, trained as long as the last phase of ACM."""
    config = runs.config().copy_and_resolve_references()
    with config.unlocked():
        config.task = task
        del config.model["acm"]
        config.model.update(model)
    return config


def _like(config: ConfigDict, **marks: Any) -> ConfigDict:
    """The config, marked with what is not part of it, so that rows of other settings differ."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(marks)
    return config


def uniform(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same number of learners for every token."""
    del settings
    for number in (1, 2, 3):
        config = runs.config(model__acm__uniform=number)

        def build(config: ConfigDict = config, number: int = number) -> tuple[Any, Any]:
            phases = runs.phases(config)
            result = phases.tuned(runs.teacher(), runs.distilled(), f"uniform-{number}")
            return Acm.from_config(config), result.state.average

        yield runs.row("uniform", f"{number}", config, build)


def _exits(runs: Runs, settings: Mapping[str, Any], name: str, **model: Any) -> Iterator[dict[str, Any]]:
    config = _plain(runs, "early_exit", **model)
    trained = f"{name} trained"

    def params() -> Any:
        return runs.once(trained, lambda: runs.train(name, config, params=graft(config, runs.teacher())).state.average)

    for threshold in settings["thresholds"]:

        def build(threshold: float = threshold) -> tuple[Any, Any]:
            task = dataclasses.replace(tasks.build(config), threshold=threshold, ensemble=name == "ztw")
            return task, params()

        yield runs.row(name, f"{threshold:g}", _like(config, threshold=threshold), build)


def early_exit(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Exits after every block, trained together with it, taken by their own confidence."""
    return _exits(runs, settings, "early_exit", exit_hidden=32)


def ztw(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Cascaded exits on a frozen model, taken by the confidence of their ensemble."""
    return _exits(runs, settings, "ztw", exit_hidden=32, cascade=True, freeze=True)


def avit(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens that halt, for several target depths."""
    for depth in settings["depths"]:
        # Scores must move within a short training: a smaller scale and centre, larger weights.
        halting = dict(
            target_depth=depth, halt_scale=3.0, halt_center=2.0, ponder_weight=0.01 / depth, depth_weight=0.3
        )
        config = _plain(runs, "halting", **halting)

        def build(config: ConfigDict = config, depth: float = depth) -> tuple[Any, Any]:
            result = runs.train(f"avit-{depth:g}", config, params=runs.teacher())
            return tasks.build(config), result.state.average

        yield runs.row("avit", f"{depth:g}", config, build)


def _experts(runs: Runs) -> tuple[ConfigDict, Any]:
    """`(config, function that gives task and parameters)` of the ReLU model in clusters, routers trained."""
    config = _plain(runs, "classification", activation="relu")

    def make() -> tuple[Any, Any]:
        relu = runs.train("relu", config, params=runs.teacher()).state.average
        dense = tasks.build(config)
        parts = ExpertParts(groups=GROUPS, router_hidden=8)
        task = RouterTraining(dense.model.clone(parts=parts))
        params = moefy(relu, task, jax.random.key(runs.seed), _zeros(runs), seed=runs.seed)
        config_routers = _like(config)
        with config_routers.unlocked():
            config_routers.steps = max(config.steps // 2, 1)
            config_routers.optimizer.warmup = 0
            config_routers.optimizer.weight_decay = 0.0
        return task, runs.train("routers", config_routers, task=task, params=params).state.average

    return config, lambda: runs.once("experts", make)


def moefication(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The feed-forward layers' ReLU neurons in clusters, some of which run for each token."""
    config, trained = _experts(runs)
    for experts in settings["experts"]:

        def build(experts: int = experts) -> tuple[Any, Any]:
            task, params = trained()
            parts = dataclasses.replace(task.model.parts, hyper=(("experts", experts),))
            return Grouped(task.model.clone(parts=parts)), params

        yield runs.row("moefication", f"{experts} of {GROUPS}", _like(config, experts=experts), build)


def mc_moe(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same experts, two a token, of which the second is dropped where it weighs little."""
    config, trained = _experts(runs)
    for ratio in settings["ratios"]:

        def build(ratio: float = ratio) -> tuple[Any, Any]:
            task, params = trained()
            parts = dataclasses.replace(task.model.parts, method="mc_moe", hyper=(("ratio", ratio),))
            return Grouped(task.model.clone(parts=parts)), params

        yield runs.row("mc_moe", f"{ratio:g}", _like(config, ratio=ratio), build)


def dydit(runs: Runs, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Channel groups and tokens of the feed-forward layers switched on and off."""
    for target in settings["widths"]:
        config = _like(_plain(runs, "classification"), target=target)

        def build(target: float = target, config: ConfigDict = config) -> tuple[Any, Any]:
            model = tasks.build(_plain(runs, "classification")).model.clone(parts=DynamicParts(groups=4))
            task = DynamicWidth(model, target=target, warmup=config.steps // 3)
            start = with_routers(runs.teacher(), task, jax.random.key(runs.seed), _zeros(runs))
            return task, runs.train(f"dydit-{target:g}", config, task=task, params=start).state.average

        yield runs.row("dydit", f"{target:g}", config, build)


def _zeros(runs: Runs) -> Any:
    spec = runs.dataset("train", 8).spec
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)


BASELINES = {
    "uniform": uniform,
    "early_exit": early_exit,
    "ztw": ztw,
    "avit": avit,
    "moefication": moefication,
    "mc_moe": mc_moe,
    "dydit": dydit,
}
