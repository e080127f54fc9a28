# SPDX-License-Identifier: Apache-2.0
"""Every kernel at its named shapes, as functions to compile for a TPU that is only described."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import parallel
from experiments.aot import compiler, gpu, schedule
from experiments.rundir import versions
from pallas_kernels import compact as compaction
from pallas_kernels import dispatch
from pallas_kernels import merge as merging
from pallas_kernels import ragged_prefix_mlp as prefix
from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention
from pallas_kernels.biased_flash_attention import specs as biased_specs
from pallas_kernels.bipartite_match import bipartite_match, pair_up
from pallas_kernels.bipartite_match import specs as match_specs
from pallas_kernels.block_sparse_attention import BlockIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention import specs as sparse_specs
from pallas_kernels.compact import specs as compact_specs
from pallas_kernels.merge import specs as merge_specs
from pallas_kernels.position_bias import PositionBias
from pallas_kernels.ragged_prefix_mlp import specs as prefix_specs
from pallas_kernels.sparse_decode_attention import sparse_decode_attention
from pallas_kernels.sparse_decode_attention import specs as decode_specs

_Array = jax.ShapeDtypeStruct
# Names that the GPU kernels carry.
GPU_NAMES = (
    "attention_column_stats",
    "bipartite_match",
    "block_sparse_attention_bucket_sums",
    "block_sparse_attention_forward",
    "block_sparse_attention_key_gradients",
    "block_sparse_attention_query_gradient",
    "merge",
    "ragged_prefix_hidden",
    "ragged_prefix_over_rows",
    "ragged_prefix_product",
    "restore",
    "sparse_decode_attention",
)
# Even tokens of sequences whose pairs are all compared.
_PAIRED = 640
KIND = "estimated from the compiler's schedule; nothing was run"


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    Attributes:
      shape: its name in the kernel's `specs`. part: which of the op's functions, or passes.
      function, arguments: what to compile; it names its implementation, so that nothing else is compiled in silence.
      bytes: that must cross HBM at least, where that is simple to say.
    """

    shape: str
    part: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes: int | None = None


def _compact(implementation: str) -> Iterator[Case]:
    for name, spec in compact_specs.NAMED.items():
        moved = spec.batch * (spec.tokens + spec.slots) * spec.width * jnp.dtype(spec.dtype).itemsize
        for part, rows in (("compact", spec.tokens), ("expand", spec.slots)):

            def function(x: Any, keep: Any, part: str = part, slots: int = spec.slots) -> Any:
                return getattr(compaction, part)(x, compaction.pack(keep, slots), implementation=implementation)

            x = _Array((spec.batch, rows, spec.width), spec.dtype)
            yield Case(name, part, function, (x, _Array((spec.batch, spec.tokens), jnp.bool_)), moved)


def _bipartite_match(implementation: str) -> Iterator[Case]:
    for name, spec in match_specs.NAMED.items():
        left, right = (spec.tokens + 1) // 2, spec.tokens // 2
        function = functools.partial(bipartite_match, implementation=implementation)
        arrays = (_Array((spec.batch, rows, spec.channels), spec.dtype) for rows in (left, right))
        read = spec.batch * spec.tokens * spec.channels * _itemsize(spec.dtype)
        yield Case(name, "best", function, tuple(arrays), read)
        if left <= _PAIRED and implementation == "tpu":
            own = (_Array((spec.batch, left), kind) for kind in (jnp.float32, jnp.int32))
            pairs = functools.partial(pair_up, removed=8, ordered=True, implementation="tpu")
            yield Case(name, "pairs", pairs, (*own, _Array((spec.batch, spec.tokens), jnp.float32)))


def _merge(implementation: str) -> Iterator[Case]:
    for name, spec in merge_specs.NAMED.items():
        moved = spec.batch * (spec.tokens + spec.slots) * spec.width * _itemsize(spec.dtype)
        assign, weight = (_Array((spec.batch, spec.tokens), dtype) for dtype in (jnp.int32, jnp.float32))
        many, few = (_Array((spec.batch, rows, spec.width), spec.dtype) for rows in (spec.tokens, spec.slots))
        merge = functools.partial(merging.merge, slots=spec.slots, implementation=implementation)
        yield Case(name, "merge", merge, (many, assign, weight), moved)
        if spec.tokens <= 2 * _PAIRED:
            if implementation == "tpu":
                half = functools.partial(merge, odd_last=True)
                yield Case(name, "merge, odd tokens last", half, (many, assign, weight), moved)
                yield Case(name, "facts", *_facts(spec))
            few_numbers = _Array((spec.batch, spec.tokens, 3), jnp.float32)
            yield Case(name, "merge of three numbers", merge, (few_numbers, assign, weight))
        yield Case(
            name, "restore", functools.partial(merging.restore, implementation=implementation), (few, assign), moved
        )


