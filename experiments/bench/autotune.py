# SPDX-License-Identifier: Apache-2.0
"""Tries block sizes of an op's implementation at its named shapes, and records the fastest beside the heuristic's.

    python -m experiments.bench autotune --op=ragged_prefix_mlp
    python -m experiments.bench autotune --op=sparse_decode_attention --spec=all --repeats=15
    python -m experiments.bench autotune --op=merge --implementation=gpu --out=runs/autotune.jsonl

Candidates run in turn in one process and medians are compared; those that make the same program run once, and what does not fit
on the chip is listed as refused. `found` is the fastest candidate and `ratio` the heuristic's time over its: above 1 where the
heuristic could do better on this machine. Nothing is changed: what was found may be written into the `constants` of the
row. Rows go to results/PLATFORM/autotune.jsonl unless `--out` says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from experiments.aot import kernels
from experiments.progress import Progress
from pallas_kernels import dispatch
from pallas_kernels.bipartite_match import specs as match_specs
from pallas_kernels.block_sparse_attention import specs as sparse_specs
from pallas_kernels.merge import specs as merge_specs
from pallas_kernels.ragged_prefix_mlp import specs as prefix_specs
from pallas_kernels.sparse_decode_attention import specs as decode_specs


@dataclasses.dataclass(frozen=True)
class Knob:
    """Constants that the heuristic of an implementation reads.

    Attributes:
      module: of `pallas_kernels`, that holds them. names: of the constants. values: to try together, one for each name; the
        heuristic's own are tried in any case.
    """

    module: str
    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"pallas_kernels.{self.module}")

    def own(self) -> tuple[Any, ...]:
        """The heuristic's values."""
        return tuple(getattr(self._module, name) for name in self.names)

    @contextlib.contextmanager
    def set(self, values: tuple[Any, ...]) -> Iterator[None]:
        """What is traced here sees `values`."""
        before = self.own()
        try:
            self._put(values)
            # Parts that were traced with other values are not to be taken from a cache.
            jax.clear_caches()
            yield
        finally:
            self._put(before)
            jax.clear_caches()

    def _put(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self.names, values, strict=True):
            setattr(self._module, name, value)


def _one(module: str, name: str, *values: Any) -> Knob:
    return Knob(module, (name,), tuple((value,) for value in values))


