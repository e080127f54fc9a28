# SPDX-License-Identifier: Apache-2.0
"""Generation by a byte-level T5: cached decoding, dense and from an encoder that deletes bytes, and against no cache.

The part "decode" times the loop from an encoder's output that is there already, "generate" encoding and loop as one program;
both are compared with the dense model. The part "cached" compares the dense loop with one that scores all tokens again at
each step. Weights are random, as time does not depend on them, and no row ends before the last token. `implied` counts the
bytes that are left on average, `realised` pays for the rung that the longest row needs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import flops, ragged
from experiments import measure
from experiments.bench import t5
from layers import generation
from layers.t5 import T5

DENSE = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    t5.add_arguments(parser, length=512, rungs=8, deleted="0.5,0.75", repeats=3)
    parser.add_argument("--max-length", type=int, default=32, help="bytes to generate (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch size a row for the cache, and two for each deleted share."""
    model, variables = t5.make(options)
    for batch in options.batch:
        ids = np.random.default_rng(0).integers(3, 259, (batch, options.length))
        yield from _rows(options, model, variables, jnp.asarray(ids, jnp.int32))


def _rows(options: argparse.Namespace, model: T5, variables: Any, ids: Any) -> Iterator[dict[str, Any]]:
    shares = (DENSE, *options.deleted)
    # A row that may not end does the same work whatever the weights.
    settings = dict(max_length=options.max_length, min_length=options.max_length)
    encode = jax.jit(lambda v, deletion: model.apply(v, ids, deletion=deletion, method="encode"), static_argnums=1)
    decoder = jax.jit(
        lambda v, encoded, rungs: generation.decode_t5(model, v, encoded, rungs=rungs, **settings), static_argnums=2
    )
    generate, decode, kept = {}, {}, {}
    for share in shares:
        own = variables if share == DENSE else t5.set_deleted_share(model, variables, ids, share)
        how = (
            dict(deletion=None, rungs=(options.length,)) if share == DENSE else dict(deletion="hard", rungs=model.rungs)
        )
        encoded = encode(own, how["deletion"]).replace(aux=None)
        kept[share] = encoded.counts
        generate[share] = functools.partial(generation.generate_t5, model, own, ids, **how, **settings)
        decode[share] = functools.partial(decoder, own, encoded, how["rungs"])
        if share == DENSE:
            again = measure.compiled_call(
                functools.partial(_decode_again, model, steps=options.max_length), own, encoded
            )
    common = _Common(options, model, ids.shape[0])
    times = measure.interleaved({"uncached": again, "cached": decode[DENSE]}, repeats=options.repeats)
    macs = [options.max_length * common.scoring(options.length), common.decoding(options.length)]
    yield common.row("cached", "uncached/cached", times, macs)
    for part, functions in (("decode", decode), ("generate", generate)):
        times = measure.interleaved({str(share): call for share, call in functions.items()}, repeats=options.repeats)
        for share in options.deleted:
            left = [float(jnp.mean(kept[s])) for s in (DENSE, share)]
            macs = [common.decoding(n) + (common.encoding(n) if part == "generate" else 0) for n in left]
            pair = {"dense": times[str(DENSE)], "deleted": times[str(share)]}
            rungs = ragged.check_rungs(model.rungs, options.length)
            extra = {
                "kept": [int(count) for count in kept[share]],
                "rung": rungs[int(ragged.choose_rung(kept[share], rungs))],
                "padding_waste": round(float(ragged.padding_waste(kept[share], rungs)), 4),
            }
            yield common.row(part, f"{share} deleted after layer {options.gate_layer}", pair, macs) | extra


class _Common:
    """What all rows of a batch size share."""

    def __init__(self, options: argparse.Namespace, model: T5, batch: int) -> None:
        self.options, self.spec, self.batch = options, model.spec(), batch

    def encoding(self, kept: float) -> float:
        """MACs of the encoder when `kept` bytes stay."""
        counts = self.spec.gated_counts(self.options.length, kept, self.options.gate_layer)
        return flops.count(self.spec, batch=self.batch, inputs=self.options.length, counts=counts).macs

    def decoding(self, kept: float) -> float:
        """MACs of the whole loop with a cache, from `kept` encoder tokens."""
        return flops.count(self.spec.decoding(), batch=self.batch, encoded=kept, slots=self.options.max_length).macs

    def scoring(self, kept: float) -> float:
        """MACs of scoring all tokens once, which the loop without a cache does at each step."""
        sizes = dict(batch=self.batch, inputs=kept)
        spec, targets = self.spec, self.options.max_length
        return flops.count(spec, **sizes, targets=targets).macs - flops.count(spec, **sizes).macs

    def row(self, part: str, what: str, times: dict[str, measure.Timing], macs: list[float]) -> dict[str, Any]:
        """A row that compares the first of `times` and `macs` with the second."""
        options, tokens = self.options, self.batch * self.options.max_length
        slow, fast = (timing.median for timing in times.values())
        return {
            "part": part,
            "shape": f"{options.variant} {self.batch}x{options.length}+{options.max_length}, {what}",
            "device": measure.device_name(),
            "dtype": options.dtype,
            "implied": round(macs[0] / macs[1], 4),
            "realised": round(slow / fast, 4),
            "tokens_per_second": {name: round(tokens / timing.median, 2) for name, timing in times.items()},
            "milliseconds": {n: [round(1e3 * t, 2) for t in (v.low, v.median, v.high)] for n, v in times.items()},
            "gmacs": [round(m / 1e9, 3) for m in macs],
            "repeats": options.repeats,
        }


def _decode_again(model: T5, variables: Any, encoded: Any, *, steps: int) -> Any:
    """Greedy decoding without a cache: all `steps` tokens are scored at each step, as a static shape demands."""
    model, variables = model.unrolled_decoder(variables)

    def step(tokens: Any, token_ids: Any, position: Any) -> tuple[Any, Any]:
        tokens = tokens.at[:, position].set(token_ids)
        logits = model.apply(variables, encoded, tokens, method="decode")
        return jax.lax.dynamic_index_in_dim(logits, position, axis=1, keepdims=False), tokens

    tokens = jnp.zeros((encoded.key_bias.shape[0], steps), jnp.int32)
    return generation.generate(step, tokens, tokens[:, 0], max_length=steps, min_length=steps)
