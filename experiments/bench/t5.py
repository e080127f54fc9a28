# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of byte-level T5s share: flags, and an MrT5 with random weights."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from adaptive import ragged
from experiments import measure
from experiments.bench.flags import floats, integers
from layers.t5 import SHAPES, T5


def add_arguments(parser: argparse.ArgumentParser, *, length: int, rungs: int, deleted: str, repeats: int) -> None:
    """Flags of the model, of the batches and of the timing."""
    parser.add_argument("--variant", default="byt5-small", choices=sorted(SHAPES), help="shape (default %(default)s)")
    parser.add_argument("--batch", type=integers, default=(2,), help="batch sizes, comma separated (default 2)")
    parser.add_argument("--length", type=int, default=length, help="encoder bytes (default %(default)s)")
    parser.add_argument("--deleted", type=floats, default=deleted, help="shares of bytes deleted (default %(default)s)")
    parser.add_argument("--gate-layer", type=int, default=3, help="layers before the gate (default %(default)s)")
    parser.add_argument("--rungs", type=int, default=rungs, help="rungs of the ladder at most (default %(default)s)")
    parser.add_argument("--multiple", type=int, default=64, help="rungs are multiples of this (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed calls of each function (default %(default)s)"
    )


def make(options: argparse.Namespace, targets: int = 1) -> tuple[T5, Any]:
    """The model, and random weights; `targets` are the decoder bytes that it is traced with."""
    model = T5(
        **SHAPES[options.variant],
        softmax="off_by_one",
        gate="mrt5",
        gate_layer=options.gate_layer,
        rungs=ragged.make_rungs(options.length, steps=options.rungs, multiple=options.multiple),
        # The ladder compiles the encoder layers above the gate once for each rung; scanned, that is one layer a rung.
        scan_layers=True,
        dtype=jnp.dtype(options.dtype),
    )
    key = jax.random.key(0)
    read, written = (jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (options.length, targets))
    abstract = jax.eval_shape(lambda ids, labels: model.init(key, ids, None, labels), read, written)
    return model, measure.random_like(meta.unbox(abstract), key)


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