def _facts(spec: merge_specs.Spec) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and its arguments: masses, two coordinates and pointers of merged tokens."""
    mass, assign = (_Array((spec.batch, spec.tokens), dtype) for dtype in (jnp.float32, jnp.int32))
    coords, heads = _Array((*mass.shape, 2), jnp.float32), _Array((spec.batch, spec.slots), jnp.int32)
    function = functools.partial(merging.merge_facts, implementation="tpu")
    return function, (mass, coords, assign, heads, assign, mass)


def _ragged_prefix_mlp(implementation: str) -> Iterator[Case]:
    for name, spec in prefix_specs.NAMED.items():
        counts = _Array((spec.units,), jnp.int32)
        x, up, bias, down = (
            _Array(shape, spec.dtype)
            for shape in (
                (spec.rows, spec.width),
                (spec.width, spec.hidden),
                (spec.hidden,),
                (spec.hidden, spec.width),
            )
        )

        def mlp(arrays: Any, counts: Any) -> Any:
            x, *weights = arrays
            return prefix.ragged_prefix_mlp(x, counts, *weights, implementation=implementation)

        def projection(arrays: Any, counts: Any) -> Any:
            hidden, down = arrays
            return prefix.ragged_prefix_projection(hidden, counts, down, implementation=implementation)

        hidden = _Array((spec.rows, spec.hidden), spec.dtype)
        yield Case(name, "mlp, forward and backward", _both(mlp), (x, (x, up, bias, down), counts))
        yield Case(name, "projection, forward and backward", _both(projection), (x, (hidden, down), counts))


def _sparse_decode_attention(implementation: str) -> Iterator[Case]:
    for name, spec in decode_specs.NAMED.items():
        pool = _Array((spec.groups, spec.pages, spec.slots, spec.width), spec.dtype)
        query = _Array((spec.batch, 1, spec.heads, spec.width), spec.dtype)
        pages = _Array((spec.batch, spec.groups, spec.listed), jnp.int32)
        counts = _Array((spec.batch, spec.groups), jnp.int32)
        read = 2 * spec.batch * spec.groups * spec.listed * spec.slots * spec.width * _itemsize(spec.dtype)
        function = functools.partial(sparse_decode_attention, implementation=implementation)
        yield Case(name, "one query row", function, (query, pool, pool, pages, counts), read)


def _block_sparse_attention(implementation: str) -> Iterator[Case]:
    for name, spec in sparse_specs.SPECS.items():
        lists = (spec.batch if spec.lists > 1 else 1, spec.lists, -(-spec.queries // spec.block_q))
        entries = _Array((*lists, spec.capacity), jnp.int32)
        tiles = (entries, _Array((spec.tiles, spec.block_q, spec.block_k), jnp.bool_)) if spec.tiles else (None, None)
        sizes = (spec.queries, spec.keys, spec.block_q, spec.block_k)
        index = BlockIndex(entries, _Array(lists, jnp.int32), *tiles, *sizes)
        query, key, value = (
            _Array((spec.batch, length, heads, spec.width), spec.dtype)
            for length, heads in ((spec.queries, spec.heads), (spec.keys, spec.kv_heads), (spec.keys, spec.kv_heads))
        )
        arrays = {"query": query, "key": key, "value": value}
        if spec.key_bias:
            arrays["key_bias"] = _Array((spec.batch, spec.keys), jnp.float32)
        if spec.sinks:
            arrays["sinks"] = _Array((spec.heads,), jnp.float32)

        def attend(arrays: Any, index: Any, causal: bool = spec.causal) -> Any:
            return block_sparse_attention(**arrays, index=index, causal=causal, implementation=implementation)

        yield Case(name, "forward and backward", _both(attend), (query, arrays, index))


def _biased_flash_attention(implementation: str) -> Iterator[Case]:
    for name, spec in biased_specs.NAMED.items():
        shapes = [(spec.batch, spec.tokens, heads, spec.width) for heads in (spec.heads, spec.groups, spec.groups)]
        query, key, value = (_Array(shape, spec.dtype) for shape in shapes)
        bias = _Array((spec.batch, spec.tokens), jnp.float32)
        table = _Array((spec.buckets, spec.heads), jnp.float32) if spec.buckets else None
        # Bytes that are left after deletion stand where they stood, in each row elsewhere.
        positions = _Array((spec.batch, spec.tokens), jnp.int32) if spec.buckets else None
        options = {"causal": spec.causal, "softmax": spec.softmax, "implementation": implementation}

        def attend(arrays: Any, positions: Any, options: Any = options) -> Any:
            *arrays, key_bias, table = arrays
            return biased_attention(*arrays, key_bias=key_bias, bias=_by_positions(table, positions), **options)

        def stats(query: Any, key: Any, key_bias: Any, table: Any, positions: Any, options: Any = options) -> Any:
            bias = _by_positions(table, positions)
            return attention_column_stats(query, key, key_bias=key_bias, bias=bias, **options)

        yield Case(name, "forward and backward", _both(attend), (query, (query, key, value, bias, table), positions))
        yield Case(name, "column statistics", stats, (query, key, bias, table, positions))


def _by_positions(table: Any, positions: Any) -> PositionBias | None:
    return None if table is None else PositionBias(table, positions, positions)


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(cotangent, arrays, lists) -> (output, gradients of the arrays)` of a `function(arrays, lists)`."""

    def both(cotangent: Any, arrays: Any, lists: Any) -> Any:
        out, pull = jax.vjp(lambda given: function(given, lists), arrays)
        return out, pull(cotangent)

    return both


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


