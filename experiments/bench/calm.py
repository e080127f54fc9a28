# SPDX-License-Identifier: Apache-2.0
"""Confidence exits: decoding in which each row stops at a layer of its own, by batch size, against all layers.

Rows that go on are packed (`layers.rows`); those that stopped still store keys and values in every layer above, and
every test runs the head: `implied` counts neither, but only the layers that each row itself needed.
Weights are random and the threshold is the median confidence after `--first` layers, so that about half of the tokens stop
there; what a threshold costs in quality is for trained models.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adaptive import flops
from adaptive.depth import calm
from experiments import measure
from experiments.bench import decoder
from layers.early_exit import ConfidenceExit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    decoder.add_arguments(parser, length=64)
    parser.add_argument("--measure", default="margin", choices=calm.MEASURES[:2], help="(default %(default)s)")
    parser.add_argument("--first", type=int, default=4, help="layers before the first test (default %(default)s)")
    parser.add_argument("--every", type=int, default=4, help="layers between tests (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size."""
    model, variables = decoder.make(options)
    slots, steps = options.length + options.max_length, options.max_length
    exits = ConfidenceExit(options.measure, first=options.first, every=options.every, decay=math.inf)
    threshold = median_confidence(model, variables, decoder.prompts(options, 8), exits)
    exits = ConfidenceExit(options.measure, threshold, options.first, options.every, decay=math.inf)
    for batch, ids, dense in decoder.each_batch(options, model, variables, temperature=1.0):
        left = decoder.Decode(model.clone(policy=exits), variables, ids, steps, temperature=1.0)
        calls = {"dense": dense, "calm": left}
        times = measure.interleaved(calls, repeats=options.repeats)
        ran = left.tokens.mean(axis=1)
        spec = model.spec().decoding()
        macs = [
            flops.count(spec, batch=batch, slots=slots, steps=steps, layer_steps=own).macs
            for own in (None, ran.tolist())
        ]
        facts = {
            "measure": options.measure,
            "layers_a_token": round(float(ran.sum() / steps), 3),
            "layers_a_step": round(float(left.steps.sum() / steps), 3),
        }
        yield decoder.row(options, decoder.shape_of(options, batch), times, macs, **facts)


def median_confidence(model: Any, variables: Any, ids: Any, exits: ConfidenceExit) -> float:
    """The median over tokens of the confidence at the first test."""

    def confidence(module: Any, ids: Any) -> Any:
        states = module(ids, output_hidden_states=True)[1]["hidden_states"]
        pair = (states[exits.first].reshape(-1, model.width), states[exits.first - 1].reshape(-1, model.width))
        return exits.confidence(*pair, module)

    return float(np.median(jax.jit(functools.partial(model.apply, method=confidence))(variables, ids)))
