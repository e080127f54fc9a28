# SPDX-License-Identifier: Apache-2.0
"""MrT5's learned gate against random and fixed deletion on a byte-level T5: bits per byte at the sequence length left.

A dense model is trained on span corruption first; then each method goes on from it for a while, as the paper does from ByT5.
Evaluation deletes for real, through the bucket ladder.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from configs.mrt5 import spans
from experiments import data, tasks, train
from experiments.data import byte_vocab
from experiments.evaluate import assess
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.study import Context
from experiments.train import TrainResult

METHODS = ("mrt5", "random_deletion", "fixed_deletion")

# `base`: of the dense model that all start from; `tune`: of every method's own training after that, dense included.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        seeds=(0,),
        base={"steps": 500},
        tune={"steps": 120, "optimizer.warmup": 10, "optimizer.peak": 1e-3},
        rates=(0.3, 0.5, 0.7),
        batches=10,
        repeats=5,
    ),
    "quick": dict(
        seeds=(0, 1, 2),
        base={"steps": 1_000},
        tune={"steps": 250, "optimizer.warmup": 20, "optimizer.peak": 1e-3},
        rates=(0.3, 0.5, 0.7),
        batches=20,
        repeats=7,
    ),
    "full": dict(
        seeds=(0, 1, 2),
        base={"steps": 30_000, **spans.FULL},
        tune={"steps": 5_000, **spans.FULL, "optimizer.peak": 1e-4},
        rates=(0.3, 0.4, 0.5, 0.6, 0.7),
        batches=100,
        repeats=15,
    ),
}

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("target deletion %", lambda row: None if row["rate"] is None else 100 * row["rate"], 0),
    tables.Column("bytes left %", "kept", 1),
    tables.Column("bits per byte", "bits_per_byte", 3),
    tables.Column("MMACs / example", "mmacs", 1),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)


def run(context: Context) -> None:
    """Trains the base and every method at every rate, evaluates, writes the table, the plot and the picture."""
    settings, rows, made = context.settings, context.rows, []
    for seed in settings["seeds"]:
        base = context.train(f"base_seed{seed}", _config("", 0.5, {**settings["base"], "seed": seed}))
        setups = [("", None), *((method, rate) for method in METHODS for rate in settings["rates"])]
        results = {}
        for method, rate in setups:
            name = "-".join(filter(None, [method or "dense", rate and f"{rate:g}", f"seed{seed}"]))
            config = _config(method, rate or 0.5, {**settings["tune"], "seed": seed})
            results[method, rate] = config, context.train(name, config, params=_start(config, base))
            context.say(f"evaluating {name}")
            build = functools.partial(_row, context, *results[method, rate], name, method, rate)
            made.append(rows.make(name, config, build)["id"])
        if seed == settings["seeds"][0]:
            rate = settings["rates"][len(settings["rates"]) // 2]
            _picture(context, {method: results[method, rate] for method in METHODS})
    _report(context, rows.keep(made))


def _config(method: str, rate: float, overrides: dict[str, Any]) -> ConfigDict:
    return apply_overrides(spans.get_config(f"gate={method},rate={rate}"), overrides)


def _start(config: ConfigDict, base: TrainResult) -> Any:
    """The base model's parameters, with a fresh gate where the method has one."""
    task = tasks.build(config)
    if not task.learned:
        return base.state.params
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataset.spec)
    fresh = meta.unbox(jax.jit(task.init)(jax.random.key(config.seed), batch))["params"]
    return {**base.state.params, "delete_gate": fresh["delete_gate"]}


def _row(
    context: Context, config: ConfigDict, result: TrainResult, name: str, method: str, rate: float | None
) -> dict[str, Any]:
    """Evaluates one trained method on the held-out text."""
    task = tasks.build(config)
    dataset = data.build(config.data, split="test", batch_size=config.batch_size, seed=config.seed)
    program = train.build_program(config, task, dataset.spec)
    found = assess(
        program,
        task,
        result.state.params,
        result.state.extra,
        dataset,
        batches=context.settings["batches"],
        repeats=context.settings["repeats"],
    )
    return {
        "group": f"{method or 'dense'}-{rate}",
        "method": method or "dense",
        "rate": rate,
        "kept": 100 * found["kept"],
        "bits_per_byte": found["bits_per_byte"],
        "mmacs": 1e3 * found["gmacs"],
        "implied": found["implied"],
        "realised": found["realised"] if method else 1.0,
        "milliseconds": found["milliseconds"],
        "command": context.evaluate_command(name, "test", {}),
    }


def _picture(context: Context, results: dict[str, tuple[ConfigDict, TrainResult]]) -> None:
    """Which bytes of a held-out text each method deletes."""
    lines = []
    for method, (config, result) in results.items():
        task = tasks.build(config)
        dataset = data.build(config.data, split="test", batch_size=1, seed=config.seed)
        ids = next(iter(dataset.eval_batches(1)))["input_ids"]
        apply = functools.partial(task.model.apply, deletion="soft", rngs={"deletion": jax.random.key(0)})
        kept = jax.jit(lambda params, ids, apply=apply: apply({"params": params}, ids)[1]["kept"])
        keep = np.asarray(kept(result.state.params, jnp.asarray(ids)))[0]
        # Sentinels and the end of sequence have no byte; they show as a dot.
        text = ids[0] - byte_vocab.OFFSET
        plain = (text >= 0) & (text < 256)
        shown = bytes(np.where(plain, text, 0).astype(np.uint8))
        lines.append((f"{method}: {100 * keep.mean():.0f} % of the bytes stay", shown, keep))
    plots.save(plots.deleted_bytes(lines), context.results, "bytes")


def _report(context: Context, rows: list[dict[str, Any]]) -> None:
    """The table and the plot from the rows."""
    title = (
        "Byte-level T5, span corruption on the text of Python's standard library; deletion after the second encoder layer, hard "
        "at evaluation. Compute and time are those of encoding and scoring; realised: time of the dense evaluation step over "
        "that of the deleting one, same weights, same batch, interleaved medians, through the bucket ladder."
    )
    tables.write(context.results, "table", title, rows, COLUMNS)
    dense = {"bits_per_byte": float(np.mean([row["bits_per_byte"] for row in rows if row["method"] == "dense"]))}
    figure = plots.trade_off(
        [row for row in rows if row["method"] != "dense"],
        [
            ("kept", "bytes left %", "bits_per_byte", "bits per byte"),
            ("implied", "implied speedup", "realised", "realised speedup"),
        ],
        level=dense,
    )
    plots.save(figure, context.results, "trade_off")
