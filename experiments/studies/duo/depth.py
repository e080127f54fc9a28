# SPDX-License-Identifier: Apache-2.0
"""Speed and quality of decoding with fewer layers: SkipDecode, fixed layers and confidence exits, by batch size."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive.depth import skip_decode
from experiments import data, measure, tasks
from experiments.rundir import apply_overrides
from experiments.studies import plots, tables
from experiments.studies.study import Context
from layers.duo_oracle import token_losses
from layers.early_exit import ConfidenceExit, FixedLayers, SkipSchedule

TITLE = (
    "Decoding with a cache: held-out text is read up to its middle, then continued byte by byte with the true bytes, by one "
    "model trained to predict at every layer, without any schedule in training. Layers: mean over bytes of the layers that "
    "ran, of {depth}; run for the batch: layers of a step that any row needed. Cross-entropy in nats of the continued bytes. "
    "Realised: time of decoding with all layers over that with the method, same weights, same batch, interleaved medians."
)
COLUMNS = (
    tables.Column("method", "method"),
    tables.Column("setting", "setting"),
    tables.Column("batch", "batch"),
    tables.Column("cross-entropy", "cross_entropy", 3),
    tables.Column("layers", "layers", 2),
    tables.Column("run for the batch", "batch_layers", 2),
    tables.Column("bytes / s", "speed", 0),
    tables.Column("implied speedup", "implied", 2),
    tables.Column("realised speedup", "realised", 2),
)


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the table and the plot; returns the ids of the rows."""
    rows = []
    for seed in settings["seeds"]:
        overrides = {**settings["overrides"], "seed": seed}
        config = apply_overrides(context.config("decoder/text.py", "exit_losses=rising"), overrides)
        found = functools.cache(functools.partial(_measure, context, config, settings))
        for name in _policies(settings, config):
            for batch in settings["batches"]:
                build = functools.partial(_row, found, name, batch)
                rows.append(context.rows.make(f"decoding-{name}-batch{batch}-seed{seed}", config, build))
    depth = apply_overrides(context.config("decoder/text.py"), settings["overrides"]).model.depth
    tables.write(context.results, "decoding", TITLE.format(depth=depth), rows, COLUMNS, receipts=context.receipts)
    panels = [("speed", "bytes / s", "cross_entropy", "cross-entropy (nats)")]
    panels.append(("implied", "implied speedup", "realised", "realised speedup"))
    shown = [{**row, "line": f"{row['method']}, batch {row['batch']}"} for row in rows if row["method"] != "all layers"]
    plots.save(plots.trade_off(shown, panels, line="line"), context.results, "decoding")
    return [row["id"] for row in rows]


def _policies(settings: Mapping[str, Any], config: ConfigDict) -> dict[str, tuple[str, float, Any]]:
    """`{name: (method, setting, policy)}`."""
    depth, horizon = config.model.depth, _continued(config)
    found = {"all": ("all layers", 1.0, None)}
    for speedup in settings["speedups"]:
        counts = skip_decode.counts_for_speedup(depth, speedup, horizon=horizon)
        found[f"skip_decode-{speedup:g}"] = ("skip_decode", speedup, SkipSchedule(counts))
        layers = skip_decode.evenly_spaced(depth, speedup)
        found[f"fixed-{speedup:g}"] = ("fixed layers", speedup, FixedLayers(layers))
    for threshold in settings["thresholds"]:
        policy = ConfidenceExit("margin", threshold, first=2, length=horizon)
        found[f"calm-{threshold:g}"] = ("calm, margin", threshold, policy)
    return found


def _continued(config: ConfigDict) -> int:
    """Bytes that are continued: those behind the first half, and the last of that half, which the first step reads."""
    return config.data.length - _prompt(config) + 1


def _prompt(config: ConfigDict) -> int:
    return config.data.length // 2


def _measure(
    context: Context, config: ConfigDict, settings: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Losses, layers and times of every policy at every batch size, in one process."""
    params = context.train(f"exits-seed{config.seed}", config).state.params
    model = tasks.build(config).model
    largest = max(settings["batches"])
    dataset = data.build(config.data, split="test", batch_size=largest, seed=config.seed)
    batches = list(dataset.eval_batches(settings["quality_batches"]))
    policies, found = _policies(settings, config), {}
    prompt = _prompt(config)
    programs = {
        name: jax.jit(functools.partial(_decode, model.clone(policy=policy)))
        for name, (_, _, policy) in policies.items()
    }
    prefills = {
        name: jax.jit(functools.partial(_prefill, model.clone(policy=policy), prompt, _continued(config)))
        for name, (_, _, policy) in policies.items()
    }
    for size in settings["batches"]:
        context.say(f"decoding at batch {size}")
        calls = {}
        for name in policies:
            ids, labels = (jnp.asarray(batches[0][key][:size]) for key in ("input_ids", "labels"))
            cache = prefills[name](params, ids)
            calls[name] = functools.partial(
                programs[name], params, cache, ids[:, prompt - 1 :], labels[:, prompt - 1 :]
            )
        times = measure.interleaved(calls, repeats=settings["repeats"])
        for name in policies:
            tokens, steps = (np.asarray(array) for array in calls[name]()[1:])
            found[name, size] = {
                "layers": float(tokens.sum() / (size * _continued(config))),
                "batch_layers": float(steps.sum() / _continued(config)),
                "speed": size * _continued(config) / times[name].median,
                "implied": float(model.depth * _continued(config) / steps.sum()),
                # The run of all layers is compared with itself, which only measures noise.
                "realised": 1.0 if name == "all" else times["all"].median / times[name].median,
            }
    for name in policies:
        losses = [_quality(programs[name], prefills[name], params, batch, prompt) for batch in batches]
        for size in settings["batches"]:
            found[name, size]["cross_entropy"] = float(np.mean(losses))
    return {key: {**values, **_about(policies[key[0]])} for key, values in found.items()}


def _about(policy: tuple[str, float, Any]) -> dict[str, Any]:
    return {"method": policy[0], "setting": f"{policy[1]:g}"}


def _quality(program: Any, prefill: Any, params: Any, batch: Mapping[str, Any], prompt: int) -> float:
    ids, labels = (jnp.asarray(batch[key]) for key in ("input_ids", "labels"))
    losses = program(params, prefill(params, ids), ids[:, prompt - 1 :], labels[:, prompt - 1 :])[0]
    return float(jnp.mean(losses))


def _prefill(model: Any, prompt: int, continued: int, params: Any, ids: Any) -> Any:
    return model.apply({"params": params}, ids[:, :prompt], max_length=continued, method="prefill")[0]


def _decode(model: Any, params: Any, cache: Any, ids: Any, labels: Any) -> tuple[Any, Any, Any]:
    """Losses `[T, B]` of continuing with the true bytes, and the tokens and steps that each layer ran for."""

    def step(cache: Any, item: Any) -> tuple[Any, Any]:
        token, label, position = item
        logits, cache = model.apply({"params": params}, cache, token, position, method="decode_step")
        return cache, token_losses(logits[:, None], label[:, None])[:, 0]

    cache, losses = jax.lax.scan(step, cache, (ids.T, labels.T, jnp.arange(ids.shape[1])))
    return losses, cache.tokens, cache.steps


def _row(found: Any, name: str, batch: int) -> dict[str, Any]:
    return {"group": f"{name}-batch{batch}", "batch": batch, **found()[name, batch]}
