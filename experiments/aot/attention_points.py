# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels' schedules are held to: cycles by the lists that they walk, beside JAX's own splash attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from experiments.aot import compiler, kernels, schedule
from pallas_kernels.block_sparse_attention import BlockIndex, block_sparse_attention, from_block_mask, tpu_plan

_Array = jax.ShapeDtypeStruct
_HEADS = 8
# Tokens of which no TPU holds a head's keys and values.
_LONG = 2**18


def attention_cycles(program: schedule.Program, index: BlockIndex, width: int, *, causal: bool) -> dict[str, float]:
    """Cycles of a block-sparse kernel over the lists of `index`: of a step, of its parts, of all.

    A step holds one loop over pairs of items, whose body has a form with a mask and one without where the kernel can tell.
    """
    plan = tpu_plan.make_plan(index, width)
    counts = np.asarray(tpu_plan.tables(index, plan)[1])[:, :, :, 0]
    pairs = counts[..., -1] // 2
    step, loop = program.step, _walk(program)
    forms = sorted(region.bundles for region in loop.inside)
    pair = [loop.own + size for size in (forms or [0])]
    masked = _masked_pairs(counts[..., : plan.rows], plan, causal) if len(forms) == 2 else np.zeros_like(pairs)
    grid_steps = program.grid.trips - 2
    repeats = grid_steps / pairs.size
    walked = repeats * float(np.sum((pairs - masked) * pair[0] + masked * pair[-1]))
    fixed = step.bundles - loop.bundles
    total = program.grid.trips * program.grid.own + grid_steps * fixed + walked
    return {
        "total": total,
        "steps": grid_steps,
        "fixed_a_step": fixed + program.grid.own,
        "bookkeeping_a_step": program.grid.own,
        "bundles_a_pair": walked / (repeats * float(np.sum(pairs))),
        "pairs_a_step": float(np.mean(pairs)),
        "matmul_share": max(region.matmul_slots / region.bundles for region in (loop.inside or (loop,))) / 4,
    }


def _walk(program: schedule.Program) -> schedule.Region:
    """The loop over pairs of items in a step."""
    step = program.step
    held = [region for region in step.inside if any(inner.kind == "loop" for inner in region.inside)] or [step]
    guard = max(held, key=lambda region: region.bundles)
    return next(region for region in guard.inside if region.kind == "loop")


