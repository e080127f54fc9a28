# SPDX-License-Identifier: Apache-2.0
"""Searches for the token counts of each layer of a trained ViT under a budget of multiply-adds.

    python -m experiments.search --workdir=runs/digits --method=evopress --budget=0.6
    python -m experiments.search --workdir=runs/digits --method=p_sigmoid --budget=0.6 --trials=30 --examples=512

Methods: uniform, random, g_search, p_sigmoid, evopress. The budget is a share of the dense model's multiply-adds. Every
evaluation is written to `searches.jsonl` in the workdir at once and is never made again: the same command, started again after
a kill, goes on where it was, and other methods and budgets profit from what is there. The last line printed is the command that
evaluates what was found with arrays that really shrink.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bayes_opt import BayesianOptimization, acquisition
from etils import epath

from adaptive.rates import search
from adaptive.rates.schedules import Schedule, Space, cost_of
from experiments import data, tasks, train
from experiments import evaluate as evaluation
from experiments.config import load_config
from experiments.memory import keep_freed_pages
from experiments.progress import Progress
from experiments.rundir import config_hash
from experiments.tasks.classification import Classification
from layers.learned_rates import LearnedRates
from layers.vit import ViT

METHODS = ("uniform", "random", "g_search", "p_sigmoid", "evopress")


class Objective:
    """The mean cross-entropy of any schedule on a calibration set, in one compiled step for all schedules.

    Tokens are masked, so schedules are values and not shapes; what inference gathers gives the same logits. The loss of every
    batch under a schedule is kept in a file and read from there instead of computed again, whatever share is asked for.

    Args:
      model: a ViT without hooks; params: its parameters.
      batches: the calibration set, `{"image", "label", "weight"}` each, all of one shape.
      path: JSON lines file of results; identity: of model and calibration set, so that results of others are not taken.
      pruned: share of the tokens that go at a layer which is pruned; the others merge.

    Raises:
      ValueError: no batch, or a model without a class token.
    """

    def __init__(
        self,
        model: ViT,
        params: Any,
        batches: Sequence[Mapping[str, Any]],
        *,
        path: epath.Path,
        identity: str,
        pruned: float = 0.5,
    ):
        if not batches:
            raise ValueError("the calibration set is empty; give it at least one batch")
        if not model.has_class_token:
            raise ValueError("the objective sorts tokens by class attention: the model needs a class token")
        self._hook = LearnedRates(model.depth, model.num_tokens - 1, granularity=1, first=0)
        self._task = Classification(model.clone(hooks=(self._hook,)))
        self._step = jax.jit(functools.partial(self._task.eval_step, extra={}))
        self._params, self._batches = params, batches
        self._weights = [float(np.sum(batch["weight"])) for batch in batches]
        self._path, self._identity, self.pruned = path, f"{identity}, pruned={pruned:g}", pruned
        self._progress: Progress | None = None
        self.calls = self.evaluations = 0
        # Of the first batches, as many as were asked for; a later row of a schedule holds more of them.
        self._losses: dict[tuple[int, ...], list[float]] = {
            tuple(row["counts"]): row["losses"] for row in _rows(path) if row["identity"] == self._identity
        }

    def watch(self, progress: Progress) -> None:
        """Tells `progress` of every call from now on, as one step each; calls beyond its last are not shown."""
        self._progress, self.calls = progress, 0

    def schedule(self, counts: Sequence[int]) -> Schedule:
        """What is pruned and merged so that `counts` tokens are left.

        Raises:
          ValueError: the counts do not fit the model, or `pruned` is outside [0, 1].
        """
        model = self._task.model
        counts = Schedule.of_counts(counts).check(model.depth, model.num_tokens).counts
        return Schedule.split(counts, model.num_tokens, self.pruned)

    def __call__(self, counts: Sequence[int], share: float = 1.0) -> float:
        """The loss of `counts` on the first `share` of the calibration set, at least one batch.

        Raises:
          ValueError: the counts do not fit the model.
        """
        schedule = self.schedule(counts)
        number = max(round(share * len(self._batches)), 1)
        losses = self._losses.setdefault(schedule.counts, [])
        if len(losses) < number:
            losses += self._evaluate(schedule, self._batches[len(losses) : number])
            self.evaluations += 1
            self._remember(schedule.counts)
        loss = float(np.average(losses[:number], weights=self._weights[:number]))
        self.calls += 1
        if self._progress is not None:
            self._progress.update(min(self.calls, self._progress.total_steps), {"loss": loss})
        return loss

    def _evaluate(self, schedule: Schedule, batches: Sequence[Mapping[str, Any]]) -> list[float]:
        params = self._params | {"hooks_0": {"logits": self._logits(schedule)}}
        found = jax.device_get([self._step(params, batch)["cross_entropy"] for batch in batches])
        return [float(total) / float(weight) for total, weight in found]

    def _logits(self, schedule: Schedule) -> jax.Array:
        """Rates that are certain of the schedule. Its one token, where only the class token is left, has no candidate."""
        if min(schedule.prune + schedule.merge) < 2:
            raise ValueError(f"every layer must keep a token beside the class token; got {schedule.merge}")
        numbers = jnp.asarray([schedule.prune, schedule.merge]).T[..., None] - 1
        return jnp.where(numbers == jnp.asarray(self._hook.choices), 100.0, 0.0)

    def _remember(self, counts: tuple[int, ...]) -> None:
        row = {"identity": self._identity, "counts": counts, "losses": self._losses[counts]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            # The line break comes first, so that a row is not lost to the torn line that a kill has left.
            file.write("\n" + json.dumps(row))


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a file, without the torn lines that kills have left."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def suggest(told: Sequence[tuple[search.Point, float]], *, seed: int, initial: int = 5) -> search.Point:
    """The next point of a Bayesian optimiser (Gaussian process, Matern-5/2, expected improvement) after the losses so far.

    The first `initial` points are drawn at random. The same history leads to the same point.
    """
    names = tuple(search.SIGMOID_BOUNDS)
    optimizer = BayesianOptimization(
        None,
        search.SIGMOID_BOUNDS,
        acquisition_function=acquisition.ExpectedImprovement(xi=0.0),
        random_state=seed + len(told),
        verbose=0,
        allow_duplicate_points=True,
    )
    if len(told) < initial:
        point = optimizer.random_sample(1)[0]
    else:
        for place, loss in told:
            optimizer.register(dict(zip(names, place, strict=True)), -loss)
        with warnings.catch_warnings():
            # Length scales at the bounds of their prior are no failure of the search.
            warnings.simplefilter("ignore")
            point = optimizer.suggest()
    return tuple(float(point[name]) for name in names)


def run(method: str, space: Space, objective: search.Evaluate, *, trials: int, seed: int) -> tuple[int, ...]:
    """The counts that a method finds with about `trials` evaluations (g_search takes as many as its bisections need).

    Raises:
      ValueError: an unknown method.
    """
    if method == "uniform":
        return search.uniform_search(space, objective)
    if method == "random":
        return search.random_search(space, objective, trials=trials, seed=seed)
    if method == "g_search":
        return search.g_search_budget(space, objective)
    if method == "p_sigmoid":
        return search.p_sigmoid(space, objective, trials=trials, suggest=functools.partial(suggest, seed=seed))
    if method == "evopress":
        offspring = 8
        return search.evopress(
            space, objective, generations=max(trials // offspring, 1), offspring=offspring, seed=seed
        )
    raise ValueError(f"no search is named {method!r}; there are {', '.join(METHODS)}")


def space_of(model: ViT, budget: float, first: int = 1) -> Space:
    """Schedules of a ViT within a share `budget` of its dense multiply-adds; its `first` layers stay whole.

    Raises:
      ValueError: no schedule meets it.
    """
    cost = cost_of(model.spec())
    dense = cost((model.num_tokens,) * model.depth)
    return Space(model.depth, model.num_tokens, cost, budget * dense, first=first)


def calibration(config: Any, *, examples: int, seed: int, batch_size: int = 64) -> list[dict[str, np.ndarray]]:
    """`examples` training images without augmentation, drawn by the seed, in whole batches.

    Raises:
      ValueError: fewer examples than a batch, or more than there are.
    """
    source = data.build(config.data, split="train", batch_size=batch_size, seed=seed).source
    if not batch_size <= examples <= len(source):
        raise ValueError(f"examples={examples} must lie in {batch_size}..{len(source)}")
    chosen = np.random.default_rng(seed).permutation(len(source))[: examples // batch_size * batch_size]
    entropy = np.zeros((batch_size, 4), np.uint32)
    return [
        {**source.batch(rows, entropy, augment=False), "weight": np.ones(batch_size, np.float32)}
        for rows in chosen.reshape(-1, batch_size)
    ]


def identity_of(config: Any, step: int, examples: int, seed: int) -> str:
    """Names model and calibration set in the file of results."""
    return hashlib.sha256(f"{config_hash(config)}-{step}-{examples}-{seed}".encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, searches and prints what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of experiments.train")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--budget", type=float, required=True, help="share of the dense model's multiply-adds")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--examples", type=int, default=512, help="training images of the calibration set")
    parser.add_argument("--pruned", type=float, default=0.5, help="share of the removed tokens that is pruned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    directory = epath.Path(options.workdir)
    try:
        found = _search(directory, options)
    except (ValueError, KeyError, FileNotFoundError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    changes = {"method": "diffrate", "counts": found["merge"], "layered": {"alive": found["prune"]}}
    flags = " ".join(f"--set 'model.reduction.{key}={json.dumps(value)}'" for key, value in changes.items())
    print(f"python -m experiments.evaluate --workdir={directory} {flags}")
    return 0


def _search(directory: epath.Path, options: argparse.Namespace) -> dict[str, Any]:
    config = load_config(directory)
    task = tasks.build(config)
    if not isinstance(task, Classification):
        raise ValueError(f"schedules are searched for image classification; the run's task is {config.task!r}")
    task = task.dense()
    dataset = data.build(config.data, split="valid", batch_size=config.batch_size, seed=config.seed)
    program = train.build_program(config, task, dataset.spec)
    params, step = evaluation.restore(directory, config, program, None)
    space = space_of(task.model, options.budget)
    label = f"search {options.method}"
    with Progress(options.trials, label=label, log_every=1, min_seconds=2.0) as progress:
        objective = Objective(
            task.model,
            params,
            calibration(config, examples=options.examples, seed=options.seed),
            path=directory / "searches.jsonl",
            identity=identity_of(config, step, options.examples, options.seed),
            pruned=options.pruned,
        )
        objective.watch(progress)
        counts = run(options.method, space, objective, trials=options.trials, seed=options.seed)
    schedule = objective.schedule(counts)
    return {
        "method": options.method,
        "loss": objective(counts),
        "macs_share": space.cost(counts) / space.cost((space.tokens,) * space.layers),
        "evaluations": objective.evaluations,
        "prune": schedule.prune,
        "merge": schedule.merge,
    }


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
