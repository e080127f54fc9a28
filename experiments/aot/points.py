# SPDX-License-Identifier: Apache-2.0
"""What the kernels' schedules are held to: times estimated region by region, beside the best peer of the same shape.

A grid's loop passes two times more than it has steps and guards the steps' own work; inside, each region counts as often as it
runs. S is the time over density x best dense time. Estimates, made without a TPU: what memory does meanwhile is `hbm_us`, and a
bar that is cleared by less than a twentieth is not cleared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from adaptive.tokens import TokenSet
from experiments.aot import compiler, kernels, schedule
from layers.hooks import Reduce
from layers.vit import SHAPES, Block
from pallas_kernels import ragged_prefix_mlp as prefix
from pallas_kernels.biased_flash_attention import tpu as biased
from pallas_kernels.block_sparse_attention import BlockIndex, block_sparse_attention, from_block_mask, tpu_plan
from pallas_kernels.merge import tpu_pairs
from pallas_kernels.ragged_prefix_mlp import specs as prefix_specs
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS
from pallas_kernels.sparse_decode_attention import specs as decode_specs
from pallas_kernels.sparse_decode_attention import tpu as decode

_Array = jax.ShapeDtypeStruct
_HEADS = 8
# Rows of a tile of the staircase in these shapes.
_TILE = 512


def attention_cycles(program: schedule.Program, index: BlockIndex, width: int, *, causal: bool) -> dict[str, float]:
    """Cycles of a block-sparse kernel over the lists of `index`: of a step, of its parts, of all.

    A step holds one loop over pairs of items, whose body has a form with a mask and one without where the kernel can tell.
    """
    plan = tpu_plan.make_plan(index, width)
    counts = np.asarray(tpu_plan.tables(index, plan)[1])[:, :, :, 0]
    pairs = counts[..., -1] // 2
    step = program.step
    (guard,) = [region for region in step.inside if any(inner.kind == "loop" for inner in region.inside)] or [step]
    loop = next(region for region in guard.inside if region.kind == "loop")
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
) -> dict[str, Any]:
    index = _lists(length, block, density, causal=causal)
    found = kernels.compiled(*_attention(length, width, index, causal=causal), chip.name, dump)
    cycles = attention_cycles(found.kernels[0], index, width, causal=causal)
    seconds = cycles["total"] / chip.clock
    pairs = _HEADS * (length * (length + 1) / 2 if causal else density * length**2)
    step = cycles["total"] / cycles["steps"]
    row = {
        "part": "forward, estimated by regions",
        "shape": f"1x{length}, {_HEADS} heads of {width}, blocks of {block}{', causal' if causal else ''}",
        "chip": chip.name,
        "density": density,
        "estimated_us": 1e6 * seconds,
        "hbm_us": 1e6 * 4 * length * _HEADS * width * 2 / chip.bandwidth,
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
            "peer": "splash attention, dense, blocks of 1024",
            "peer_us": 1e6 * best,
            "S": seconds / (density * best),
        }
    return _finished(row)


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
        yield _finished(
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


def staircase_rows(chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """The forward staircase with every unit live, against the dense products as XLA makes them."""
    spec = prefix_specs.NAMED["vit_large"]
    shapes = ((spec.rows, spec.width), (spec.width, spec.hidden), (spec.hidden,), (spec.hidden, spec.width))
    x, up, bias, down = (_Array(shape, spec.dtype) for shape in shapes)

    def staircase(x: Any, counts: Any, up: Any, bias: Any, down: Any) -> Any:
        return prefix.ragged_prefix_mlp(x, counts, up, bias, down, implementation="tpu")

    def dense(x: Any, up: Any, bias: Any, down: Any) -> Any:
        return ACTIVATIONS["gelu_tanh"](x @ up + bias) @ down

    for name in chips:
        chip = compiler.CHIPS[name]
        counts = _Array((spec.units,), jnp.int32)
        found = kernels.compiled(staircase, (x, counts, up, bias, down), name, dump)
        peer = kernels.compiled(dense, (x, up, bias, down), name, dump)
        (program,) = found.kernels
        steps = program.grid.trips - 2
        # A tile's first and last step begin and end its sums.
        own = splash_cycles(program, steps * _TILE / spec.rows)[1]
        other, best = (sum(cycles for cycles, _ in one.instructions) for one in (found, peer))
        yield _finished(
            {
                "part": "mlp, forward, all units live",
                "shape": "vit_large",
                "chip": name,
                "estimated_us": 1e6 * own / chip.clock,
                "peer": "the dense products by XLA",
                "peer_us": 1e6 * best / chip.clock,
                "of_peer_speed": best / own,
                "bookkeeping_share": (other + steps * program.grid.own) / (own + other),
                "metadata_us": 1e6 * other / chip.clock,
                "share_of_peak": 4
                * spec.rows
                * spec.width
                * spec.hidden
                / (own / chip.clock)
                / (chip.cores * chip.peak),
            }
        )


def merge_share_rows(chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """What ToMe takes of a ViT-L layer on v5e: everything between attention and MLP, over the same layer without it.

    The layer is the faster one of attention by plain JAX and by the kernel. Copies that no operation of the layer asked for
    (of results into their last layout) are left out.
    """
    for name in {"v5e"}.intersection(chips):
        for tokens, batch, removed in ((197, 64, 8), (577, 32, 8), (1025, 16, 40)):
            times = {}
            for attention in ("xla", "tpu"):
                found = kernels.compiled(*_vit_layer(tokens, batch, 0, attention), name, dump)
                times[attention] = _layer_cycles(found, tokens, batch, "")
            reduced = kernels.compiled(*_vit_layer(tokens, batch, removed, "xla"), name, dump)
            own = _layer_cycles(reduced, tokens, batch, "Block._reduce")
            fastest = min(times, key=times.get)
            clock = compiler.CHIPS[name].clock
            # One read and one write of the features, were they all that is moved, and not in on-chip memory.
            moved = batch * (2 * tokens - removed) * SHAPES["L"][0] * 2 / compiler.CHIPS[name].bandwidth * clock
            merging = sum(_cycles(program, batch) for program in reduced.kernels if "merge_pairs" in program.name)
            yield _finished(
                {
                    "part": "matching and merging in a ViT-L layer",
                    "shape": f"{batch}x{tokens}, {removed} removed",
                    "chip": name,
                    "estimated_us": 1e6 * own / clock,
                    "layer_us": {attention: 1e6 * cycles / clock for attention, cycles in times.items()},
                    "share_of_layer": own / times[fastest],
                    "kernels_us": {
                        program.name: round(1e6 * _cycles(program, batch) / clock, 2)
                        for program, place in zip(reduced.kernels, reduced.places, strict=True)
                        if "Block._reduce" in place
                    },
                    "other_instructions": sum("Block._reduce" in place for _, place in reduced.instructions),
                    "hbm_us": 1e6 * moved / clock,
                    "share_with_hbm": (own + max(0.0, moved - merging)) / times[fastest],
                }
            )


def decode_rows(chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """Sparse decoding over full lists, against the time that memory needs for the listed pages alone."""
    for case in kernels.KERNELS["sparse_decode_attention"]("tpu"):
        spec = decode_specs.NAMED[case.shape]
        for name in chips:
            chip = compiler.CHIPS[name]
            (program,) = kernels.compiled(case.function, case.arguments, name, dump).kernels
            seconds = _decode_cycles(program, spec) / chip.clock
            yield _finished(
                {
                    "part": "one query row, every list full",
                    "shape": case.shape,
                    "chip": name,
                    "estimated_us": 1e6 * seconds,
                    "hbm_us": 1e6 * case.bytes / chip.bandwidth,
                    # Copies run beside the work: the longer of the two is the least time, and their sum the most.
                    "share_of_bandwidth": case.bytes / chip.bandwidth / max(seconds, case.bytes / chip.bandwidth),
                }
            )


def _decode_cycles(program: schedule.Program, spec: decode_specs.Spec) -> float:
    """A sequence's step holds a loop over key heads, that one a loop over blocks of pages.

    Lists are full: no run of pages is cut short, and no page ends before its slots do.
    """
    heads = next(region for region in program.step.inside if region.kind == "loop")
    block = next(region for region in heads.inside if region.kind == "loop")
    # One form for each buffer: in it starts and work are one region when the block to come is whole, and two otherwise.
    forms = [(form.own, work.bundles) for form, work in _whole_blocks(block)]
    worked = sum(own + work for own, work in forms) / len(forms)
    blocks = -(-spec.listed // decode.block_pages(spec.slots, spec.width, spec.dtype, spec.listed))
    one = heads.own + blocks * (block.own + worked)
    return program.grid.trips * program.grid.own + spec.batch * (program.step.own + spec.groups * one)


def _whole_blocks(region: schedule.Region) -> Iterator[tuple[schedule.Region, schedule.Region]]:
    """Regions that hold two forms of a product, each with that form which has no branch."""
    works = [one for one in region.inside if one.matmul_slots and not any(inner.matmul_slots for inner in one.inside)]
    if len(works) == 2:
        yield region, min(works, key=lambda work: len(work.inside))
        return
    for inner in region.inside:
        yield from _whole_blocks(inner)


def _vit_layer(tokens: int, batch: int, removed: int, attention: str) -> tuple:
    """A function and its arguments: a ViT-L layer in bfloat16, with ToMe where tokens are removed."""
    width, _, heads, hidden = SHAPES["L"]
    hooks = (Reduce("tome", (tokens - removed,)),) if removed else ()
    block = Block(
        heads,
        hidden,
        layer=0,
        weighted=True,
        class_token=True,
        grid=(1, 1, tokens - 1),
        hooks=hooks,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        implementation=attention,
    )
    features, mass = _Array((batch, tokens, width), jnp.bfloat16), _Array((batch, tokens), jnp.float32)
    plain = block.clone(implementation="xla")
    params = jax.eval_shape(lambda x: plain.init(jax.random.key(0), TokenSet.create(x)), features)

    def layer(params: Any, features: Any, mass: Any) -> Any:
        out = block.apply(params, TokenSet.create(features).replace(mass=mass))[0]
        return out.features, out.mass, out.coords, out.origin

    return layer, (params, features, mass)


def _cycles(program: schedule.Program, batch: int) -> float:
    """Of a kernel in a layer, its step once for each step of the grid and not on the pipeline's two other passes.

    Merging of pairs splits the tables of several sequences in the first one's step.
    """
    if program.name.startswith("pair_up"):
        # Its loops are over tokens: all sequences are one step.
        return program.cycles()
    step, steps = program.step, program.grid.trips - 2
    total = program.cycles() - 2 * step.bundles
    if program.name.startswith("merge_pairs"):
        total -= steps * sum(region.bundles for region in step.inside) * (1 - 1 / tpu_pairs.sequences(batch))
    return total


def _layer_cycles(found: kernels.Scheduled, tokens: int, batch: int, scope: str) -> float:
    total = sum(cycles for cycles, place in found.instructions if place and scope in place)
    for program, place in zip(found.kernels, found.places, strict=True):
        if scope not in place:
            continue
        if "block_sparse" in program.name:
            blocks = biased.KERNELS.all_blocks(tokens, tokens, False)
            total += attention_cycles(program, blocks, 64, causal=False)["total"]
        else:
            total += _cycles(program, batch)
    return total


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        return round(value, 4 if abs(value) < 10 else 1) if isinstance(value, float) else value

    return {**short(row), "kind": kernels.KIND, "versions": kernels.compiler_versions("jax", "jaxlib", "libtpu")}


POINTS: dict[str, Callable[[tuple[str, ...], str], Iterator[dict[str, Any]]]] = {
    "block_sparse_attention": block_sparse_rows,
    "merge": merge_share_rows,
    "ragged_prefix_mlp": staircase_rows,
    "sparse_decode_attention": decode_rows,
}


def rows(name: str, chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    """The points of a kernel of `kernels.KERNELS` on the chips asked for; none where it is held to nothing of the kind.

    Args:
      dump: folder that `compiler.prepare` was given.
    """
    for row in POINTS[name](chips, dump) if name in POINTS else ():
        yield {"op": name, **row}
