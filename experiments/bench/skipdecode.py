# SPDX-License-Identifier: Apache-2.0
"""SkipDecode: decoding in fewer layers the later a token comes, against all layers and against a fixed choice of them.

All rows of a batch skip the same layers, so that a skipped layer costs nothing; one compiled step serves all positions.
Weights are random, as time does not depend on them. `implied` counts the layers that ran, with the head; reading the prompt is
not part of it. "skipdecode" is the falling schedule that runs `depth / speedup` layers on average, "evenly_spaced" the same
layers at all positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from adaptive import flops
from adaptive.depth import skip_decode
from experiments import measure
from experiments.bench import decoder
from experiments.bench.flags import floats
from layers.early_exit import FixedLayers, SkipSchedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    decoder.add_arguments(parser, length=64)
    parser.add_argument("--speedup", type=floats, default=(2.0, 3.0), help="targets, in layers (default 2,3)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch size and target two rows."""
    model, variables = decoder.make(options)
    slots, steps = options.length + options.max_length, options.max_length
    for batch, ids, dense in decoder.each_batch(options, model, variables):
        for speedup in options.speedup:
            counts = skip_decode.counts_for_speedup(model.depth, speedup, horizon=steps)
            policies = {
                "skipdecode": SkipSchedule(counts),
                "evenly_spaced": FixedLayers(skip_decode.evenly_spaced(model.depth, speedup)),
            }
            calls = {
                name: decoder.Decode(model.clone(policy=policy), variables, ids, steps)
                for name, policy in policies.items()
            }
            times = measure.interleaved({"dense": dense, **calls}, repeats=options.repeats)
            for name, call in calls.items():
                macs = [
                    flops.count(model.spec().decoding(), batch=batch, slots=slots, steps=steps, layer_steps=own).macs
                    for own in (None, call.steps.tolist())
                ]
                shape = decoder.shape_of(options, batch, f"target {speedup:g}")
                facts = {"method": name, "layers_a_token": float(call.steps.sum() / steps)}
                yield decoder.row(options, shape, {"dense": times["dense"], name: times[name]}, macs, **facts)
