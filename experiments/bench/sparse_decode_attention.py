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
from pallas_kernels.sparse_decode_attention import sparse_decode_attention, specs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--spec", default="small_float32", help="named shapes, or all")
    parser.add_argument("--implementation", default=None, help="of ours (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape."""
    for name in specs.NAMED if options.spec == "all" else options.spec.split(","):
        yield _row(options, name, specs.NAMED[name])


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
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2, calls=measure.kernel_calls())
    # Keys and values of the listed slots, against as many pages as copied, read and written.
    read = 2 * spec.width * dtype.itemsize * float(jnp.sum(lengths))
    copied = 4 * min(spec.batch * spec.listed, spec.pages) * spec.groups * spec.slots * spec.width * dtype.itemsize
    return {
        "spec": name,
        "shape": f"{spec.batch} x {spec.heads}/{spec.groups} heads, {spec.listed} of {spec.pages} pages of {spec.slots}",
        "device": measure.device_name(),
        "dtype": spec.dtype,
        "implementation": options.implementation or "best",
        "implied": round(spec.batch * spec.groups * spec.pages * spec.slots / float(jnp.sum(lengths)), 4),
        "realised": round(times["dense"].median / times["sparse"].median, 4),
        "copy_share": round(times["copy"].median / times["sparse"].median, 4),
        "bandwidth_share": round(read / copied * times["copy"].median / times["sparse"].median, 4),
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }
