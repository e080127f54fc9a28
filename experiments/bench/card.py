# SPDX-License-Identifier: Apache-2.0
"""The attention kernels on a GPU beside what is wanted of them, all by one command.

    python -m experiments.bench card --peer --peer-python=/path/to/python-with-torch

First come values: `errors`, the largest differences of outputs, gradients and statistics from the plain float32 form, as shares
of what is largest there. Then rows of the benchmarks of block-sparse attention (each length and density), of biased attention
and of sparse decoding (their named shapes), each with `bars`: `[figure, bar, whether it is met]` of what a bar is set for; and
for each length `break_even`, the least share of blocks left out at which sparse attention is faster than dense. Rows also go to
results/PLATFORM/attention.jsonl unless `--out` says otherwise. On a CPU, at small sizes, only the making of rows can be tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import biased_flash_attention, block_sparse_attention, sparse_decode_attention
from experiments.bench.flags import floats, integers
from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention, reference, specs

# The most that sparse attention may cost: by length at a tenth of the blocks, forward, and with the backward pass; by density.
_COST = {8192: 1.6, 16384: 1.35, 65536: 1.15}
_COST_BOTH = {16384: 1.5, 32768: 1.3}
_COST_OF_DENSITY = {0.5: 1.12, 1.0: 1.05}
_TENTH, _LONG = 0.1, 8192
_BREAK_EVEN, _LISTS, _STATISTICS, _BANDWIDTH = 0.06, 0.05, 0.6, 0.8
_ERROR = {"float32": 1e-5, "bfloat16": 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--length", type=integers, default=(8192, 16384, 32768, 65536), help="queries and keys (four by default)")
    add("--density", type=floats, default=(1.0, 0.94, 0.5, 0.1), help="shares of blocks listed (four by default)")
    add("--batch", type=int, default=1, help="(default %(default)s)")
    add("--heads", type=int, default=16, help="(default %(default)s)")
    add("--width", type=int, default=128, help="of a head (default %(default)s)")
    add("--block", type=int, default=128, help="of queries and keys (default %(default)s)")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--biased-spec", default="all", help="named shapes of biased attention, or all (default %(default)s)")
    add("--decode-spec", default="all", help="named shapes of sparse decoding, or all (default %(default)s)")
    add("--implementation", default=None, help="of ours; the best available when not given")
    add("--peer", action="store_true", help="also time FlexAttention in PyTorch")
    add("--peer-python", default="python3", help="interpreter that has PyTorch (default %(default)s)")
    add("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every benchmark, with their bars.

    Raises:
      ValueError: the peer cannot run.
    """
    options.out = options.out or f"results/{jax.default_backend()}/attention.jsonl"
    for dtype, bar in _ERROR.items():
        errors = _errors(options, dtype)
        yield {"bench": "values", "dtype": dtype, "errors": errors, "bars": _bar("error", max(errors.values()), bar)}
    for length in options.length:
        found = []
        for row in _of(block_sparse_attention, options, length=length, gradients=length in _COST_BOTH):
            found.append(row)
            yield {"bench": "block_sparse_attention", "length": length, **row, "bars": _sparse_bars(row, length)}
        even = break_even(found)
        yield {
            "bench": "break_even",
            "length": length,
            "break_even": even,
            "bars": _bar("break_even", even, _BREAK_EVEN),
        }
    for row in _of(biased_flash_attention, options, spec=options.biased_spec):
        bars = _bar("statistics_share", row["statistics_share"], _STATISTICS)
        yield {"bench": "biased_flash_attention", **row, "bars": bars}
    for row in _of(sparse_decode_attention, options, spec=options.decode_spec):
        bars = _bar("bandwidth_share", row["bandwidth_share"], _BANDWIDTH, least=True)
        yield {"bench": "sparse_decode_attention", **row, "bars": bars}


