# SPDX-License-Identifier: Apache-2.0
"""Attention over listed key blocks against dense attention, at five densities, the making of the lists included.

Lists are the best blocks of random scores, different for every head. `implied` is the inverse of the listed share of blocks,
`realised` the time of `jax.nn.dot_product_attention` over ours, and `overhead` the time of making the lists over ours.
`realised_best` is against the faster of that and this codebase's own dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.bench.flags import floats
from pallas_kernels.biased_flash_attention import biased_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention, from_scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--batch", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="queries and keys (default %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=0, help="heads of keys; as many as heads when 0 (default)")
    parser.add_argument("--width", type=int, default=64, help="of a head (default %(default)s)")
    parser.add_argument("--block", type=int, default=128, help="of queries and keys (default %(default)s)")
    parser.add_argument(
        "--density",
        type=floats,
        default=(1.0, 0.5, 0.25, 0.125, 0.0625),
        help="shares of blocks listed (five by default)",
    )
    parser.add_argument("--causal", action="store_true", help="mask later keys, in the dense attention too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--implementation", default=None, help="of ours; the best available when not given")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each density."""
    keys, dtype = jax.random.split(jax.random.key(0), 4), jnp.dtype(options.dtype)
    heads = (options.heads, *[options.kv_heads or options.heads] * 2)
    query, key, value = (
        jax.random.normal(k, (options.batch, options.length, h, options.width), dtype)
        for k, h in zip(keys[:3], heads, strict=True)
    )
    blocks = -(-options.length // options.block)
    scores = jax.random.normal(keys[3], (options.batch, options.heads, blocks, blocks))
    for density in options.density:
        yield _row(options, (query, key, value), scores, max(1, round(density * blocks)))


def _row(options: argparse.Namespace, arrays: tuple[Any, ...], scores: Any, listed: int) -> dict[str, Any]:
    sizes = dict(queries=options.length, keys=options.length, block_q=options.block, block_k=options.block)

    def lists(scores: Any) -> Any:
        if options.causal:
            scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
        return from_scores(scores, listed, **sizes)

    index = jax.jit(lists)(scores)
    attend = {"causal": options.causal, "implementation": options.implementation}
    functions = {
        "dense": measure.compiled_call(lambda *a: jax.nn.dot_product_attention(*a, is_causal=options.causal), *arrays),
        "own_dense": measure.compiled_call(lambda *a: biased_attention(*a, causal=options.causal), *arrays),
        "sparse": measure.compiled_call(lambda *a: block_sparse_attention(*a, **attend), *arrays, index),
        "lists": measure.compiled_call(lists, scores),
    }
    times = measure.interleaved(functions, repeats=options.repeats)
    medians = {name: time.median for name, time in times.items()}
    density = float(index.density())
    implied, realised = 1 / density, medians["dense"] / medians["sparse"]
    heads = f"{arrays[0].shape[2]}/{arrays[1].shape[2]}"
    return {
        "shape": f"{options.batch}x{options.length} {heads} heads of {options.width}, blocks of {options.block}",
        "device": measure.device_name(),
        "dtype": options.dtype,
        "causal": options.causal,
        "density": round(density, 4),
        "implied": round(implied, 4),
        "realised": round(realised, 4),
        "realised_best": round(min(medians["dense"], medians["own_dense"]) / medians["sparse"], 4),
        "realised_share": round(realised / implied, 4),
        "overhead": round(medians["lists"] / medians["sparse"], 4),
        "milliseconds": {n: [round(1e3 * t, 3) for t in (v.low, v.median, v.high)] for n, v in times.items()},
        "repeats": options.repeats,
    }
