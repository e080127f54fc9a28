# SPDX-License-Identifier: Apache-2.0
"""Attention with a bias for each key and its column sums at the named shapes, against dense attention without a bias.

Shapes with buckets have T5's bias of relative positions too.
`realised` is the time of `jax.nn.dot_product_attention` (cuDNN's on a GPU, where it takes the dtype) over ours;
`gradients_share` is our forward and backward pass over its; `statistics_share` is the time of the column sums, given the
log-sum-exp that attention makes, over that of its forward pass.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.bench import kernels
from experiments.bench.block_sparse_attention import both, dense_peer
from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention, specs
from pallas_kernels.position_bias import PositionBias


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "small_float32")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        yield _row(options, name, spec)


def positions(spec: specs.Spec) -> PositionBias | None:
    """T5's bias where the shape has buckets: positions with gaps, as a deletion leaves them."""
    if not spec.buckets:
        return None
    table, places = jax.random.split(jax.random.key(1))
    kept = jax.random.uniform(places, (spec.batch, 2 * spec.tokens))
    stands = jnp.sort(jnp.argsort(kept, axis=1)[:, : spec.tokens], axis=1).astype(jnp.int32)
    return PositionBias(jax.random.normal(table, (spec.buckets, spec.heads)), stands, stands)


def _row(options: argparse.Namespace, name: str, spec: specs.Spec) -> dict[str, Any]:
    keys, peer = jax.random.split(jax.random.key(0), 4), dense_peer(spec.dtype)
    query, key, value = (
        jax.random.normal(k, (spec.batch, spec.tokens, heads, spec.width), jnp.dtype(spec.dtype))
        for k, heads in zip(keys[:3], (spec.heads, spec.groups, spec.groups), strict=True)
    )
    mass = jnp.log1p(jax.random.uniform(keys[3], (spec.batch, spec.tokens)))
    bias = positions(spec)
    shared = {"causal": spec.causal, "softmax": spec.softmax, "bias": bias, "implementation": options.implementation}

    def dense(*a: Any) -> Any:
        return jax.nn.dot_product_attention(*a, is_causal=spec.causal, implementation=peer)

    def biased(query: Any, key: Any, value: Any, mass: Any) -> Any:
        return biased_attention(query, key, value, key_bias=mass, **shared)

    def statistics(query: Any, key: Any, mass: Any, lse: Any) -> Any:
        return attention_column_stats(query, key, key_bias=mass, lse=lse, **shared)

    arrays = query, key, value
    _, lse = jax.jit(functools.partial(biased_attention, return_lse=True, **shared))(*arrays, key_bias=mass)
    functions = {
        "dense": measure.compiled_call(dense, *arrays),
        "dense_both": measure.compiled_call(both(dense), *arrays),
        "biased": measure.compiled_call(biased, *arrays, mass),
        "biased_both": measure.compiled_call(both(biased), *arrays, mass),
        "statistics": measure.compiled_call(statistics, query, key, mass, lse),
    }
    times = kernels.times_of(options, functions)
    medians = {name: time.median for name, time in times.items()}
    facts = {
        "causal": spec.causal,
        "dense_by": peer or "xla",
        "realised": medians["dense"] / medians["biased"],
        "gradients_share": medians["biased_both"] / medians["dense_both"],
        "statistics_share": medians["statistics"] / medians["dense"],
    }
    shape = f"{spec.batch}x{spec.tokens} {spec.heads}/{spec.groups} heads of {spec.width}"
    return kernels.row(options, name, spec, shape, times, **facts)
