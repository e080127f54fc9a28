# SPDX-License-Identifier: Apache-2.0
"""Compaction and expansion: every implementation against boolean indexing in NumPy, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import vmem
from pallas_kernels.compact import Packing, compact, expand, pack, reference, specs, tpu
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret")
BATCH, LENGTH, CAPACITY, WIDTH = 2, 11, 6, 128
KEEPS = hnp.arrays(bool, (BATCH, LENGTH))
EXAMPLES = (
    np.zeros((BATCH, LENGTH), bool),
    np.ones((BATCH, LENGTH), bool),
    np.arange(LENGTH) == np.array([[LENGTH - 1], [0]]),
    np.arange(LENGTH) < np.array([[CAPACITY], [CAPACITY + 1]]),
)


def with_examples(test):
    """The gates that must never be missing: none, all, one survivor at an end, exactly full and one too many."""
    for keep in EXAMPLES:
        test = example(keep=keep)(test)
    return settings(max_examples=12, deadline=None)(given(keep=KEEPS)(test))


@functools.cache
def values(length=LENGTH, dtype="float32"):
    drawn = np.random.default_rng(0).normal(size=(BATCH, length, WIDTH)).astype(np.float32)
    return jnp.asarray(drawn, dtype)


@functools.cache
def runner(implementation, dtype="float32"):
    """Packed rows, spread rows and the gradients of both, compiled once."""

    def run(keep, rows, packed_rows):
        packing = pack(keep, CAPACITY)
        packed, pull = jax.vjp(lambda x: compact(x, packing, implementation=implementation), rows)
        spread, push = jax.vjp(lambda y: expand(y, packing, implementation=implementation), packed_rows)
        return packed, pull(packed_rows)[0], spread, push(rows)[0]

    run = jax.jit(run)
    return lambda keep: run(keep, values(dtype=dtype), values(CAPACITY, dtype))


def loop(keep, rows, packed_rows):
    """Boolean indexing, row by row of the batch."""
    packed, spread = np.zeros_like(packed_rows), np.zeros_like(rows)
    for b, row in enumerate(keep):
        kept = np.flatnonzero(row)[:CAPACITY]
        packed[b, : len(kept)] = rows[b, kept]
        spread[b, kept] = packed_rows[b, : len(kept)]
    return packed, spread


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @with_examples
    def test_equals_boolean_indexing_bit_for_bit_and_each_is_the_gradient_of_the_other(
        self, implementation, dtype, keep
    ):
        packed, packed_gradient, spread, spread_gradient = runner(implementation, dtype)(keep)
        want_packed, want_spread = loop(keep, np.asarray(values(dtype=dtype)), np.asarray(values(CAPACITY, dtype)))
        assert packed.dtype == spread.dtype == dtype
        np.testing.assert_array_equal(packed, want_packed)
        np.testing.assert_array_equal(spread, want_spread)
        np.testing.assert_array_equal(packed_gradient, want_spread)
        np.testing.assert_array_equal(spread_gradient, want_packed)

    def test_a_gradient_has_a_gradient(self, implementation):
        packing = pack(jnp.asarray(EXAMPLES[2]), CAPACITY)

        def energy(x):
            return jnp.sum(compact(x, packing, implementation=implementation) ** 3)

        second = jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(energy)(x) ** 2)))(values())
        want = np.where(EXAMPLES[2][..., None], 36.0 * np.asarray(values()) ** 3, 0.0)
        np.testing.assert_allclose(second, want, rtol=1e-5)

    def test_other_axes_follow_and_what_is_not_kept_gets_the_fill(self, implementation):
        keep = np.array([[True, False, True], [False, False, True]])
        packing = pack(jnp.asarray(keep), 2)
        rows = values(3).reshape(BATCH, 3, 2, 64)
        packed = compact(rows, packing, implementation=implementation)
        assert packed.shape == (BATCH, 2, 2, 64)
        np.testing.assert_array_equal(packed[1], [rows[1, 2], np.zeros((2, 64))])
        back = expand(2 * packed, packing, -rows, implementation=implementation)
        np.testing.assert_array_equal(back, np.where(keep[..., None, None], 2 * rows, -rows))


@settings(max_examples=20, deadline=None)
@given(keep=hnp.arrays(bool, (1, 70)), slots=st.sampled_from((1, 5, 37, 64, 70)))
@example(keep=np.arange(70)[None] >= 64, slots=5)
@example(keep=np.arange(70)[None] < 33, slots=70)
def test_the_staircase_meets_every_pair_of_tiles_that_shares_rows_and_every_tile_in_order(keep, slots):
    place = np.asarray(pack(jnp.asarray(keep), slots).place)
    place = np.pad(place, ((0, 0), (0, -70 % 16)), constant_values=-1)
    for packs in (True, False):
        stairs = jax.tree.map(lambda leaf: np.asarray(leaf)[0], stair(slots, packs)(place))
        pairs = list(zip(stairs.token, stairs.slot, strict=True))
        shared = sorted({(n // 16, m // 16) for n, m in enumerate(place[0]) if m >= 0})
        assert [pair for pair, live in zip(pairs, stairs.live, strict=True) if live] == shared
        written, read = (stairs.slot, stairs.token) if packs else (stairs.token, stairs.slot)
        tiles = -(-slots // 16) if packs else 5
        assert sorted(written[stairs.first == 1]) == list(range(tiles)) == sorted(set(written))
        assert np.all(np.diff(written) >= 0) and np.all(np.diff(stairs.fetch) >= 0)
        np.testing.assert_array_equal(stairs.fetch[stairs.live == 1], read[stairs.live == 1])


@functools.cache
def stair(slots, packs):
    return jax.jit(lambda place: tpu.Staircase.create(place, slots, 16, packs=packs))


@functools.cache
def tiled(dtype):
    """The kernels on several tiles whose last ones stand out over the arrays."""
    slots = 37

    def run(keep, rows):
        packing = pack(keep, slots)
        packed = tpu.compact(rows, packing.source, packing.place, tile=16, interpret=True)
        return packed, tpu.expand(packed, packing.source, packing.place, tile=16, interpret=True), packing

    return jax.jit(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=6, deadline=None)
@given(keep=hnp.arrays(bool, (BATCH, 70)))
@example(keep=np.arange(70) < np.array([[37], [0]]))
@example(keep=np.arange(70) >= np.array([[69], [5]]))
def test_the_kernel_crosses_tiles(dtype, keep):
    rows = values(70, dtype)
    packed, spread, packing = tiled(dtype)(keep, rows)
    np.testing.assert_array_equal(packed, compact(rows, packing, implementation="xla"))
    np.testing.assert_array_equal(spread, expand(packed, packing, implementation="xla"))


@with_examples
def test_the_reference_is_the_same_matrix_both_ways(keep):
    packed, _, spread, _ = runner("xla")(keep)
    place = pack(jnp.asarray(keep), CAPACITY).place
    np.testing.assert_array_equal(reference.compact(values(), place, CAPACITY), packed)
    np.testing.assert_array_equal(reference.expand(values(CAPACITY), place), spread)


def test_rows_that_are_dropped_may_be_integers_and_are_never_touched():
    packing = pack(jnp.array([[True, False, True]]), 3)
    got = compact(jnp.array([[[7], [8], [2**24 + 1]]]), packing)
    np.testing.assert_array_equal(got[0, :, 0], [7, 2**24 + 1, 0])


def test_it_stays_on_the_batch_of_each_device():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        for batch, own in ((8, 2), (6, 6)):
            shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 5), (batch, 9))]
            rows = jax.ShapeDtypeStruct((batch, 9, 128), jnp.float32)
            jaxpr = jax.make_jaxpr(lambda x, s, p: compact(x, Packing(s, p), implementation="tpu"))(rows, *shapes)
            assert f"f32[{own},5,128]" in str(jaxpr) and "shard_map" in str(jaxpr)


@pytest.mark.parametrize("implementation", ["tpu", "interpret"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 100), jnp.float32, r"at least 128 numbers; got \(2, 4, 100\), the nearest is \(2, 4, 128\)"),
        ((2, 4, 4100), jnp.bfloat16, r"multiple of 128; got \(2, 4, 4100\), the nearest is \(2, 4, 4224\)"),
        ((2, 4, 128), jnp.int32, r"moves float32 and bfloat16; got int32 \(2, 4, 128\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_nearest_shape(implementation, shape, dtype, message):
    packing = pack(jnp.ones(shape[:2], bool), shape[1])
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda x: compact(x, packing, implementation=implementation), jnp.zeros(shape, dtype))


def test_tables_that_are_too_long_for_scalar_memory_are_refused():
    def run(x, keep):
        return compact(x, pack(keep, 4096), implementation="tpu")

    shapes = [jax.ShapeDtypeStruct((4096, 4096, *more), dtype) for more, dtype in (((1024,), jnp.bfloat16), ((), bool))]
    with pytest.raises(
        NotImplementedError, match=r"tables of 4096 rows x 63 steps .* the nearest batch that fits is 520"
    ):
        jax.eval_shape(run, *shapes)


@pytest.mark.parametrize(("width", "columns"), [(128, 128), (1472, 1472), (5120, 2560), (8192, 4096), (4100, 0)])
def test_tiles_fit_and_divide_the_width(width, columns):
    assert tpu.block_columns(width) == columns
    for itemsize in (2, 4):
        assert tpu.block_rows(width, itemsize) in (128, 256)


def test_on_chip_sizes_count_whole_tiles():
    assert vmem.size((1, 1), jnp.float32) == 8 * 128 * 4
    assert vmem.size((3, 17, 130), jnp.bfloat16) == 3 * 32 * 256 * 2
    vmem.check("op", vmem.BUDGET, "")
    with pytest.raises(NotImplementedError, match=r"op would need 13\.0 MiB of on-chip memory, more than 13; halve it"):
        vmem.check("op", vmem.BUDGET + 1, "halve it")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(jnp.ones((2, 3)), 2), r"bool array \[B, N\]; got float32 \(2, 3\)"),
        (lambda: pack(jnp.ones((2, 3), bool), 4), r"must lie in 1\.\.3 .*got 4"),
        (lambda: compact(jnp.ones((2, 4, 1)), pack(jnp.ones((2, 3), bool), 2)), r"values must be .*\(2, 3\) in front"),
        (lambda: expand(jnp.ones((2, 3, 1)), pack(jnp.ones((2, 3), bool), 2)), r"values must be .*\(2, 2\) in front"),
        (
            lambda: expand(jnp.ones((2, 2, 1)), pack(jnp.ones((2, 3), bool), 2), jnp.ones((2, 3))),
            r"fill must be .*\(2, 3, 1\); got \(2, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _forward_and_gradient(spec):
    def run(x, keep):
        packing = pack(keep, spec.slots)
        out, pull = jax.vjp(lambda x: compact(x, packing, implementation="tpu"), x)
        return pull(out)[0]

    shape = (spec.batch, spec.tokens)
    return run, jax.ShapeDtypeStruct((*shape, spec.width), spec.dtype), jax.ShapeDtypeStruct(shape, bool)


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", specs.NAMED)
def test_it_compiles_for_every_tpu_with_its_gradient(chip, name):
    assert tpu_compiler.kernels(chip, *_forward_and_gradient(specs.NAMED[name])) == 2


def test_it_compiles_for_four_chips_without_a_collective():
    assert tpu_compiler.collectives("4 x v5e", *_forward_and_gradient(specs.NAMED["t5_small"])) == []
