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

from adaptive.tokens import TokenSet
from experiments.aot import attention_points, compiler, kernels, schedule
from layers.hooks import Reduce
from layers.vit import SHAPES, Block
from pallas_kernels import across
from pallas_kernels import ragged_prefix_mlp as prefix
from pallas_kernels.biased_flash_attention import tpu as biased
from pallas_kernels.merge import tpu_pairs
from pallas_kernels.ragged_prefix_mlp import specs as prefix_specs
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS
from pallas_kernels.sparse_decode_attention import specs as decode_specs
from pallas_kernels.sparse_decode_attention import tpu as decode

_Array = jax.ShapeDtypeStruct
# Rows of a tile of the staircase in these shapes.
_TILE = 512


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
        own = attention_points.splash_cycles(program, steps * _TILE / spec.rows)[1]
        other, best = (sum(cycles for cycles, _ in one.instructions) for one in (found, peer))
        yield kernels.finished(
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
                times[attention] = _layer_cycles(found, tokens, batch, 0, "")
            reduced = kernels.compiled(*_vit_layer(tokens, batch, removed, "xla"), name, dump)
            own = _layer_cycles(reduced, tokens, batch, removed, "Block._reduce")
            fastest = min(times, key=times.get)
            clock = compiler.CHIPS[name].clock
            # One read and one write of the features, were they all that is moved, and not in on-chip memory.
            moved = batch * (2 * tokens - removed) * SHAPES["L"][0] * 2 / compiler.CHIPS[name].bandwidth * clock
            merging = sum(
                _cycles(program, batch, removed) for program in reduced.kernels if "merge_pairs" in program.name
            )
            yield kernels.finished(
                {
                    "part": "matching and merging in a ViT-L layer",
                    "shape": f"{batch}x{tokens}, {removed} removed",
                    "chip": name,
                    "estimated_us": 1e6 * own / clock,
                    "layer_us": {attention: 1e6 * cycles / clock for attention, cycles in times.items()},
                    "share_of_layer": own / times[fastest],
                    "kernels_us": {
                        program.name: round(1e6 * _cycles(program, batch, removed) / clock, 2)
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
            yield kernels.finished(
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


def _facts_cycles(program: schedule.Program, removed: int) -> float:
    """All sequences are one step; a register of tokens that do not head a slot has a loop of its own, for those there are."""
    work = program.regions[0]
    (guard,) = work.inside
    turns = -(-removed // across.UNROLL)
    own = program.bundles - sum(region.bundles for region in program.regions)
    return own + work.own + guard.own + turns * guard.inside[0].bundles


def _cycles(program: schedule.Program, batch: int, removed: int) -> float:
    """Of a kernel in a layer, its step once for each step of the grid and not on the pipeline's two other passes.

    Merging of pairs splits the tables of several sequences in the first one's step.
    """
    if program.name.startswith("pair_up"):
        # Its loops are over tokens: all sequences are one step.
        return program.cycles()
    if program.name.startswith("merge_facts"):
        return _facts_cycles(program, removed)
    step, steps = program.step, program.grid.trips - 2
    total = program.cycles() - 2 * step.bundles
    if program.name.startswith("merge_pairs"):
        total -= steps * sum(region.bundles for region in step.inside) * (1 - 1 / tpu_pairs.sequences(batch))
    return total


def _layer_cycles(found: kernels.Scheduled, tokens: int, batch: int, removed: int, scope: str) -> float:
    total = sum(cycles for cycles, place in found.instructions if place and scope in place)
    for program, place in zip(found.kernels, found.places, strict=True):
        if scope not in place:
            continue
        if "block_sparse" in program.name:
            blocks = biased.KERNELS.all_blocks(tokens, tokens, False)
            total += attention_points.attention_cycles(program, blocks, 64, causal=False)["total"]
        else:
            total += _cycles(program, batch, removed)
    return total


POINTS: dict[str, Callable[[tuple[str, ...], str], Iterator[dict[str, Any]]]] = {
    "biased_flash_attention": attention_points.position_rows,
    "block_sparse_attention": attention_points.block_sparse_rows,
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
