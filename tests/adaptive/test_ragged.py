# SPDX-License-Identifier: Apache-2.0
"""Compaction, bucket ladder and ragged prefix: against loops and masks, and what the compiler makes of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive import ragged
from adaptive.tokens import TokenSet

LENGTH, WIDTH = 8, 3
KEEPS = hnp.arrays(bool, (2, LENGTH))


@functools.cache
def compactor(capacity, overflow):
    return jax.jit(lambda keep, scores: ragged.compact(keep, capacity, overflow=overflow, scores=scores))


def loop_compact(keep, capacity, scores=None):
    """Slots and assignment of one row, by lists; `scores` decides in a row that keeps too many."""
    chosen = [i for i in range(len(keep)) if keep[i]]
    if scores is not None:
        chosen = sorted(sorted(chosen, key=lambda i: -scores[i])[:capacity])
    slots = (chosen + [-1] * capacity)[:capacity]
    return slots, [chosen.index(i) if i in chosen else -1 for i in range(len(keep))]


# --- Compaction ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(keep=KEEPS)
def test_compaction_left_packs_in_order(keep):
    out = compactor(LENGTH, "forbid")(keep, None)
    for row in range(2):
        slots, assign = loop_compact(keep[row], LENGTH)
        np.testing.assert_array_equal(out.slots[row], slots)
        np.testing.assert_array_equal(out.assign[row], assign)
    np.testing.assert_array_equal(out.weight, keep)
    assert not out.merges


@settings(max_examples=30, deadline=None)
@given(keep=KEEPS, seed=st.integers(0, 1000), coarse=st.booleans())
def test_overflow_best_keeps_the_highest_scores_and_ties_by_index(keep, seed, coarse):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (2, LENGTH)) if coarse else rng.normal(size=(2, LENGTH))
    scores = scores.astype(np.float32)
    out = compactor(3, "best")(keep, scores)
    for row in range(2):
        slots, assign = loop_compact(keep[row], 3, scores[row])
        np.testing.assert_array_equal(out.slots[row], slots)
        np.testing.assert_array_equal(out.assign[row], assign)


def test_compaction_carries_features_positions_and_mass_and_leaves_padding_behind():
    tokens = TokenSet.create(jax.random.normal(jax.random.key(0), (1, 5, 2)), mass=jnp.array([[1.0, 2, 3, 4, 5]]))
    keep = jnp.array([[False, True, False, True, True]])
    got = ragged.compact(keep, 4, overflow="checked").apply(tokens)
    np.testing.assert_array_equal(got.features[0, :3], tokens.features[0, jnp.array([1, 3, 4])])
    np.testing.assert_array_equal(got.features[0, 3], [0, 0])
    np.testing.assert_array_equal(got.mass, [[2, 4, 5, 0]])
    np.testing.assert_array_equal(got.coords[0, :3, 0], [1, 3, 4])
    np.testing.assert_array_equal(got.origin, [[-1, 0, -1, 1, 2]])


@settings(max_examples=15, deadline=None)
@given(keep=KEEPS)
def test_compaction_is_idempotent(keep):
    tokens = TokenSet.create(jnp.arange(2.0 * LENGTH * WIDTH).reshape(2, LENGTH, WIDTH))
    once = compactor(LENGTH, "forbid")(keep, None).apply(tokens)
    twice = compactor(LENGTH, "forbid")(once.valid, None).apply(once)
    for first, second in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("capacity", "arguments", "message"),
    [
        (0, {"overflow": "checked"}, r"the capacity must lie in 1\.\.8 .*got 0"),
        (9, {"overflow": "checked"}, r"the capacity must lie in 1\.\.8 .*got 9"),
        (7, {"overflow": "forbid"}, r"overflow='forbid' needs a capacity of 8.*got 7\. Choose 'best'"),
        (7, {"overflow": "best"}, r"overflow='best' needs scores"),
        (7, {"overflow": "truncate"}, r"unknown overflow policy 'truncate'; one of 'forbid', 'best', 'checked'"),
    ],
)
def test_compaction_refuses_what_it_cannot_do(capacity, arguments, message):
    with pytest.raises(ValueError, match=message):
        ragged.compact(jnp.ones((1, LENGTH), bool), capacity, **arguments)


def test_an_overflow_policy_must_be_named():
    with pytest.raises(TypeError, match="overflow"):
        ragged.compact(jnp.ones((1, LENGTH), bool), 4)


@settings(max_examples=20, deadline=None)
@given(keep=KEEPS, capacity=st.integers(1, LENGTH))
def test_overflowing_counts_what_does_not_fit(keep, capacity):
    want = [max(int(row.sum()) - capacity, 0) for row in keep]
    np.testing.assert_array_equal(ragged.overflowing(jnp.asarray(keep), capacity), want)


def test_rank_breaks_ties_by_index():
    np.testing.assert_array_equal(ragged.rank(jnp.array([[1.0, 3, 3, -jnp.inf, 2]])), [[3, 0, 1, 4, 2]])


# --- The ladder ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 9), st.sampled_from([1, 8, 128]))
def test_rungs_rise_in_multiples_and_end_at_the_length(length, steps, multiple):
    rungs = ragged.make_rungs(length, steps=steps, multiple=multiple)
    assert list(rungs) == sorted(set(rungs)) and 1 <= len(rungs) <= steps
    assert rungs[-1] == length and all(rung % multiple == 0 for rung in rungs[:-1])
    # No step is longer than an equal one, plus the rounding.
    steps_up = np.diff((0, *rungs))
    assert steps_up.max() <= length / steps + multiple
    assert ragged.check_rungs(rungs, length) == rungs


def test_rungs_of_the_published_length():
    assert ragged.make_rungs(1024) == (256, 512, 768, 1024)
    assert ragged.make_rungs(1024, steps=8) == tuple(range(128, 1025, 128))
    assert ragged.make_rungs(100) == (100,)
    with pytest.raises(ValueError, match=r"must be positive; got 64, 0, 128"):
        ragged.make_rungs(64, steps=0)


def test_a_ladder_is_cut_at_the_length():
    assert ragged.check_rungs((64, 128, 256), 100) == (64, 100)
    assert ragged.check_rungs((64, 128, 256), 64) == (64,)
    assert ragged.check_rungs([64, 128], 128) == (64, 128)


@pytest.mark.parametrize("rungs", [(), (0, 8), (8, 8), (8, 4)])
def test_rungs_that_do_not_rise_are_refused(rungs):
    with pytest.raises(ValueError, match="rise and are positive"):
        ragged.check_rungs(rungs, 4)


def test_a_sequence_longer_than_the_ladder_is_refused_with_both_numbers():
    keep = jnp.ones((1, 9), bool)
    with pytest.raises(
        ValueError, match=r"the sequence has 9 tokens but the ladder ends at 8; add a rung of at least 9"
    ):
        jax.eval_shape(lambda keep: ragged.on_ladder(lambda reduction: reduction.assign, keep, (4, 8)), keep)


def mix(reduction, features, weight):
    """Work in which tokens see each other: each survivor gets a softmax average of all survivors."""
    tokens = reduction.apply(TokenSet.create(features))
    logits = jnp.einsum("bmd,de,bne->bmn", tokens.features, weight, tokens.features) + tokens.log_mass[:, None]
    # A row without any survivor has no key.
    weights = jax.nn.softmax(jnp.where(tokens.count[:, None, None] > 0, logits, 0), axis=-1)
    return reduction.restore(jnp.einsum("bmn,bnd->bmd", weights, tokens.features))


@functools.cache
def ladder(rungs):
    return jax.jit(lambda keep, features, weight: ragged.on_ladder(mix, keep, rungs, features, weight))


@functools.cache
def inputs(batch=2):
    rng = np.random.default_rng(0)
    shape = (batch, LENGTH, WIDTH)
    return jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)


@settings(max_examples=40, deadline=None)
@given(keep=KEEPS)
@example(keep=np.zeros((2, LENGTH), bool))
@example(keep=np.ones((2, LENGTH), bool))
@example(keep=np.arange(LENGTH) < np.array([[4], [1]]))
@example(keep=np.arange(LENGTH) < np.array([[4], [5]]))
def test_the_ladder_never_changes_a_result(keep):
    dense = ladder((LENGTH,))(keep, *inputs())
    assert np.all(np.isfinite(dense))
    for rungs in ((2, 4, 6, 8), (3, 16)):
        np.testing.assert_allclose(ladder(rungs)(keep, *inputs()), dense, atol=1e-6)


@functools.cache
def ladder_gradient(rungs):
    def loss(features, weight, keep):
        return jnp.sum(jnp.sin(ragged.on_ladder(mix, keep, rungs, features, weight)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@settings(max_examples=10, deadline=None)
@given(keep=KEEPS)
def test_the_ladder_never_changes_a_gradient(keep):
    want = ladder_gradient((LENGTH,))(*inputs(), keep)
    got = ladder_gradient((2, 4, 8))(*inputs(), keep)
    for first, second in zip(got, want, strict=True):
        assert np.all(np.isfinite(second))
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.all(np.asarray(got[0])[~keep] == 0)


def test_a_ladder_is_one_conditional_without_a_transfer_to_the_host():
    text = ladder((2, 4, 6, 8)).lower(np.ones((2, LENGTH), bool), *inputs()).compile().as_text()
    branches = re.findall(r" conditional\(.*branch_computations=\{([^}]*)\}", text)
    assert len(branches) == 1 and len(branches[0].split(",")) == 4
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback|host_compute|MoveToHost", text)


def test_new_counts_do_not_compile_again():
    compiled = ladder((2, 4, 6, 8))
    compiled(np.zeros((2, LENGTH), bool), *inputs())
    before = compiled._cache_size()
    for count in range(LENGTH + 1):
        compiled(np.arange(LENGTH) < np.array([[count], [1]]), *inputs())
    assert compiled._cache_size() == before == 1


def test_only_the_smallest_rung_that_holds_the_longest_row_runs():
    ran = []

    def work(reduction, features):
        jax.debug.callback(lambda _, slots=reduction.num_slots: ran.append(slots), reduction.assign)
        return reduction.restore(reduction.reduce(features))

    run = jax.jit(lambda keep, features: ragged.on_ladder(work, keep, (2, 4, 6, 8), features))
    for counts, rung in [((0, 0), 2), ((2, 1), 2), ((2, 3), 4), ((5, 0), 6), ((6, 6), 6), ((1, 7), 8), ((8, 8), 8)]:
        ran.clear()
        jax.block_until_ready(run(np.arange(LENGTH) < np.array(counts)[:, None], inputs()[0]))
        jax.effects_barrier()
        assert ran == [rung]


RUNGS = (4, 7, 16)
choose = jax.jit(lambda counts: (ragged.choose_rung(counts, RUNGS), ragged.padding_waste(counts, RUNGS)))


@settings(deadline=None)
@given(hnp.arrays(np.int32, 3, elements=st.integers(0, RUNGS[-1])))
@example(np.array([4, 0, 0], np.int32))
@example(np.array([0, 16, 8], np.int32))
def test_the_smallest_rung_that_fits_is_chosen_and_its_empty_slots_are_the_waste(counts):
    index, waste = choose(counts)
    rung = next(rung for rung in RUNGS if rung >= max(counts))
    assert RUNGS[int(index)] == rung
    np.testing.assert_allclose(waste, 1 - counts.sum() / (3 * rung), atol=1e-6)


# --- The ragged prefix --------------------------------------------------------------------------------------------


staircase = jax.jit(lambda need: ragged.Staircase.create(need, 5))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, 9, elements=st.integers(0, 5)))
def test_a_staircase_sorts_rows_by_need_and_counts_the_rows_of_each_unit(need):
    stairs = staircase(need)
    order = sorted(range(len(need)), key=lambda row: -need[row])
    np.testing.assert_array_equal(stairs.order, order)
    np.testing.assert_array_equal(np.asarray(stairs.inverse)[order], range(len(need)))
    np.testing.assert_array_equal(stairs.counts, [sum(n >= unit for n in need) for unit in range(1, 6)])


ROWS, INNER, OUT = 11, 3, 2


def unit(params, rows):
    return jnp.tanh(rows @ params["kernel"] + params["bias"])


@functools.cache
def prefix_inputs(rows=ROWS):
    rng = np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(INNER, OUT)), "bias": rng.normal(size=OUT)}
    return (
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params),
        jnp.asarray(rng.normal(size=(rows, INNER)), jnp.float32),
        jnp.asarray(rng.normal(size=(rows, OUT)), jnp.float32),
    )


def masked(unit, params, rows, count, tile):
    del tile
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < count, unit(params, rows), 0)


@functools.cache
def prefix(tile, dense=False):
    """Value and gradients of a ragged prefix, or of its masked dense form."""
    run = masked if dense else ragged.ragged_prefix

    def loss(params, rows, moved, count):
        out = run(unit, params, rows, count, tile=tile)
        return jnp.sum(out * moved), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("tile", [1, 4, 64])
@settings(max_examples=12, deadline=None)
@given(count=st.integers(0, ROWS))
@example(count=0)
@example(count=ROWS)
def test_a_ragged_prefix_equals_the_masked_dense_form_with_its_gradients(tile, count):
    got, want = prefix(tile)(*prefix_inputs(), count), prefix(0, dense=True)(*prefix_inputs(), count)
    for first, second in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_array_equal(got[0][1][count:], 0)


def test_rows_below_the_count_never_reach_the_unit_as_gradient():
    params, rows, moved = prefix_inputs()
    spoiled = rows.at[6:].set(jnp.nan)
    (_, out), (param_grads, row_grads) = prefix(3)(params, spoiled, moved, 6)
    assert np.all(np.isfinite(out)) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(param_grads))
    np.testing.assert_array_equal(row_grads[6:], 0)


def test_work_grows_with_the_count_in_tiles_and_nothing_compiles_again():
    ran = []

    def watched(params, rows):
        jax.debug.callback(lambda _: ran.append(rows.shape[0]), rows)
        return unit(params, rows)

    params, rows, _ = prefix_inputs()
    run = jax.jit(lambda count: ragged.ragged_prefix(watched, params, rows, count, tile=4))
    for count, tiles in [(0, 0), (1, 1), (4, 1), (5, 2), (11, 3)]:
        ran.clear()
        jax.block_until_ready(run(count))
        jax.effects_barrier()
        assert ran == [4] * tiles
    assert run._cache_size() == 1


def test_bfloat16_parameters_get_gradients_that_were_summed_in_float32():
    # 1024 terms of 1: a bfloat16 sum would stop at 256.
    params, rows = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)

    def loss(params):
        out = ragged.ragged_prefix(lambda p, x: x @ p, params, rows, 1024, tile=1)
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(params)
    assert gradient.dtype == jnp.bfloat16 and float(gradient[0, 0]) == 1024


@pytest.mark.parametrize(
    ("rows", "tile", "message"),
    [((4, 3), 0, "at least one row; got 0"), ((4, 3, 2), 2, r"rows must be \[R, D\]; got shape \(4, 3, 2\)")],
)
def test_a_ragged_prefix_refuses_wrong_shapes(rows, tile, message):
    with pytest.raises(ValueError, match=message):
        ragged.ragged_prefix(unit, prefix_inputs()[0], jnp.zeros(rows), 1, tile=tile)


@pytest.mark.parametrize("count", [-1, ROWS + 1])
def test_a_count_that_is_known_and_outside_the_rows_is_refused(count):
    with pytest.raises(ValueError, match=rf"count must lie in 0\.\.{ROWS} .*got {count}"):
        ragged.ragged_prefix(unit, *prefix_inputs()[:2], count)


def test_a_prefix_of_no_rows_is_empty():
    assert ragged.ragged_prefix(unit, prefix_inputs()[0], jnp.zeros((0, INNER)), 0).shape == (0, OUT)


def test_a_ladder_takes_another_reduction_and_what_it_reads():
    keep = jnp.array([[True, False, True, False, False, True], [True, False, False, False, False, False]])

    def backwards(source, rung):
        return ragged.compact(source[:, ::-1], rung, overflow="checked")

    def run(keep, source):
        return ragged.on_ladder(
            lambda reduction, offset: jnp.sum(reduction.slots + 1, axis=1) + offset,
            keep, (2, 3, 6), jnp.int32(10), reduce=backwards, source=source,
        )  # fmt: skip

    # Slots 0, 3 and 5 of the reversed row, counted from 1, and 10.
    np.testing.assert_array_equal(jax.jit(run)(keep, keep), [21, 16])


def test_a_staircase_mlp_takes_rows_in_any_order():
    rng = np.random.default_rng(2)
    shapes = {"rows": (ROWS, INNER), "up": (INNER, 8), "bias": (8,), "down": (8, OUT)}
    given_arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    need = rng.integers(0, 5, ROWS)

    def staircase(rows, up, bias, down):
        stairs = ragged.Staircase.create(jnp.asarray(need), 4)
        return ragged.ragged_prefix_mlp(rows, stairs, up, bias, down, activation="relu")

    def row_by_row(rows, up, bias, down):
        hidden = jnp.maximum(rows @ up + bias, 0)
        return jnp.stack([hidden[row, : 2 * n] @ down[: 2 * n] for row, n in enumerate(need)])

    got, want = (
        jax.jit(jax.value_and_grad(lambda own, f=f: jnp.sum(f(**own) ** 2)))(given_arrays)
        for f in (staircase, row_by_row)
    )
    for first, second in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_a_compaction_with_other_weights_obeys_them():
    reduction = ragged.compact(jnp.array([[True, False, True]]), 2, overflow="checked")
    scaled = reduction.replace(weight=reduction.weight * jnp.array([[0.5, 1, 3]]), merges=True)
    rows = jnp.array([[[1.0], [2], [4]]])
    np.testing.assert_array_equal(scaled.reduce(rows)[0, :, 0], [0.5, 12])
    np.testing.assert_array_equal(scaled.restore(scaled.reduce(rows))[0, :, 0], [0.5, 0, 12])
