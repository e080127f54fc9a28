# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding at the named shapes against dense attention over every page and against a copy of the listed bytes.

`implied` is the bytes of all pages over those listed, `realised` the measured speedup over dense attention; `copy_share` is
the time of copying the listed keys and values over the time of attention, and `bandwidth_share` the bytes a second that
attention reads over those that the copy reads and writes. Lists of different heads differ in length by up to 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.bench import kernels
from pallas_kernels.sparse_decode_attention import sparse_decode_attention, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    kernels.add_arguments(parser, "small_float32")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name, spec in kernels.chosen(options, specs.NAMED):
        yield _row(options, name, spec)


def _row(options: argparse.Namespace, name: str, spec: specs.Spec) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 5)
    dtype, pool = jnp.dtype(spec.dtype), (spec.groups, spec.pages, spec.slots, spec.width)
    query = jax.random.normal(keys[0], (spec.batch, 1, spec.heads, spec.width), dtype)
    own, values = (jax.random.normal(key, pool, dtype) for key in keys[1:3])
    shape = (spec.batch, spec.groups, spec.pages)
    pages = jnp.argsort(jax.random.uniform(keys[3], shape), axis=-1)[..., : spec.listed].astype(jnp.int32)
    least = spec.listed * spec.slots // 2
    lengths = jax.random.randint(keys[4], shape[:2], least, spec.listed * spec.slots + 1)

    def sparse(query: Any, own: Any, values: Any, pages: Any, lengths: Any) -> Any:
        return sparse_decode_attention(query, own, values, pages, lengths, implementation=options.implementation)

    def dense(query: Any, own: Any, values: Any) -> Any:
        return jax.nn.dot_product_attention(query, own, values)

    def copy(own: Any, values: Any) -> Any:
        listed = spec.batch * spec.listed
        return -own[:, :listed], -values[:, :listed]

    # In dense decoding every sequence reads a cache of its own.
    whole = [
        jnp.tile(jnp.swapaxes(array.reshape(spec.groups, -1, spec.width), 0, 1), (spec.batch, 1, 1, 1))
        for array in (own, values)
    ]
    functions = {
        "sparse": measure.compiled_call(sparse, query, own, values, pages, lengths),
        "dense": measure.compiled_call(dense, query, *whole),
        "copy": measure.compiled_call(copy, own, values),
    }
    times = kernels.times_of(options, functions)
    # Keys and values of the listed slots, against as many pages as copied, read and written.
    read = 2 * spec.width * dtype.itemsize * float(jnp.sum(lengths))
    copied = 4 * min(spec.batch * spec.listed, spec.pages) * spec.groups * spec.slots * spec.width * dtype.itemsize
    shape = f"{spec.batch} x {spec.heads}/{spec.groups} heads, {spec.listed} of {spec.pages} pages of {spec.slots}"
    facts = {
        "implied": spec.batch * spec.groups * spec.pages * spec.slots / float(jnp.sum(lengths)),
        "realised": times["dense"].median / times["sparse"].median,
        "copy_share": times["copy"].median / times["sparse"].median,
        "bandwidth_share": read / copied * times["copy"].median / times["sparse"].median,
    }
    return kernels.row(options, name, spec, shape, times, **facts)
