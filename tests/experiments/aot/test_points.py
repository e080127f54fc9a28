# SPDX-License-Identifier: Apache-2.0
"""Times by regions: how often each part of a schedule counts."""

import dataclasses

import numpy as np
import pytest

from experiments.aot import attention_points, points
from experiments.aot.schedule import Program, Region
from pallas_kernels.block_sparse_attention import from_block_mask, tpu_plan
from pallas_kernels.sparse_decode_attention import specs as decode_specs


def program(step, trips):
    """A kernel whose grid passes `trips` times, with 7 bundles of bookkeeping around a step."""
    return Program("kernel.1", step.bundles + 27, 0, 0, (Region("loop", step.bundles + 7, trips, 0, (step,)),))


def test_the_first_and_last_steps_of_a_row_count_once_a_row():
    step = Region("if", 100 + 30 + 50 + 10, None, 0, tuple(Region("if", size, None, 0) for size in (30, 100, 50)))
    one, total = attention_points.splash_cycles(program(step, 18), 4)
    assert one == 7 + 10 + 100 + (30 + 50) / 4
    assert total == 16 * one


def test_a_kernel_of_a_layer_counts_its_steps_and_the_split_of_tables_once_for_several_sequences():
    step = Region("if", 100 + 40, None, 0, (Region("if", 40, None, 0),))
    plain = program(step, 18)
    # Twenty bundles around the grid, seven of bookkeeping in each of its passes.
    assert points._cycles(plain, 16, 8) == 20 + 18 * 7 + 16 * 140
    pairs = dataclasses.replace(plain, name="merge_pairs.1")
    assert points._cycles(pairs, 16, 8) == 20 + 18 * 7 + 16 * 100 + 2 * 40


def test_a_block_of_pages_counts_the_form_whose_copies_start_beside_the_work():
    spec = decode_specs.NAMED["llama_8b_page_16"]

    def form(whole):
        part = Region("if", whole - 50, None, 208, (Region("loop", 70, None, 0),))
        return Region("if", 80 + whole + part.bundles, None, 416, (Region("if", whole, None, 208), part))

    block = Region("loop", 60 + sum(form(size).bundles for size in (1600, 1700)), None, 832, (form(1600), form(1700)))
    heads = Region("loop", 140 + block.bundles, spec.groups, 832, (block,))
    kernel = program(Region("if", 15 + heads.bundles, None, 832, (heads,)), spec.batch + 2)
    # All pages of a list are one block.
    assert points._decode_cycles(kernel, spec) == 10 * 7 + 8 * (15 + 8 * (140 + 60 + 80 + 1650))


def tile(blocks, causal):
    """An index of `blocks` x `blocks` blocks of 512, all or up to the diagonal."""
    mask = np.tri(blocks, dtype=bool) if causal else np.ones((blocks, blocks), bool)
    return from_block_mask(mask[None, None], queries=512 * blocks, keys=512 * blocks, block_q=512, block_k=512)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_count_as_often_as_lists_hold_them_with_a_mask_only_where_one_is_needed(causal):
    index = tile(4, causal)
    plan = tpu_plan.make_plan(index, 128)
    assert (plan.rows, plan.tiles) == (2, 2)
    walk = Region("loop", 5 + 100 + 130, None, 0, (Region("if", 100, None, 800), Region("if", 130, None, 0)))
    step = Region("if", 40 + 235, None, 0, (Region("if", 235, None, 0, (walk,)),))
    cycles = attention_points.attention_cycles(program(step, 2 * 8 + 2), index, 128, causal=causal)
    # Dense: 4 + 4 items a tile. Causal: 1 + 2 and 3 + 4 of them, an idle one beside; the last of each list needs a mask, and so
    # does the idle one: pairs (0), (1) of the first tile, pairs (1), (3) of the second.
    pairs, masked = (4, 0) if not causal else (3, 2)
    walked = 16 * ((pairs - masked) * 105 + masked * 135)
    assert cycles["total"] == 18 * 7 + 16 * 40 + walked
    assert (cycles["steps"], cycles["pairs_a_step"], cycles["fixed_a_step"]) == (16, pairs, 47)
    assert cycles["bundles_a_pair"] == pytest.approx(walked / 16 / pairs)
    assert cycles["matmul_share"] == 2.0


def test_lists_have_the_density_that_they_say():
    index = attention_points._lists(4096, 128, 0.25, causal=False)
    assert np.all(np.asarray(index.counts) == 8)
    assert np.asarray(attention_points._lists(4096, 512, 1.0, causal=True).counts).ravel().tolist() == list(range(1, 9))