def _errors(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Largest differences from the plain form, of a length that cuts blocks short, key heads that are shared, and positions."""
    spec = specs.Spec(2, 300, 4, 2, options.width, softmax="off_by_one", dtype=dtype, buckets=32)
    shapes = {
        name: (2, 300, heads, spec.width) for name, heads in (("query", 4), ("key", 2), ("value", 2), ("dout", 4))
    }
    drawn = zip(shapes.items(), jax.random.split(jax.random.key(0), 4), strict=True)
    arrays = {name: jax.random.normal(key, shape).astype(dtype) for (name, shape), key in drawn}
    dout, bias = arrays.pop("dout"), biased_flash_attention.positions(spec)
    shared = {"causal": spec.causal, "softmax": spec.softmax}

    def both(attend: Any, statistics: Any, arrays: Any, dout: Any) -> dict[str, Any]:
        def function(arrays: Any, table: Any) -> Any:
            return attend(**arrays, bias=dataclasses.replace(bias, table=table), **shared)

        out, pull = jax.vjp(function, arrays, bias.table)
        grads, dtable = pull(dout.astype(out.dtype))
        sums = statistics(arrays["query"], arrays["key"], bias=bias, **shared)
        return {"out": out, "statistics": sums, "table": dtable, **grads}

    ours = [
        functools.partial(op, implementation=options.implementation)
        for op in (biased_attention, attention_column_stats)
    ]
    plain = [reference.biased_attention, reference.attention_column_stats]
    found = jax.jit(functools.partial(both, *ours))(arrays, dout)
    expected = jax.jit(functools.partial(both, *plain))(*jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, dout)))
    return {name: _error(found[name], expected[name]) for name in expected}


def _error(found: jax.Array, expected: jax.Array) -> float:
    difference = jnp.max(jnp.abs(found.astype(jnp.float32) - expected))
    return float(difference / jnp.maximum(jnp.max(jnp.abs(expected)), 1.0))


def break_even(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The least share of blocks left out at which sparse attention takes no longer than dense, between measured densities.

    0 if it does so with all blocks; None if it never does, or if nothing slower was measured.
    """
    ratios = sorted(((row["density"], row["density"] * _cost(row)) for row in rows), reverse=True)
    if not ratios:
        return None
    (dense, slow), *rest = ratios
    if slow <= 1:
        return 0.0 if dense == 1 else None
    for density, ratio in rest:
        if ratio <= 1:
            share = (slow - 1) / (slow - ratio)
            return round(1 - (dense + share * (density - dense)), 4)
        dense, slow = density, ratio
    return None


def _of(bench: Any, options: argparse.Namespace, **given: Any) -> Iterator[dict[str, Any]]:
    """Rows of a benchmark by our flags as far as it has them."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    flags = parser.parse_args([])
    known = {**vars(options), **given}
    return bench.rows(argparse.Namespace(**{name: known.get(name, value) for name, value in vars(flags).items()}))


def _sparse_bars(row: Mapping[str, Any], length: int) -> dict[str, list[Any]]:
    cost = _cost(row)
    tenth = abs(row["density"] - _TENTH) < 0.01
    bars = {}
    if tenth and length in _COST:
        bars |= _bar("sparse_cost", cost, _COST[length])
    if tenth and length in _COST_BOTH:
        bars |= _bar("sparse_cost_both", row["sparse_cost_both"], _COST_BOTH[length])
    if row["density"] in _COST_OF_DENSITY:
        bars |= _bar("sparse_cost", cost, _COST_OF_DENSITY[row["density"]])
    if length >= _LONG:
        bars |= _bar("overhead", row["overhead"], _LISTS)
    if "peer_ratio" in row:
        bars |= _bar("peer_ratio", row["peer_ratio"], 1.0)
    return bars


def _cost(row: Mapping[str, Any]) -> float:
    """The cost beside the best dense attention, PyTorch's too if it was timed."""
    return row.get("sparse_cost_best", row["sparse_cost"])


def _bar(name: str, figure: float | None, bar: float, *, least: bool = False) -> dict[str, list[Any]]:
    """`[figure, bar, whether it is met]`; a figure that is not known meets nothing."""
    met = figure is not None and (figure >= bar if least else figure <= bar)
    return {name: [figure, bar, met]}
