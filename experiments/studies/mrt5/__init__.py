# SPDX-License-Identifier: Apache-2.0
"""MrT5's learned gate against random and fixed deletion on a byte-level T5: bits per byte at the sequence length left.

A dense model is trained first; then each method goes on from it for a while, as the paper does from ByT5.
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

from experiments import data, tasks, train
from experiments.data import byte_vocab
from experiments.evaluate import assess
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.study import Context
from experiments.train import TrainResult

DENSE = "no_deletion"
EVALUATION_BATCH = 128
METHODS = ("mrt5", "random_deletion", "fixed_deletion")

# What the full suite changes: the paper's lengths and vocabulary, a model of about 60 M parameters.
FULL = {
    "model.width": 768,
    "model.mlp_dim": 2_048,
    "model.heads": 12,
    "model.head_dim": 64,
    "model.encoder_layers": 9,
    "model.decoder_layers": 3,
    "model.gate_layer": 3,
    "model.rungs": (128, 256, 384, 512, 640, 768, 896, 1_024),
    "data.inputs_length": 1_024,
    "batch_size": 128,
}

# `base`: of the dense model that all start from; `tune`: of every method's own training after that, dense included.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        config="mrt5/continuation.py",
        seeds=(0,),
        base={"steps": 800},
        tune={"steps": 150, "optimizer.warmup": 10, "optimizer.peak": 0.01},
        rates=(0.5, 0.8),
        batches=10,
        repeats=15,
    ),
    "quick": dict(
        config="mrt5/continuation.py",
        seeds=(0, 1, 2),
        base={"steps": 2_000},
        tune={"steps": 400, "optimizer.warmup": 20, "optimizer.peak": 0.01},
        rates=(0.3, 0.5, 0.8),
        batches=20,
        repeats=15,
    ),
    "full": dict(
        config="mrt5/spans.py",
        seeds=(0, 1, 2),
        base={"steps": 30_000, **FULL},
        tune={"steps": 5_000, **FULL, "optimizer.peak": 0.003},
        rates=(0.3, 0.4, 0.5, 0.6, 0.7),
        batches=100,
        repeats=15,
    ),
}

COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("target deletion %", lambda row: 100.0 * (row["rate"] or 0.0), 0),
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
        base = context.train(f"base_seed{seed}", _config(context, DENSE, 0.5, {**settings["base"], "seed": seed}))
        setups = [(DENSE, None), *((method, rate) for method in METHODS for rate in settings["rates"])]
        results = {}
        for method, rate in setups:
            name = "-".join(filter(None, [method, rate and f"{rate:g}", f"seed{seed}"]))
            config = _config(context, method, rate or 0.5, {**settings["tune"], "seed": seed})
            results[method, rate] = config, context.train(name, config, params=_start(config, base))
            context.say(f"evaluating {name}")
            build = functools.partial(_row, context, *results[method, rate], name, method, rate)
            made.append(rows.make(name, config, build)["id"])
        if seed == settings["seeds"][0]:
            rate = settings["rates"][len(settings["rates"]) // 2]
            _picture(context, {method: results[method, rate] for method in METHODS})
    _report(context, rows.keep(made))


def _config(context: Context, method: str, rate: float, overrides: dict[str, Any]) -> ConfigDict:
    # The dense model has a gate that deletes nothing, and does not use it: so its layers are grouped like the others'.
    unused = {"model.deletion.train": "", "model.deletion.evaluate": ""} if method == DENSE else {}
    return apply_overrides(
        context.config(context.settings["config"], f"gate={method},rate={rate}"), {**overrides, **unused}
    )


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
    # Larger batches than in training: a small model's time is otherwise that of starting operations.
    dataset = data.build(config.data, split="test", batch_size=EVALUATION_BATCH, seed=config.seed)
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
        "group": f"{method}-{rate}",
        "method": "dense" if method == DENSE else method,
        "rate": rate,
        "kept": 100 * found["kept"],
        "bits_per_byte": found["bits_per_byte"],
        "mmacs": 1e3 * found["gmacs"],
        "implied": found["implied"],
        "realised": 1.0 if method == DENSE else found["realised"],
        "milliseconds": found["milliseconds"],
        "command": context.evaluate_command(name, "test", {"batch_size": EVALUATION_BATCH}),
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
        "Byte-level T5 on the text of Python's standard library; deletion after the second encoder layer, hard at evaluation. "
        "Compute and time are those of encoding and scoring; realised: time of the dense evaluation step over "
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