def _masked_pairs(counts: np.ndarray, plan: tpu_plan.Plan, causal: bool) -> np.ndarray:
    """Pairs of items of each tile that hold an idle item or, when causal, the block on the diagonal, the last of its list."""
    items = np.maximum(-(-counts // plan.width), 1)
    ends = np.cumsum(items, axis=-1)
    found = np.zeros(counts.shape[:-1], int)
    for place in np.ndindex(*counts.shape[:-1]):
        last = ends[place] - 1
        closed = {int(item) // 2 for item, count in zip(last, counts[place], strict=True) if causal or count == 0}
        found[place] = len(closed | ({int(last[-1]) // 2} if ends[place][-1] % 2 else set()))
    return found


def _lists(length: int, block: int, density: float, *, causal: bool) -> BlockIndex:
    """The same number of blocks in every list, spread evenly; all up to the diagonal when causal."""
    blocks = length // block
    if causal:
        mask = np.tri(blocks, dtype=bool)
    else:
        listed = round(blocks * density)
        mask = np.zeros((blocks, blocks), bool)
        for row in range(blocks):
            mask[row, (row + np.arange(listed) * blocks // listed) % blocks] = True
    return from_block_mask(mask[None, None], queries=length, keys=length, block_q=block, block_k=block)


def _attention(length: int, width: int, index: BlockIndex, *, causal: bool, gradient: bool = False) -> tuple:
    """A function and its arguments: attention over lists, or its gradients."""
    array = _Array((1, length, _HEADS, width), jnp.bfloat16)
    lists = jax.tree.map(lambda x: _Array(x.shape, x.dtype), index)

    def forward(query: Any, key: Any, value: Any, lists: Any) -> Any:
        return block_sparse_attention(query, key, value, lists, causal=causal, implementation="tpu")

    return _with_gradient(forward, 4 * (array,) + (lists,)) if gradient else (forward, 3 * (array,) + (lists,))


def _splash(length: int, width: int, block: int, *, gradient: bool = False) -> tuple:
    """A function and its arguments: dense attention by JAX's own kernel, the peer."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    names += ("block_q_dq", "block_kv_dq")
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((length, length))] * _HEADS)
    sizes = splash.BlockSizes(**dict.fromkeys(names, block))
    kernel = splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    array = _Array((_HEADS, length, width), jnp.bfloat16)
    return _with_gradient(kernel, 4 * (array,)) if gradient else (kernel, 3 * (array,))


def _with_gradient(function: Callable[..., Any], arguments: tuple) -> tuple:
    """Gradients of three arrays; the cotangent comes first."""

    def gradients(cotangent: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return jax.vjp(lambda *arrays: function(*arrays, *rest), query, key, value)[1](cotangent)

    return gradients, arguments


def splash_cycles(program: schedule.Program, blocks_a_row: float) -> tuple[float, float]:
    """Cycles of a step and of all, when each row of the grid has so many steps: its first and last one do more."""
    step = program.step
    (work, *ends) = sorted(step.inside, key=lambda region: -region.bundles)
    one = program.grid.own + step.own + work.bundles + sum(region.bundles for region in ends) / blocks_a_row
    return one, one * (program.grid.trips - 2)


def _named(found: kernels.Scheduled, part: str) -> schedule.Program:
    return next(program for program in found.kernels if part in program.name)


def block_sparse_rows(chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """Sparse cost S on v5e against the best dense time, backward passes against splash's, shares of peak on v6e."""
    if "v5e" in chips:
        chip = compiler.CHIPS["v5e"]
        for length in (4096, 16384):
            dense = kernels.compiled(*_splash(length, 128, 1024), "v5e", dump)
            best = splash_cycles(dense.kernels[0], length / 1024)[1] / chip.clock
            for block in (512, 128):
                yield _forward_row(length, 128, block, 0.25, chip, dump, best=best)
        # A head's keys and values are 128 MiB; no peer takes them, whose time grows with the square of the length.
        yield _forward_row(_LONG, 128, 512, 1 / 16, chip, dump, best=best * (_LONG / length) ** 2, streamed=True)
        yield from _backward_rows(chip, dump)
    if "v6e" in chips:
        for width in (128, 256):
            yield _forward_row(16384, width, 512, 1.0, compiler.CHIPS["v6e"], dump, causal=True)


def _forward_row(
    length: int,
    width: int,
    block: int,
    density: float,
    chip: compiler.Chip,
    dump: str,
    *,
    causal: bool = False,
    best: float | None = None,
    streamed: bool = False,
) -> dict[str, Any]:
    """Where keys are `streamed`, each listed block crosses HBM; otherwise every array does once."""
    index = _lists(length, block, density, causal=causal)
    found = kernels.compiled(*_attention(length, width, index, causal=causal), chip.name, dump)
    cycles = attention_cycles(found.kernels[0], index, width, causal=causal)
    seconds = cycles["total"] / chip.clock
    pairs = _HEADS * (length * (length + 1) / 2 if causal else density * length**2)
    step = cycles["total"] / cycles["steps"]
    moved = 2 * length + 2 * (int(np.sum(index.counts)) * block if streamed else length)
    row = {
        "part": f"forward{', keys streamed' if streamed else ''}, estimated by regions",
        "shape": f"1x{length}, {_HEADS} heads of {width}, blocks of {block}{', causal' if causal else ''}",
        "chip": chip.name,
        "density": density,
        "estimated_us": 1e6 * seconds,
        "hbm_us": 1e6 * moved * _HEADS * width * 2 / chip.bandwidth,
        "share_of_peak": 4 * width * pairs / seconds / chip.peak,
        "matmul_slots_of_the_walk": cycles["matmul_share"] * 4 / _units(chip),
        "bookkeeping_share": cycles["bookkeeping_a_step"] / step,
        "fixed_share": cycles["fixed_a_step"] / step,
        "bundles_a_pair": cycles["bundles_a_pair"],
        "pairs_a_step": cycles["pairs_a_step"],
        "spill_stores": found.kernels[0].spill_stores,
    }
    if best is not None:
        row |= {
            "peer": f"splash attention, dense, blocks of 1024{', by the square of the length' if streamed else ''}",
            "peer_us": 1e6 * best,
            "S": seconds / (density * best),
        }
    return kernels.finished(row)


def _units(chip: compiler.Chip) -> int:
    """Matrix units of a core: four of 128, or two of 256."""
    return 2 if chip.flops_per_cycle > 131_072 else 4


def _backward_rows(chip: compiler.Chip, dump: str) -> Iterator[dict[str, Any]]:
    """Cycles of a listed block, its share of a step's start and end included, at two blocks a list."""
    length, block = 4096, 512
    index = _lists(length, block, 0.25, causal=False)
    ours = kernels.compiled(*_attention(length, 128, index, causal=False, gradient=True), chip.name, dump)
    theirs = kernels.compiled(*_splash(length, 128, block, gradient=True), chip.name, dump)
    for part, kernel, peer in (("queries", "query_gradient", "_dq"), ("keys and values", "key_gradients", "_dkv")):
        # As many lists of keys hold a block of queries as the reverse, so the counts of both walks are the same.
        cycles = attention_cycles(_named(ours, kernel), index, 128, causal=False)
        own = cycles["total"] / (_HEADS * int(np.sum(index.counts)))
        other = splash_cycles(_named(theirs, peer), 0.25 * length / block)[0]
        yield kernels.finished(
            {
                "part": f"gradients of {part}, cycles of a listed block",
                "shape": f"1x{length}, {_HEADS} heads of 128, blocks of {block}",
                "chip": chip.name,
                "density": 0.25,
                "cycles": own,
                "peer": "splash attention, blocks of 512",
                "peer_cycles": other,
                "over_peer": own / other,
                "matmul_slots_of_the_walk": cycles["matmul_share"],
                "spill_stores": _named(ours, kernel).spill_stores,
            }
        )


def position_rows(chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """Cycles of a pair of items on v5e with T5's bias from positions, in several buckets and in one, and without it."""
    cases = {(case.shape, case.part): case for case in kernels.KERNELS["biased_flash_attention"]("tpu")}
    names = ("mrt5_small_1024", "mrt5_small_1024_positions")
    for chip in {"v5e"}.intersection(chips):
        for part, parts in (
            ("forward and backward", ("forward", "query_gradient", "key_gradients")),
            ("column statistics", ("column_stats",)),
        ):
            plain, biased = (
                kernels.compiled(case.function, case.arguments, chip, dump)
                for case in (cases[name, part] for name in names)
            )
            for kernel in parts:
                without, walk = _walk(_named(plain, kernel)), _walk(_named(biased, kernel))
                # First the form for pairs in one bucket, which needs no square of a bias.
                one, several = walk.inside
                squares = [loop for guard in several.inside for loop in guard.inside]
                row = {
                    "part": f"{kernel}, cycles of a pair of items",
                    "shape": names[1],
                    "chip": chip,
                    "without_positions": without.own + (without.inside[0].bundles if without.inside else 0),
                    "one_bucket": walk.own + one.bundles,
                    "several_buckets": walk.own + several.own,
                }
                if squares:
                    # The table's gradient, square by square of 128 x 128.
                    far, near = sorted(region.bundles for region in squares[0].inside)
                    row |= {"a_square_of_one": squares[0].own + far, "a_square_of_several": squares[0].own + near}
                yield kernels.finished(row)
