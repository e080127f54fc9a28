# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Depths: every other block on a share of the tokens, packed together, against the dense model.

The part "forward" scores whole sequences under the top-k routing of training, "decode" generates with the predictor, which
packs the rows that run. Weights are random: of the forward pass the time does not depend on them, and in decoding the
predictor's bias is set so that it takes about the share of the tokens; "tokens_a_layer" says how many it took. `implied` leaves
router and predictor out, whose time `realised` pays for. A decode step reads a block's weights for one row as for eight, so in
decoding `realised` falls behind as soon as some row of the batch runs at most steps ("steps_a_layer").
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import flops
from adaptive.depth import mixture_of_depths
from experiments import measure
from experiments.bench import decoder
from experiments.bench.flags import floats
from layers.mixture_of_depths import MixtureOfDepths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    decoder.add_arguments(parser, length=256)
    parser.add_argument("--share", type=floats, default=(0.125, 0.5), help="of tokens that run (default 0.125,0.5)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch size and share a row for the forward pass and one for decoding."""
    length, steps = options.length, options.max_length
    for share in options.share:
        routing = MixtureOfDepths(share=share, room=min(1.0, 2 * share))
        model, variables = decoder.make(options, routing=routing)
        plain = model.clone(routing=None)
        for batch in options.batch:
            ids = decoder.prompts(options, batch)
            routed = [routing.acts(layer) for layer in range(model.depth)]
            count = mixture_of_depths.capacity(share, length)
            counts = [count if own else length for own in routed]
            functions = {
                name: measure.compiled_call(lambda v, i, own=own: own.apply(v, i)[0], variables, ids)
                for name, own in (("dense", plain), ("mixture_of_depths", model))
            }
            times = measure.interleaved(functions, repeats=options.repeats)
            macs = [flops.count(plain, batch=batch, tokens=length, counts=own).macs for own in (None, counts)]
            facts = {"part": "forward", "tokens_a_layer": float(np.mean(counts))}
            yield decoder.row(options, decoder.shape_of(options, batch, f"share {share:g}"), times, macs, **facts)
            own = taking(model, variables, ids, share)
            calls = {
                "dense": decoder.Decode(plain, own, ids, steps, temperature=1.0),
                "mixture_of_depths": decoder.Decode(model, own, ids, steps, temperature=1.0),
            }
            times = measure.interleaved(calls, repeats=options.repeats)
            spec, ran = model.spec().decoding(), calls["mixture_of_depths"].tokens.mean(axis=1)
            sizes = dict(batch=batch, slots=length + steps, steps=steps)
            macs = [flops.count(spec, **sizes, layer_steps=own).macs for own in (None, ran.tolist())]
            facts = {"part": "decode", "tokens_a_layer": round(float(ran.mean()), 3)}
            facts["steps_a_layer"] = round(float(calls["mixture_of_depths"].steps.mean()), 3)
            yield decoder.row(options, decoder.shape_of(options, batch, f"share {share:g}"), times, macs, **facts)


def taking(model: Any, variables: Any, ids: Any, share: float) -> Any:
    """The variables with biases by which each layer's predictor takes about `share` of the tokens `ids`."""
    states = jax.jit(lambda v: model.apply(v, ids, output_hidden_states=True)[1]["hidden_states"])(variables)
    params = dict(variables["params"])
    for layer in range(model.depth):
        if not model.routing.acts(layer):
            continue
        block = dict(params[f"block_{layer}"])
        hidden, out = block["predictor"]["hidden"], block["predictor"]["out"]
        y = jax.nn.silu(states[layer].astype(jnp.float32) @ hidden["kernel"] + hidden["bias"]) @ out["kernel"]
        bias = -jnp.quantile(y, 1.0 - share).reshape(1)
        block["predictor"] = {"hidden": hidden, "out": {**out, "bias": bias}}
        params[f"block_{layer}"] = block
    return {**variables, "params": params}
