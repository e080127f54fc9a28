# SPDX-License-Identifier: Apache-2.0
"""Speed and quality of decoding with fewer layers: SkipDecode, fixed layers and confidence exits, by batch size."""

from __future__ import annotations

import dataclasses
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
    "Decoding with a cache: held-out text is read up to its middle, then continued byte by byte with the true bytes, by a "
    'model trained to predict at every layer; "trained so" by one that was trained in the layers of its schedule. Layers: '
    "mean over bytes of the layers that ran, of {depth}; run for the batch: layers of a step that any row needed. "
    "Cross-entropy in nats of the continued bytes. Implied: all layers over those that a byte ran, without the tests of "
    "confidence. Realised: time of decoding with all layers over that with the method, same batch, interleaved medians."
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


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to decode.

    Attributes:
      name, setting: of the rows.
      policy: of the model in decoding; None for all layers.
      trained: settings of the model's training beside the suite's.
    """

    name: str
    setting: float
    policy: Any = None
    trained: tuple[tuple[str, Any], ...] = (("model.exit_losses", "rising"),)


def run(context: Context, settings: Mapping[str, Any]) -> list[str]:
    """Makes the rows, the table and the plot; returns the ids of the rows."""
    rows = []
    for seed in settings["seeds"]:
        base = apply_overrides(context.config("decoder/text.py"), {**settings["overrides"], "seed": seed})
        methods = _methods(settings, base)
        found = functools.cache(functools.partial(_measure, context, base, methods, settings))
        for key, method in methods.items():
            config = apply_overrides(base, dict(method.trained))
            for batch in settings["batches"]:
                build = functools.partial(_row, found, key, method, batch)
                rows.append(context.rows.make(f"decoding-{key}-batch{batch}-seed{seed}", config, build))
    depth = apply_overrides(context.config("decoder/text.py"), settings["overrides"]).model.depth
    tables.write(context.results, "decoding", TITLE.format(depth=depth), rows, COLUMNS, receipts=context.receipts)
    panels = [("speed", "bytes / s", "cross_entropy", "cross-entropy (nats)")]
    panels.append(("implied", "implied speedup", "realised", "realised speedup"))
    shown = [{**row, "line": f"{row['method']}, batch {row['batch']}"} for row in rows if row["method"] != "all layers"]
    plots.save(plots.trade_off(shown, panels, line="line"), context.results, "decoding")
    return [row["id"] for row in rows]


def _methods(settings: Mapping[str, Any], config: ConfigDict) -> dict[str, Method]:
    depth, horizon = config.model.depth, _continued(config)
    found = {"all": Method("all layers", 1.0)}
    for speedup in settings["speedups"]:
        counts = skip_decode.counts_for_speedup(depth, speedup, horizon=horizon)
        schedule = SkipSchedule(counts)
        # In training a sequence is a generation: what stands for the prompt runs the layers of the first byte that follows.
        whole = (counts[0],) * (_prompt(config) - 1) + counts
        trained = (("model.skip.counts", whole), ("model.skip_training", True))
        found[f"skip_decode-{speedup:g}"] = Method("skip_decode", speedup, schedule)
        found[f"skip_decode-trained-{speedup:g}"] = Method("skip_decode, trained so", speedup, schedule, trained)
        layers = skip_decode.evenly_spaced(depth, speedup)
        found[f"fixed-{speedup:g}"] = Method("fixed layers", speedup, FixedLayers(layers))
    for threshold in settings["thresholds"]:
        policy = ConfidenceExit("margin", threshold, first=2, length=horizon)
        found[f"calm-{threshold:g}"] = Method("calm, margin", threshold, policy)
    return found


def _continued(config: ConfigDict) -> int:
    """Bytes that are continued: those behind the first half, and the last of that half, which the first step reads."""
    return config.data.length - _prompt(config) + 1


def _prompt(config: ConfigDict) -> int:
    return config.data.length // 2


def _measure(
    context: Context, base: ConfigDict, methods: Mapping[str, Method], settings: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Losses, layers and times of every method at every batch size, in one process."""
    params = {
        trained: context.train(_run_name(trained, base.seed), apply_overrides(base, dict(trained))).state.params
        for trained in dict.fromkeys(method.trained for method in methods.values())
    }
    model = tasks.build(base).model
    dataset = data.build(base.data, split="test", batch_size=max(settings["batches"]), seed=base.seed)
    batches = list(dataset.eval_batches(settings["quality_batches"]))
    prompt, continued, found = _prompt(base), _continued(base), {}
    calls = {
        key: _Continue(model.clone(policy=method.policy), params[method.trained], prompt, continued)
        for key, method in methods.items()
    }
    for size in settings["batches"]:
        context.say(f"decoding at batch {size}")
        ready = {key: call.prepared(batches[0], size) for key, call in calls.items()}
        times = measure.interleaved(ready, repeats=settings["repeats"])
        for key in methods:
            tokens, steps = (np.asarray(array) for array in ready[key]()[1:])
            found[key, size] = {
                "layers": float(tokens.sum() / (size * continued)),
                "batch_layers": float(steps.sum() / continued),
                "speed": size * continued / times[key].median,
                "implied": float(model.depth * size * continued / tokens.sum()),
                # The run of all layers is compared with itself, which only measures noise.
                "realised": 1.0 if key == "all" else times["all"].median / times[key].median,
            }
    for key, call in calls.items():
        losses = [float(jnp.mean(call.prepared(batch, len(batch["labels"]))()[0])) for batch in batches]
        for size in settings["batches"]:
            found[key, size]["cross_entropy"] = float(np.mean(losses))
    return found


def _run_name(trained: tuple[tuple[str, Any], ...], seed: int) -> str:
    counts = dict(trained).get("model.skip.counts")
    return f"exits-seed{seed}" if counts is None else f"skip-{np.mean(counts):.2f}-seed{seed}"


class _Continue:
    """Reading a text up to its middle, apart, and continuing it with the true bytes, which is what is timed."""

    def __init__(self, model: Any, params: Any, prompt: int, continued: int) -> None:
        self._prompt, self._params = prompt, params
        self._prefill = jax.jit(functools.partial(_prefill, model, prompt, continued))
        self._decode = jax.jit(functools.partial(_decode, model))

    def prepared(self, batch: Mapping[str, Any], size: int) -> Any:
        """A call without arguments that continues the first `size` rows."""
        ids, labels = (jnp.asarray(batch[key][:size]) for key in ("input_ids", "labels"))
        start = self._prompt - 1
        cache = self._prefill(self._params, ids)
        return functools.partial(self._decode, self._params, cache, ids[:, start:], labels[:, start:])


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


def _row(found: Any, key: str, method: Method, batch: int) -> dict[str, Any]:
    about = {"method": method.name, "setting": f"{method.setting:g}"}
    return {"group": f"{key}-batch{batch}", "batch": batch, **found()[key, batch], **about}