KERNELS: dict[str, Callable[[str], Iterator[Case]]] = {
    "biased_flash_attention": _biased_flash_attention,
    "bipartite_match": _bipartite_match,
    "block_sparse_attention": _block_sparse_attention,
    "compact": _compact,
    "merge": _merge,
    "ragged_prefix_mlp": _ragged_prefix_mlp,
    "sparse_decode_attention": _sparse_decode_attention,
}


def rows(name: str, chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """A row for each case of a kernel and each chip: schedules of what was compiled, and times estimated from them.

    Args:
      name: of `KERNELS`.
      chips: generations.
      dump: folder that `compiler.prepare` was given.

    Raises:
      KeyError: no such kernel.
    """
    for case in KERNELS[name]("tpu"):
        for generation in chips:
            yield {"op": name, "shape": case.shape, "part": case.part, **_row(case, generation, dump)}


def gpu_rows(name: str, cards: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each case of a kernel and each card: what its kernels take. An op or a shape without one says why.

    Args:
      name: of `KERNELS`.
      cards: names of `gpu.CARDS`.

    Raises:
      KeyError: no such kernel.
    """
    for case in KERNELS[name]("gpu"):
        for card in cards:
            row = {"op": name, "shape": case.shape, "part": case.part, "chip": card}
            kind = {
                "kind": "compiled for a described card; nothing was run",
                "versions": compiler_versions("jax", "jaxlib"),
            }
            try:
                found = gpu.compile_kernels(case.function, case.arguments, card)
            except NotImplementedError as error:
                yield row | kind | {"refused": str(error)}
                continue
            # What the compiler makes around them (sorts, paddings, transpositions) is counted only.
            own = [dataclasses.asdict(kernel) for kernel in found if kernel.name in GPU_NAMES]
            yield row | kind | {"kernels": own, "others": len(found) - len(own)}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """What the compiler made of a function for one chip.

    Attributes:
      kernels: schedules of its kernels. calls: of kernels in it.
      instructions: cycles that the compiler estimates for each other instruction, and the `op_name` it comes from.
      places: `op_name` of each kernel.
    """

    kernels: tuple[schedule.Program, ...]
    calls: int
    instructions: tuple[tuple[int, str], ...]
    places: tuple[str, ...]


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], generation: str, dump: str) -> Scheduled:
    """The schedules of a function of arrays on the smallest machine of a generation; it is compiled and not run.

    Args:
      dump: folder that `compiler.prepare` was given.
    """
    mesh = parallel.make_mesh("none", compiler.devices(compiler.SMALLEST[generation]))
    arguments = jax.tree.map(lambda x: _Array(x.shape, x.dtype, sharding=parallel.replicated(mesh)), arguments)
    for old in pathlib.Path(dump).glob("*"):
        old.unlink()
    # Kernels ask the mesh which chip they are for.
    with parallel.on_mesh(mesh), dispatch.compiled_for("tpu"):
        traced = jax.jit(function).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    places = {
        name: _place(line) for name, line in _instructions(text) if 'custom_call_target="tpu_custom_call"' in line
    }
    own = [program for program in schedule.read(dump) if program.name in places]
    estimates = re.compile(r'"estimated_cycles":"?(\d+)')
    return Scheduled(
        tuple(own),
        lowered.as_text().count("@tpu_custom_call"),
        tuple((int(found[1]), _place(line)) for _, line in _instructions(text) if (found := estimates.search(line))),
        tuple(places[program.name] for program in own),
    )


def _row(case: Case, generation: str, dump: str) -> dict[str, Any]:
    chip = compiler.CHIPS[generation]
    found = compiled(case.function, case.arguments, generation, dump)
    microseconds = 1e6 / chip.clock
    return {
        "chip": generation,
        "kind": KIND,
        "kernel_calls": found.calls,
        "kernels": [
            {
                "name": program.name,
                "bundles": program.bundles,
                "spill_stores": program.spill_stores,
                # Every conditional region on every pass, and loops of unknown length once.
                "schedule_us": round(program.cycles() * microseconds, 2),
                "regions": program.plain_regions(),
            }
            for program in found.kernels
        ],
        "other_us": round(sum(cycles for cycles, _ in found.instructions) * microseconds, 2),
        "hbm_us": None if case.bytes is None else round(1e6 * case.bytes / chip.bandwidth, 2),
        "versions": compiler_versions("jax", "jaxlib", "libtpu"),
    }


def compiler_versions(*names: str) -> dict[str, str]:
    """Of what compiles."""
    return {name: version for name, version in versions().items() if name in names}


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """A row of estimates with short numbers, and what made it."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        return round(value, 4 if abs(value) < 10 else 1) if isinstance(value, float) else value

    return {**short(row), "kind": KIND, "versions": compiler_versions("jax", "jaxlib", "libtpu")}


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and line of each instruction of a compiled program."""
    for line in text.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line):
            yield match[1], line


def _place(line: str) -> str:
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""
