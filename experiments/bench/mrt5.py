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
from flax.core import meta

from adaptive import flops, ragged
from experiments import measure
from experiments.bench.flags import floats, integers
from layers.t5 import SHAPES, T5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--variant", default="byt5-small", choices=sorted(SHAPES), help="shape (default %(default)s)")
    parser.add_argument("--batch", type=integers, default=(2,), help="batch sizes, comma separated (default 2)")
    parser.add_argument("--length", type=int, default=1024, help="encoder bytes (default %(default)s)")
    parser.add_argument("--targets", type=int, default=189, help="decoder bytes (default %(default)s)")
    parser.add_argument("--deleted", type=floats, default=(0.5,), help="shares of bytes deleted (default 0.5)")
    parser.add_argument("--gate-layer", type=int, default=3, help="layers before the gate (default %(default)s)")
    parser.add_argument("--rungs", type=int, default=16, help="rungs of the ladder at most (default %(default)s)")
    parser.add_argument("--multiple", type=int, default=64, help="rungs are multiples of this (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size, deleted share and part of the model."""
    model = T5(
        **SHAPES[options.variant],
        softmax="off_by_one",
        gate="mrt5",
        gate_layer=options.gate_layer,
        rungs=ragged.make_rungs(options.length, steps=options.rungs, multiple=options.multiple),
        # The ladder compiles the layers above the gate once for each rung; scanned, that is one layer a rung.
        scan_layers=True,
        dtype=jnp.dtype(options.dtype),
    )
    key = jax.random.key(0)
    ids = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    targets = jax.ShapeDtypeStruct((1, options.targets), jnp.int32)
    abstract = jax.eval_shape(lambda i, t: model.init(key, i, None, t), ids, targets)
    variables = measure.random_like(meta.unbox(abstract), key)
    for batch in options.batch:
        for deleted in options.deleted:
            yield from _rows(options, model, variables, batch, deleted)


def _rows(options: argparse.Namespace, model: T5, variables: Any, batch: int, deleted: float) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, 259, (batch, options.length)), jnp.int32)
    targets = jnp.asarray(rng.integers(3, 259, (batch, options.targets)), jnp.int32)
    variables = set_deleted_share(model, variables, ids, deleted)
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


def set_deleted_share(model: T5, variables: Any, ids: Any, deleted: float) -> Any:
    """The variables with the gate's bias moved so that hard deletion removes the share `deleted` of the bytes `ids`."""
    gate = model.clone(decoder_layers=0)
    values = jax.jit(lambda v: gate.apply(v, ids, deletion="soft")[1]["delete_gate"])(variables)
    # G = -30 sigmoid(-z), so z = log(-30 / G - 1); hard deletion cuts at z = 0.
    logits = jnp.log(-30.0 / values - 1)
    shift = jnp.quantile(logits, deleted)
    bias = variables["params"]["delete_gate"]["logit"]["bias"]
    params = dict(variables["params"])
    params["delete_gate"] = {**params["delete_gate"], "logit": {**params["delete_gate"]["logit"], "bias": bias - shift}}
    return {"params": params}
