# SPDX-License-Identifier: Apache-2.0
"""The exhaustive oracle of a Duo-LLM against each pattern as a forward pass of its own.

`realised` is the time of all patterns as separate passes over that of the oracle; a separate pass is one compiled program for
all patterns, in which a layer's `switch` runs the chosen module alone, timed on a sample of patterns. `implied` is the ratio of
their multiply-accumulates. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.core import meta

from adaptive import flops
from adaptive.routing import oracle, patterns
from adaptive.width import duo
from experiments import measure
from layers.duo_lm import DuoLM
from layers.duo_oracle import as_layered, embed, token_losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--layers", type=int, default=8, help="layers, all routed (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the residual stream (default %(default)s)")
    parser.add_argument("--big", type=int, default=1_152, help="inner width of the big modules (default %(default)s)")
    parser.add_argument("--small", type=int, default=72, help="inner width of the small modules (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--capacity", type=int, default=81, help="states in a block of the walk (default %(default)s)")
    parser.add_argument(
        "--sample", type=int, default=32, help="patterns timed as separate passes (default %(default)s)"
    )


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row: all patterns of skip, small and big."""
    model = DuoLM(width=options.width, layers=options.layers, heads=4, big=options.big, small=options.small)
    ids, labels = jax.random.randint(jax.random.key(0), (2, options.batch, options.tokens), 3, 259)
    shapes = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), ids, method="soft")))["params"]
    params = measure.random_like(shapes, jax.random.key(1), deviation=0.05)

    def search(params: Any, ids: Any, labels: Any) -> Any:
        layered = as_layered(model, params, lambda logits: token_losses(logits, labels))
        return oracle.exhaustive(layered, embed(model, params, ids), capacity=options.capacity)

    compiled = jax.jit(search).lower(params, ids, labels).compile()
    started = time.perf_counter()
    best = jax.block_until_ready(compiled(params, ids, labels))
    seconds = time.perf_counter() - started

    every = patterns.all_patterns(options.layers, len(duo.CHOICES))
    sample = every[np.random.default_rng(0).choice(len(every), min(options.sample, len(every)), replace=False)]
    separate = jax.jit(lambda params, ids, labels, pattern: _forward(model, params, ids, labels, pattern))
    jax.block_until_ready(separate(params, ids, labels, sample[0]))
    times, lowest = [], np.inf
    for pattern in sample:
        started = time.perf_counter()
        losses = jax.block_until_ready(separate(params, ids, labels, pattern))
        times.append(time.perf_counter() - started)
        lowest = np.minimum(lowest, np.asarray(losses))
    # A wrong answer has no speed: no pattern of the sample may beat the oracle.
    if (slack := float(np.min(lowest - np.asarray(best.loss).min(axis=0)))) < -1e-3:
        raise AssertionError(f"a separate pass is {-slack:.2e} nats below the oracle's best pattern")
    mean = statistics.fmean(times)
    yield {
        "shape": f"{options.batch}x{options.tokens} tokens, {options.layers} layers, {len(every)} patterns",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "device": measure.device_name(),
        "dtype": "float32",
        "capacity": options.capacity,
        "implied": round(_implied(model, options), 2),
        "realised": round(len(every) * mean / seconds, 2),
        "oracle_seconds": round(seconds, 2),
        "separate_seconds": round(len(every) * mean, 2),
        "separate_pass_milliseconds": [round(1e3 * f(times), 2) for f in (min, statistics.median, max)],
        "sample": len(sample),
    }


def _forward(model: DuoLM, params: Any, ids: Any, labels: Any, pattern: Any) -> Any:
    """The losses of one pattern, which is not known when the program is compiled; only the chosen modules run."""
    layered = as_layered(model, params, lambda logits: token_losses(logits, labels))
    x = embed(model, params, ids)
    for layer in range(model.layers):
        branches = [lambda x, layer=layer, c=c: layered.step(x, layer, c) for c in range(layered.choices)]
        x = jax.lax.switch(pattern[layer], branches, layered.shared(x, layer))
    return layered.readout(x)


def _implied(model: DuoLM, options: argparse.Namespace) -> float:
    """MACs of all patterns one by one over those of the tree."""
    layers, choices, tokens = model.layers, len(duo.CHOICES), options.tokens
    leaves, inner = choices**layers, (choices**layers - 1) // (choices - 1)
    each = layers / choices
    separate = leaves * flops.Count(model.macs(tokens=tokens, big=each, small=each)).macs
    once = model.macs(tokens=tokens, big=1, small=1)
    tree = inner * (once["attention"] / layers + once["big"] + once["small"]) + leaves * once["head"]
    return separate / tree
