# SPDX-License-Identifier: Apache-2.0
"""MrT5's hard deletion on a byte-level T5: implied and realised speedup through the bucket ladder.

The encoder is measured alone, and with a decoder that scores targets. Weights are random, as time does not depend on
them; the bias of the learned gate is set so that the asked share of all bytes is deleted, and rows differ in how many.
`implied` counts the bytes that are left on average, `realised` pays for the rung that the longest row needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import flops, ragged
from experiments import measure
from experiments.bench import t5
from layers.t5 import T5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    t5.add_arguments(parser, length=1024, rungs=16, deleted="0.5", repeats=5)
    parser.add_argument("--targets", type=int, default=189, help="decoder bytes (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size, deleted share and part of the model."""
    model, variables = t5.make(options, options.targets)
    for batch in options.batch:
        for deleted in options.deleted:
            yield from _rows(options, model, variables, batch, deleted)


def _rows(options: argparse.Namespace, model: T5, variables: Any, batch: int, deleted: float) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, 259, (batch, options.length)), jnp.int32)
    targets = jnp.asarray(rng.integers(3, 259, (batch, options.targets)), jnp.int32)
    variables = t5.set_deleted_share(model, variables, ids, deleted)
    for part, decoder in (("encoder", None), ("encoder+decoder", targets)):
        hard = jax.jit(lambda v, i, t: model.apply(v, i, None, t, deletion="hard"))
        kept = hard(variables, ids, decoder)[1]["tokens"][-1]
        functions = {
            "dense": measure.compiled_call(lambda v, i, t: model.apply(v, i, None, t)[0], variables, ids, decoder),
            "hard": measure.compiled_call(
                lambda v, i, t: model.apply(v, i, None, t, deletion="hard")[0], variables, ids, decoder
            ),
        }
        times = measure.interleaved(functions, repeats=options.repeats)
        sizes = dict(batch=batch, inputs=options.length, targets=0 if decoder is None else options.targets)
        counts = model.spec().gated_counts(options.length, float(jnp.mean(kept)), options.gate_layer)
        macs = [flops.count(model, **sizes, counts=c).macs for c in (None, counts)]
        implied, realised = macs[0] / macs[1], times["dense"].median / times["hard"].median
        rungs = ragged.check_rungs(model.rungs, options.length)
        yield {
            "part": part,
            "shape": f"{options.variant} {batch}x{options.length}, {deleted} deleted after layer {options.gate_layer}",
            "device": measure.device_name(),
            "dtype": options.dtype,
            "implied": round(implied, 4),
            "realised": round(realised, 4),
            "realised_share": round(realised / implied, 4),
            "kept": [int(count) for count in kept],
            "rung": rungs[int(ragged.choose_rung(kept, rungs))],
            "padding_waste": round(float(ragged.padding_waste(kept, rungs)), 4),
            "milliseconds": {n: [round(1e3 * t, 2) for t in (v.low, v.median, v.high)] for n, v in times.items()},
            "gmacs": [round(m / 1e9, 3) for m in macs],
            "repeats": options.repeats,
        }