_STAIRS = ((512, 128, 32), (256, 128, 64, 32), (256, 64), (128, 64, 32), (128, 32), (256, 32), (64, 32), (64,), (32,))
_CHUNKS = tuple((lists, columns) for lists in (1, 2, 4, 8) for columns in (256, 512, 1024))
# Of each op and implementation. The walls of on-chip memory are the kernels' own: they refuse what does not fit.
KNOBS: dict[str, dict[str, Knob]] = {
    "biased_flash_attention": {"xla": _one("biased_flash_attention.xla", "_QUERY_BLOCK", 64, 128, 256, 512)},
    "bipartite_match": {
        "xla": _one("bipartite_match.xla", "_BLOCK", 256, 512, 1024, 2048),
        "tpu": _one("bipartite_match.tpu", "_BLOCK", 256, 512, 1024),
    },
    "block_sparse_attention": {
        "xla": Knob("block_sparse_attention.xla", ("_LISTS", "_COLUMNS"), _CHUNKS),
        "tpu": Knob(
            "block_sparse_attention.tpu_plan",
            ("_ITEM_ROWS", "_TILE_ROWS"),
            ((256, 512), (512, 512), (512, 1024), (512, 2048), (1024, 1024)),
        ),
    },
    "merge": {
        "gpu": Knob("merge.gpu", ("_WIDE", "_WARPS"), ((1024, 4), (2048, 4), (2048, 8), (4096, 8))),
        "tpu": _one("merge.tpu_pairs", "_TILE", 128, 256),
    },
    "ragged_prefix_mlp": {
        "xla": _one("ragged_prefix_mlp.xla", "_TILES", *_STAIRS),
        "tpu": Knob(
            "ragged_prefix_mlp.tpu",
            ("_ROWS", "_HIDDEN"),
            tuple(((rows,), (hidden,)) for rows in (256, 512) for hidden in (256, 512)),
        ),
    },
    "sparse_decode_attention": {
        "xla": _one("sparse_decode_attention.xla", "_SLOTS", 128, 256, 512, 1024, 2048),
        "gpu": Knob("sparse_decode_attention.gpu", ("_TILE", "_STAGES"), ((32, 5), (64, 3), (64, 5), (128, 3))),
        "tpu": _one("sparse_decode_attention.tpu", "BLOCK_BYTES", 2**18, 2**19, 2**20),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", required=True, choices=list(KNOBS), help="whose block sizes are tried")
    parser.add_argument("--spec", default="", help="named shapes, or all (default: the smallest one)")
    parser.add_argument("--implementation", default=None, help="of it (default: the platform's best that can be tuned)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each candidate (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each named shape and part of the op.

    Raises:
      ValueError: a name that is not there. NotImplementedError: the implementation has nothing to vary.
    """
    implementation = _implementation(options.op, options.implementation)
    knob = KNOBS[options.op][implementation]
    cases = _cases(options.op, options.spec, implementation)
    options.out = options.out or f"results/{jax.default_backend()}/autotune.jsonl"
    candidates = list(dict.fromkeys((knob.own(), *knob.values)))
    with Progress(len(cases) * (len(candidates) + 1), label=f"autotune {options.op}", min_seconds=2.0) as progress:
        for case in cases:
            yield {
                "op": options.op,
                "spec": case.shape,
                "part": case.part,
                "device": measure.device_name(),
                "implementation": implementation,
                "constants": [f"{knob.module}.{name}" for name in knob.names],
                **_tune(case, knob, candidates, options, progress),
            }


def _implementation(op: str, name: str | None) -> str:
    tuned = KNOBS[op]
    if name is not None and name not in tuned:
        raise NotImplementedError(f"{op} has nothing to vary in implementation {name!r}; it has in {', '.join(tuned)}")
    found = name or next((best for best in dispatch.preference() if best in tuned), None)
    if found is None:
        raise NotImplementedError(f"{op} has nothing to vary on {jax.default_backend()}; it has in {', '.join(tuned)}")
    return found


def _cases(op: str, spec: str, implementation: str) -> list[kernels.Case]:
    """The op's named shapes.

    Raises:
      ValueError: an unknown shape.
    """
    # Lists with partial tiles are left out: which tile masks which block is no random number.
    cases = [case for case in kernels.KERNELS[op](implementation) if not _spec(op, case.shape, "tiles")]
    named = dict.fromkeys(case.shape for case in cases)
    smallest = min(cases, key=lambda case: sum(leaf.size for leaf in jax.tree.leaves(case.arguments))).shape
    wanted = list(named) if spec == "all" else (spec or smallest).split(",")
    if unknown := [name for name in wanted if name not in named]:
        raise ValueError(f"--spec={spec}: {op} has no shape {', '.join(unknown)}; it has {', '.join(named)}, or all")
    return [case for case in cases if case.shape in wanted]


def _tune(
    case: kernels.Case,
    knob: Knob,
    candidates: list[tuple[Any, ...]],
    options: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    arguments = _draw(options.op, case)
    programs: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    refused = {}
    for values in candidates:
        with knob.set(values):
            try:
                lowered = jax.jit(case.function).lower(*arguments)
                if programs.setdefault(lowered.as_text(), str(values)) == str(values):
                    calls[str(values)] = functools.partial(lowered.compile(), *arguments)
            except NotImplementedError as error:
                refused[str(values)] = str(error)
        progress.update(progress.step + 1)
    times = measure.interleaved(calls, repeats=options.repeats, calls=measure.kernel_calls()) if calls else {}
    progress.update(progress.step + 1)
    own = candidates[0]
    found = min(
        (values for values in candidates if str(values) in times), key=lambda v: times[str(v)].median, default=None
    )
    both = found is not None and str(own) in times
    return {
        "heuristic": list(own),
        "found": None if found is None else list(found),
        "ratio": round(times[str(own)].median / times[str(found)].median, 4) if both else None,
        "milliseconds": measure.milliseconds(times),
        "refused": refused,
        "repeats": options.repeats,
    }


def _spec(op: str, shape: str, name: str) -> Any:
    return getattr(_SPECS[op][shape], name, None) if op in _SPECS else None


_SPECS: dict[str, dict[str, Any]] = {
    "bipartite_match": match_specs.NAMED,
    "block_sparse_attention": sparse_specs.SPECS,
    "merge": merge_specs.NAMED,
    "ragged_prefix_mlp": prefix_specs.NAMED,
    "sparse_decode_attention": decode_specs.NAMED,
}


def _draw(op: str, case: kernels.Case) -> Any:
    """Arguments of a case: floating-point numbers drawn from Normal(0, 1), and integers that the op allows."""
    leaves, tree = jax.tree.flatten(case.arguments)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [_leaf(op, case.shape, leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def _leaf(op: str, shape: str, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
    return INTEGERS[op](_SPECS[op][shape], leaf.shape, key).astype(leaf.dtype)


def _slots(spec: merge_specs.Spec, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    return jax.random.randint(key, shape, 0, spec.slots)


def _partners(spec: match_specs.Spec, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    return jax.random.randint(key, shape, 0, spec.tokens // 2)


def _falling(spec: prefix_specs.Spec, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Rows that need each unit: as many rows need any number of units."""
    del key
    return spec.rows * jnp.arange(shape[0], 0, -1) // shape[0]


def _pages(spec: decode_specs.Spec, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Full lists of different pages."""
    if len(shape) == 2:
        return jnp.full(shape, spec.listed * spec.slots)
    return jnp.argsort(jax.random.uniform(key, (*shape[:2], spec.pages)), axis=-1)[..., : spec.listed]


def _blocks(spec: sparse_specs.Spec, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Lists of blocks that go back from each block of queries, as far as there are any."""
    del key
    there = -(-spec.keys // spec.block_k)
    if len(shape) == 3:
        return jnp.broadcast_to(jnp.minimum(jnp.arange(1, shape[2] + 1), spec.capacity), shape)
    return jnp.broadcast_to((jnp.arange(shape[2])[:, None] - jnp.arange(shape[3])) % there, shape)


INTEGERS: dict[str, Callable[..., jax.Array]] = {
    "bipartite_match": _partners,
    "block_sparse_attention": _blocks,
    "merge": _slots,
    "ragged_prefix_mlp": _falling,
    "sparse_decode_attention": _pages,
}
