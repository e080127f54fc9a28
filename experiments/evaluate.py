# SPDX-License-Identifier: Apache-2.0
"""Evaluates a checkpoint: quality, tokens kept, compute, realised speedup over the dense model with the same weights.

    python -m experiments.evaluate --workdir=runs/vit
    python -m experiments.evaluate --workdir=runs/vit --set model.reduction.method=tome --set model.reduction.r=4
    python -m experiments.evaluate --workdir=runs/mrt5 --split=test --step=best --batches=20

`--set` changes keys of the run's config that do not change its parameters, so that a training-free method can be tried on
any checkpoint. The row is printed, and appended to `evaluations.jsonl` in the workdir.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from tabulate import tabulate

from experiments import config as config_lib
from experiments import data, measure, parallel, tasks, train
from experiments.checkpoints import Checkpointer
from experiments.config import load_config
from experiments.memory import keep_freed_pages
from experiments.rundir import config_hash, git_revision, versions


def assess(
    program: train.Program,
    task: Any,
    params: Any,
    extra: Any,
    dataset: Any,
    *,
    batches: int | None = None,
    speed: bool = True,
    repeats: int = 5,
) -> dict[str, Any]:
    """Metrics of one pass over `dataset`, MACs for an example, and the implied and realised speedup over the dense model.

    Args:
      program: compiled functions of `task`, with its mesh.
      task, params, extra: what to evaluate.
      dataset: see `experiments.data`.
      batches: at most so many; all when None.
      speed: also time the evaluation step against that of `task.dense()` on one batch.
      repeats: timed calls of each.
    """
    result: dict[str, Any] = train.evaluate(program, params, extra, dataset.eval_batches(batches))
    dense = task.dense()
    macs, dense_macs = task.count(result).macs, dense.count({**result, "kept": 1.0}).macs
    result |= {"gmacs": macs / 1e9, "implied": dense_macs / macs}
    if not speed:
        return result
    with parallel.on_mesh(program.mesh):
        batch = parallel.shard_batch(program.mesh, next(iter(dataset.eval_batches(1))))
        dense_step = jax.jit(lambda p, b: dense.eval_step(p, b, extra=extra))
        functions = {
            "dense": functools.partial(dense_step, params, batch),
            "adaptive": functools.partial(program.eval_step, params, batch, extra),
        }
        times = measure.interleaved(functions, repeats=repeats)
    result["realised"] = times["dense"].median / times["adaptive"].median
    result["milliseconds"] = {name: 1e3 * timing.median for name, timing in times.items()}
    return result


def restore(workdir: epath.Path, config: ConfigDict, program: train.Program, step: int | str | None) -> Any:
    """`(params, step)` of a checkpoint: the moving average where the run keeps one.

    Raises:
      FileNotFoundError, CheckpointMismatch: there is none, or the config asks for other parameters.
    """
    settings = config.checkpoint
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        every=settings.every,
        keep=settings.keep,
        best_metric=settings.best or None,
        best_mode=settings.best_mode,
    )
    try:
        collection = "ema" if config.ema else "params"
        restored = checkpointer.restore_params(program.state.params, step, collection=collection)
    finally:
        checkpointer.close()
    return restored.state, restored.step


def evaluate(
    workdir: str, *, overrides: dict[str, Any] | None = None, split: str = "", step: Any = None, **options: Any
):
    """One row of results for a run; see the module docstring. `options` go to `assess`."""
    directory = epath.Path(workdir)
    config = load_config(directory)
    trained = config_hash(config)
    config = config_lib.apply_overrides(config, overrides or {})
    config_lib.validate(config)
    task = tasks.build(config)
    dataset = data.build(config.data, split=split or config.eval.split, batch_size=config.batch_size, seed=config.seed)
    program = train.build_program(config, task, dataset.spec)
    params, found = restore(directory, config, program, step)
    started = time.time()
    result = assess(program, task, params, task.init_extra(), dataset, **options)
    return {
        **{key: value for key, value in result.items() if not isinstance(value, dict)},
        "milliseconds": result.get("milliseconds", {}),
        "step": int(found),
        "split": split or config.eval.split,
        "config_hash": trained,
        "overrides": overrides or {},
        "seed": config.seed,
        "device": measure.device_name(),
        "versions": versions(),
        "revision": git_revision(),
        "seconds": round(time.time() - started, 2),
    }


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["model.reduction.r=4"]` as `{"model.reduction.r": 4}`; values are JSON, else text.

    Raises:
      ValueError: an item without "=".
    """
    result = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE; got {item!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        result[key.removeprefix("config.")] = tuple(value) if isinstance(value, list) else value
    return result


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, evaluates, prints and appends the row; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of experiments.train")
    parser.add_argument("--split", default="", help="data split; the run's evaluation split when not given")
    parser.add_argument("--step", default="", help="a step, or best; the newest when not given")
    parser.add_argument("--batches", type=int, default=None, help="at most so many batches (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    parser.add_argument("--no-speed", action="store_true", help="leave out the timing")
    options = parser.parse_args(argv)
    step = int(options.step) if options.step.isdigit() else options.step or None
    try:
        row = evaluate(
            options.workdir,
            overrides=parse_overrides(options.set),
            split=options.split,
            step=step,
            batches=options.batches,
            speed=not options.no_speed,
        )
    except (ValueError, KeyError, FileNotFoundError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    with (epath.Path(options.workdir) / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {key: value for key, value in row.items() if isinstance(value, int | float | str)}
    print(tabulate(shown.items(), floatfmt=".4f"))
    return 0


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
