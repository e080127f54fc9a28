# SPDX-License-Identifier: Apache-2.0
"""Merging and restoring: every implementation against loops, with the gradients of rows and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.merge import merge, reference, restore, specs, tpu, tpu_pairs
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret", "gpu_interpret")
BATCH, LENGTH, SLOTS, WIDTH = 2, 13, 7, 130
ASSIGNS = hnp.arrays(np.int32, (BATCH, LENGTH), elements=st.integers(-1, SLOTS - 1))
NOBODY = np.full((BATCH, LENGTH), -1, np.int32)
IN_ONE = np.stack([np.zeros(LENGTH, np.int32), np.full(LENGTH, SLOTS - 1, np.int32)])


@functools.cache
def arrays(dtype="float32", length=LENGTH, slots=SLOTS):
    rng = np.random.default_rng(0)
    values, moved = (jnp.asarray(rng.normal(size=(BATCH, n, WIDTH)), dtype) for n in (length, slots))
    return values, moved, jnp.asarray(rng.random((BATCH, length)), jnp.float32)


def loop(values, assign, weight, slots):
    """Token by token, in float64."""
    out = np.zeros((BATCH, slots, values.shape[2]))
    for b, n in np.ndindex(*assign.shape):
        if assign[b, n] >= 0:
            out[b, assign[b, n]] += float(weight[b, n]) * np.asarray(values[b, n], np.float64)
    return out


@functools.cache
def runner(implementation):
    """Both ways with all gradients, compiled once for each dtype."""

    def run(assign, values, moved, weight):
        merged, pull = jax.vjp(lambda x, w: merge(x, assign, w, SLOTS, implementation=implementation), values, weight)
        spread, push = jax.vjp(lambda y: restore(y, assign, implementation=implementation), moved)
        return merged, *pull(moved), spread, push(values)[0]

    return jax.jit(run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @settings(max_examples=12, deadline=None)
    @given(assign=ASSIGNS)
    @example(assign=NOBODY)
    @example(assign=IN_ONE)
    def test_equals_a_loop_with_every_gradient(self, implementation, assign):
        values, moved, weight = arrays()
        merged, value_gradient, weight_gradient, spread, back = runner(implementation)(assign, values, moved, weight)
        np.testing.assert_allclose(merged, loop(values, assign, weight, SLOTS), rtol=1e-5, atol=1e-5)
        own = np.where(
            assign[..., None] >= 0, np.take_along_axis(np.asarray(moved), np.maximum(assign, 0)[..., None], 1), 0
        )
        np.testing.assert_array_equal(spread, own)
        np.testing.assert_allclose(back, loop(values, assign, np.ones_like(weight), SLOTS), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(value_gradient, own * weight[..., None], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weight_gradient, (own * values).sum(-1), rtol=1e-5, atol=1e-5)

    def test_bfloat16_is_within_its_rounding_and_a_mean_of_equal_rows_is_that_row(self, implementation):
        values, moved, weight = arrays("bfloat16")
        assign = np.random.default_rng(3).integers(-1, SLOTS, (BATCH, LENGTH)).astype(np.int32)
        merged, _, _, spread, _ = runner(implementation)(assign, values, moved, weight)
        assert merged.dtype == spread.dtype == jnp.bfloat16
        want = loop(values.astype(jnp.float32), assign, weight, SLOTS)
        size = loop(abs(values.astype(jnp.float32)), assign, weight, SLOTS)
        # Half a unit in the last place (2^-9) each for the weights, for taking their excess out, and for the result.
        assert np.all(abs(np.asarray(merged, np.float32) - want) <= 3 * 2**-9 * size)
        equal = jnp.broadcast_to(values[:, :1], values.shape)
        thirds = jnp.full((BATCH, LENGTH), 1 / 3).at[:, 3:].set(0.0).at[:, 2].set(1 / 3)
        mean = merge(equal, jnp.zeros_like(assign), thirds, SLOTS, implementation=implementation)
        np.testing.assert_array_equal(mean[:, 0], values[:, 0])

    def test_other_axes_follow(self, implementation):
        values = arrays()[0].reshape(BATCH, LENGTH, 2, 65)
        assign = jnp.asarray(IN_ONE)
        merged = merge(values, assign, jnp.ones(assign.shape), SLOTS, implementation=implementation)
        assert merged.shape == (BATCH, SLOTS, 2, 65)
        np.testing.assert_allclose(merged[1, SLOTS - 1], values[1].sum(0), rtol=1e-5, atol=1e-5)
        back = restore(merged, assign, implementation=implementation)
        np.testing.assert_array_equal(
            back, jnp.broadcast_to(merged[jnp.array([0, 1]), assign[:, 0]][:, None], back.shape)
        )


@pytest.mark.parametrize(("width", "length"), [(1, LENGTH), (3, LENGTH), (7, LENGTH), (2, 300)])
def test_a_few_numbers_a_token_are_summed_in_float32(width, length):
    rng = np.random.default_rng(width)
    # Numbers that bfloat16 would round, and far apart.
    values = jnp.asarray(
        rng.normal(size=(BATCH, length, width)) * 10.0 ** rng.integers(-3, 4, (1, 1, width)), jnp.float32
    )
    slots = length // 2
    assign = jnp.asarray(rng.integers(-1, slots, (BATCH, length)), jnp.int32)
    weight = arrays(length=length)[2]
    got = merge(values, assign, weight, slots, implementation="interpret")
    error = abs(got - loop(values, assign, weight, slots)) / np.max(abs(values), axis=(0, 1))
    assert np.max(error) < 1e-6


def odd_last(length, removed, width, seed, in_order):
    """Rows, slots and weights in which odd tokens head the last slots and `removed` even ones join them."""
    rng = np.random.default_rng(seed)
    even, odd = -(-length // 2), length // 2
    assign = np.zeros((BATCH, length), np.int32)
    for row in assign:
        order = rng.permutation(even)
        row[1::2] = even - removed + np.arange(odd)
        row[2 * order[:removed]] = even - removed + rng.integers(0, odd, removed)
        stay = np.sort(order[removed:]) if in_order else order[removed:]
        row[2 * stay] = np.arange(even - removed)
    values = jnp.asarray(rng.normal(size=(BATCH, length, width)), jnp.bfloat16)
    return values, jnp.asarray(assign), jnp.asarray(rng.random((BATCH, length)), jnp.float32), length - removed


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("length", "removed", "width"),
    # The last ones have more even tokens than one product takes to odd slots, and several tiles of slots.
    [(13, 3, 256), (14, 7, 128), (33, 0, 384), (16, 8, 128), (551, 40, 128), (550, 275, 128)],
)
def test_where_odd_tokens_head_the_last_slots_a_part_of_the_product_is_enough(length, removed, width, in_order):
    values, assign, weight, slots = odd_last(length, removed, width, length, in_order)
    assert tpu_pairs.takes(values, slots, in_order)
    want = loop(values.astype(jnp.float32), assign, weight, slots)
    size = loop(abs(values.astype(jnp.float32)), assign, weight, slots)
    options = {"odd_last": True, "in_order": in_order, "implementation": "interpret"}
    got = merge(values, assign, weight, slots, **options)
    assert got.dtype == jnp.bfloat16
    assert np.all(abs(np.asarray(got, np.float32) - want) <= 3 * 2**-9 * size)


@functools.cache
def tiled():
    def run(assign, values, moved, weight):
        merged = tpu.merge(values, assign, weight, slots=37, tile=16, interpret=True)
        return merged, tpu.restore(moved, assign, tile=16, interpret=True)

    return jax.jit(run)


@settings(max_examples=5, deadline=None)
@given(assign=hnp.arrays(np.int32, (BATCH, 45), elements=st.integers(-1, 36)))
@example(assign=np.tile(np.arange(45, dtype=np.int32) // 2, (BATCH, 1)))
@example(assign=np.full((BATCH, 45), -1, np.int32))
def test_the_kernel_crosses_tiles(assign):
    values, moved, weight = arrays("float32", 45, 37)
    merged, spread = tiled()(assign, values, moved, weight)
    np.testing.assert_allclose(merged, reference.merge(values, assign, weight, 37), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(spread, reference.restore(moved, assign))


def test_pairs_of_tiles_that_no_token_joins_are_not_live():
    assign = jnp.array([[0, 1, 5, -1, 4, 4, -1, -1, 8, 0, -1, -1]])
    np.testing.assert_array_equal(
        tpu._live(assign, 10, 4)[0], [[True, False, True], [True, True, False], [False, False, True]]
    )


@pytest.mark.parametrize("implementation", ["tpu", "interpret"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 100), jnp.float32, r"at least 128 numbers; got \(2, 4, 100\), the nearest is \(2, 4, 128\)"),
        ((2, 4, 2100), jnp.float32, r"multiple of 128; got \(2, 4, 2100\), the nearest is \(2, 4, 2176\)"),
        ((2, 4, 128), jnp.int32, r"takes float32 and bfloat16; got int32 \(2, 4, 128\)"),
        ((64, 20000, 128), jnp.float32, r"tables of a batch of 64 .* the nearest batch that fits is 5\d"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_nearest_shape(implementation, shape, dtype, message):
    arguments = [jax.ShapeDtypeStruct(shape, dtype)]
    arguments += [jax.ShapeDtypeStruct(shape[:2], kind) for kind in (jnp.int32, jnp.float32)]
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda x, a, w: merge(x, a, w, shape[1], implementation=implementation), *arguments)


def test_shapes_that_do_not_fit_are_refused():
    values, assign = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"assign and weight \[B, N\]; got \(2, 3, 4\), \(2, 3\), \(2, 2\)"):
        merge(values, assign, jnp.ones((2, 2)), 2)
    with pytest.raises(ValueError, match=r"at least one slot; got 0"):
        merge(values, assign, jnp.ones((2, 3)), 0)
    with pytest.raises(ValueError, match=r"assign \[B, N\]; got \(2, 3, 4\) and \(1, 3\)"):
        restore(values, assign[:1])


def _both_ways(spec):
    def run(values, assign, weight):
        merged = merge(values, assign, weight, spec.slots, implementation="tpu")
        return merged, restore(merged, assign, implementation="tpu")

    shape = (spec.batch, spec.tokens)
    kinds = [((*shape, spec.width), spec.dtype), (shape, jnp.int32), (shape, jnp.float32)]
    return run, *(jax.ShapeDtypeStruct(*kind) for kind in kinds)


def test_long_sequences_of_pairs_are_worked_by_blocks_of_columns():
    shape = (1, 2049, 1024)
    assert tpu_pairs._columns(shape, 2009, True) == 256
    assert tpu_pairs._columns(shape, 2009, False) is None
    assert tpu_pairs._columns((1, 1025, 1024), 985, True) == 1024


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", ["vit_large_577", "vit_large_1025"])
def test_merges_of_pairs_and_of_few_numbers_compile_for_every_tpu(chip, name):
    spec = specs.NAMED[name]

    def run(values, numbers, assign, weight):
        options = {"slots": spec.slots, "implementation": "tpu"}
        pairs = merge(values, assign, weight, odd_last=True, in_order=True, **options)
        return pairs, merge(numbers, assign, weight, **options)

    shape = (spec.batch, spec.tokens)
    kinds = [((*shape, spec.width), spec.dtype), ((*shape, 3), jnp.float32), (shape, jnp.int32), (shape, jnp.float32)]
    assert tpu_compiler.kernels(chip, run, *(jax.ShapeDtypeStruct(*kind) for kind in kinds)) == 2


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", specs.NAMED)
def test_it_compiles_for_every_tpu_both_ways(chip, name):
    assert tpu_compiler.kernels(chip, *_both_ways(specs.NAMED[name])) == 2


def test_it_compiles_for_four_chips_without_a_collective():
    assert tpu_compiler.collectives("4 x v5e", *_both_ways(specs.NAMED["vit_large_197"])) == []
