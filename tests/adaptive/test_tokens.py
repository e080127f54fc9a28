# SPDX-License-Identifier: Apache-2.0
"""Token sets and reductions against dense NumPy matrices, for random reductions with dropped, fused and padding tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.tokens import DenseReduction, Reduction, TokenSet

BATCH, LENGTH, WIDTH = 2, 7, 3

apply = jax.jit(lambda reduction, tokens: reduction.apply(tokens))
restore = jax.jit(lambda reduction, features, fill=None: reduction.restore(features, fill))
matrix = jax.jit(lambda reduction: reduction.matrix())
then = jax.jit(lambda first, second: first.then(second))


def draw_tokens(seed, length=LENGTH, batch=BATCH, dtype=jnp.float32):
    """Tokens with random mass; every row but the first has some padding at random places."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, length)) < 0.8
    mask[0] = True
    return TokenSet.create(
        jnp.asarray(rng.normal(size=(batch, length, WIDTH)), dtype),
        mask=jnp.asarray(mask),
        mass=jnp.asarray(rng.integers(1, 5, (batch, length)), jnp.float32),
        coords=jnp.asarray(rng.normal(size=(batch, length, 2)), jnp.float32),
    )


def draw_merge(seed, length=LENGTH, slots=4, batch=BATCH):
    """A merging reduction: random slot or -1 for each token, some slots headed by one of their tokens, others by none."""
    rng = np.random.default_rng(seed)
    assign = rng.integers(-1, slots, (batch, length))
    weight = rng.random((batch, length)).astype(np.float32)
    heads = np.full((batch, slots), -1)
    for row in range(batch):
        for slot in range(slots):
            members = np.flatnonzero(assign[row] == slot)
            if len(members) and rng.random() < 0.7:
                heads[row, slot] = rng.choice(members)
    return Reduction(jnp.asarray(heads, jnp.int32), jnp.asarray(assign, jnp.int32), jnp.asarray(weight))


def draw_prune(seed, length=LENGTH, slots=4, batch=BATCH):
    """A pruning reduction: each slot is one token, or empty."""
    rng = np.random.default_rng(seed)
    heads, assign = np.full((batch, slots), -1), np.full((batch, length), -1)
    for row in range(batch):
        filled = rng.integers(1, slots + 1)
        heads[row, :filled] = rng.permutation(length)[:filled]
        assign[row, heads[row, :filled]] = np.arange(filled)
    weight = (assign >= 0).astype(np.float32)
    return Reduction(jnp.asarray(heads, jnp.int32), jnp.asarray(assign, jnp.int32), jnp.asarray(weight), merges=False)


def draw_dense(seed, length=LENGTH, slots=4, batch=BATCH):
    """A many-to-many reduction; some tokens are in no slot."""
    rng = np.random.default_rng(seed)
    values = rng.random((batch, slots, length)) * (rng.random((batch, slots, length)) < 0.5)
    values /= np.maximum(values.sum(-1, keepdims=True), 1e-9)
    return DenseReduction(jnp.asarray(values, jnp.float32))


DRAWS = {"merge": draw_merge, "prune": draw_prune, "dense": draw_dense}


def loop_matrix(reduction):
    """`[B, M, N]` of a `Reduction`, written entry by entry."""
    assign, weight = np.asarray(reduction.assign), np.asarray(reduction.weight)
    out = np.zeros((*reduction.slots.shape, assign.shape[1]))
    for row, column in np.ndindex(assign.shape):
        if assign[row, column] >= 0:
            out[row, assign[row, column], column] = weight[row, column]
    return out


def loop_mass(reduction, mass):
    """Mass of each slot, added token by token; a dense map divides a token's mass like its column."""
    out = np.zeros((mass.shape[0], reduction.num_slots))
    dense = np.asarray(reduction.matrix())
    for row, column in np.ndindex(mass.shape):
        if isinstance(reduction, Reduction):
            slot = int(reduction.assign[row, column])
            if slot >= 0:
                out[row, slot] += mass[row, column]
        elif dense[row, :, column].sum() > 0:
            out[row] += mass[row, column] * dense[row, :, column] / dense[row, :, column].sum()
    return out


# --- TokenSet -----------------------------------------------------------------------------------------------------


def test_create_fills_in_unit_mass_positions_and_origin():
    tokens = TokenSet.create(jnp.zeros((2, 3, 4)), mask=jnp.array([[True, True, True], [True, False, True]]))
    np.testing.assert_array_equal(tokens.mass, [[1, 1, 1], [1, 0, 1]])
    np.testing.assert_array_equal(tokens.coords[..., 0], [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(tokens.origin, [[0, 1, 2], [0, -1, 2]])
    np.testing.assert_array_equal(tokens.valid, [[True, True, True], [True, False, True]])
    np.testing.assert_array_equal(tokens.count, [3, 2])
    np.testing.assert_array_equal(tokens.log_mass, [[0, 0, 0], [0, -np.inf, 0]])


def test_a_mask_removes_given_mass_and_zero_mass_is_padding():
    mass = jnp.array([[2.0, 3.0, 0.0]])
    tokens = TokenSet.create(jnp.zeros((1, 3, 1)), mass=mass, mask=jnp.array([[True, False, True]]))
    np.testing.assert_array_equal(tokens.mass, [[2, 0, 0]])
    np.testing.assert_array_equal(tokens.origin, [[0, -1, -1]])


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ((3, 4), {}, r"must be \[B, N, D\]; got shape \(3, 4\).*features\[None\]"),
        ((2, 3, 4), {"mask": (2, 4)}, r"mask must be \[B, N\] = \(2, 3\); got shape \(2, 4\)"),
        ((2, 3, 4), {"mass": (3,)}, r"mass must be \[B, N\] = \(2, 3\); got shape \(3,\)"),
        ((2, 3, 4), {"coords": (2, 3)}, r"coords must be \[B, N, C\].*got shape \(2, 3\)"),
        ((2, 3, 4), {"coords": (1, 3, 2)}, r"coords must be \[B, N, C\].*got shape \(1, 3, 2\)"),
    ],
)
def test_create_refuses_shapes_that_do_not_fit(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenSet.create(jnp.zeros(features), **{name: jnp.ones(shape) for name, shape in arguments.items()})


def test_log_mass_has_a_finite_gradient_beside_padding():
    def loss(mass):
        tokens = TokenSet.create(jnp.zeros((1, 3, 1)), mass=mass)
        return jnp.sum(jnp.where(tokens.valid, tokens.log_mass, 0))

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([[2.0, 4.0, 0.0]])), [[0.5, 0.25, 0]])


# --- One reduction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_apply_equals_the_dense_matrix(kind, seed):
    tokens, reduction = draw_tokens(seed), DRAWS[kind](seed + 1)
    dense = np.asarray(matrix(reduction), np.float64)
    if kind != "dense":
        np.testing.assert_allclose(dense, loop_matrix(reduction), atol=0)
    got = apply(reduction, tokens)
    np.testing.assert_allclose(got.features, dense @ np.asarray(tokens.features), atol=1e-5)
    np.testing.assert_allclose(got.coords, dense @ np.asarray(tokens.coords), atol=1e-5)
    np.testing.assert_allclose(got.mass, loop_mass(reduction, np.asarray(tokens.mass)), rtol=1e-5)
    assert got.features.shape == (BATCH, 4, WIDTH)


@pytest.mark.parametrize("kind", DRAWS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_origin_points_to_the_slot_that_carries_each_original_token(kind, seed):
    tokens, reduction = draw_tokens(seed), DRAWS[kind](seed + 1)
    got, dense = np.asarray(apply(reduction, tokens).origin), np.asarray(matrix(reduction))
    for row, token in np.ndindex(got.shape):
        column = dense[row, :, token]
        if tokens.mass[row, token] == 0 or not column.any():
            assert got[row, token] == -1
        else:
            assert got[row, token] == column.argmax()


@pytest.mark.parametrize("kind", DRAWS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_restore_spreads_slots_back_and_fills_what_was_dropped(kind, seed):
    reduction = DRAWS[kind](seed)
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(BATCH, 4, WIDTH)).astype(np.float32)
    fill = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    dense = np.asarray(matrix(reduction), np.float64)
    share = dense / np.where(dense.sum(1, keepdims=True) > 0, dense.sum(1, keepdims=True), 1)
    want = np.swapaxes(share, 1, 2) @ features
    dropped = ~dense.any(1)
    np.testing.assert_allclose(restore(reduction, features), want, atol=1e-5)
    np.testing.assert_allclose(restore(reduction, features, fill), np.where(dropped[..., None], fill, want), atol=1e-5)


def test_a_pruning_reduction_copies_bit_for_bit_even_beside_padding_that_is_not_a_number():
    reduction, features = draw_prune(3), draw_tokens(3).features
    dropped = np.asarray(reduction.assign) < 0
    spoiled = jnp.where(dropped[..., None], jnp.nan, features)
    got = reduction.reduce(spoiled)
    for row, slot in np.ndindex(reduction.slots.shape):
        head = int(reduction.slots[row, slot])
        np.testing.assert_array_equal(got[row, slot], features[row, head] if head >= 0 else np.zeros(WIDTH))


def test_reduce_takes_keys_and_values_of_a_cache_with_any_trailing_axes():
    cache = np.random.default_rng(0).normal(size=(BATCH, LENGTH, 2, 5)).astype(np.float32)
    for draw in DRAWS.values():
        reduction = draw(4)
        want = np.einsum("bmn,bnhd->bmhd", np.asarray(reduction.matrix()), cache)
        np.testing.assert_allclose(reduction.reduce(jnp.asarray(cache)), want, atol=1e-5)


def test_the_identity_changes_nothing_and_is_neutral_in_composition():
    tokens, reduction = draw_tokens(0), draw_merge(1)
    same = Reduction.identity(BATCH, LENGTH).apply(tokens)
    for before, after in zip(jax.tree.leaves(tokens), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(Reduction.identity(BATCH, LENGTH).then(reduction).matrix(), reduction.matrix())
    np.testing.assert_array_equal(reduction.then(Reduction.identity(BATCH, 4)).matrix(), reduction.matrix())


@pytest.mark.parametrize("kind", DRAWS)
def test_bfloat16_features_stay_bfloat16_and_accumulate_in_float32(kind):
    tokens, reduction = draw_tokens(0, dtype=jnp.bfloat16), DRAWS[kind](1)
    got = apply(reduction, tokens)
    assert got.features.dtype == jnp.bfloat16
    assert got.mass.dtype == got.coords.dtype == jnp.float32
    want = np.asarray(matrix(reduction), np.float64) @ np.asarray(tokens.features, np.float64)
    # One rounding at the end: relative 2^-8.
    np.testing.assert_allclose(np.asarray(got.features, np.float64), want, rtol=2**-8, atol=1e-6)


def test_many_small_bfloat16_terms_do_not_get_lost():
    # Summed in bfloat16, 512 times 1/512 would stop growing at 0.5.
    tokens = TokenSet.create(jnp.ones((1, 512, 1), jnp.bfloat16))
    merge = Reduction(jnp.array([[-1]]), jnp.zeros((1, 512), jnp.int32), jnp.full((1, 512), 1 / 512))
    assert merge.apply(tokens).features[0, 0, 0] == 1
    assert DenseReduction(jnp.full((1, 1, 512), 1 / 512)).apply(tokens).features[0, 0, 0] == 1


def test_gradients_of_a_reduction_are_its_transposed_matrix():
    tokens, moved = draw_tokens(2), np.random.default_rng(2).normal(size=(BATCH, 4, WIDTH)).astype(np.float32)
    for draw in DRAWS.values():
        reduction = draw(3)
        gradient = jax.grad(lambda x, reduction=reduction: jnp.sum(reduction.reduce(x) * moved))(tokens.features)
        want = np.swapaxes(np.asarray(reduction.matrix()), 1, 2) @ moved
        np.testing.assert_allclose(gradient, want, atol=1e-5)


# --- Composition --------------------------------------------------------------------------------------------------

PAIRS = [(first, second) for first in DRAWS for second in DRAWS]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_composition_is_the_product_of_the_matrices(first, second, seed):
    one, two = DRAWS[first](seed, LENGTH, 5), DRAWS[second](seed + 1, 5, 3)
    both = then(one, two)
    want = np.asarray(matrix(two), np.float64) @ np.asarray(matrix(one), np.float64)
    np.testing.assert_allclose(matrix(both), want, atol=1e-6)
    assert isinstance(both, Reduction) == ("dense" not in (first, second))


@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_composition_does_what_its_parts_do_one_after_the_other(first, second, seed):
    tokens = draw_tokens(seed)
    one, two = DRAWS[first](seed + 1, LENGTH, 5), DRAWS[second](seed + 2, 5, 3)
    stepwise, at_once = apply(two, apply(one, tokens)), apply(then(one, two), tokens)
    np.testing.assert_allclose(at_once.features, stepwise.features, atol=1e-5)
    np.testing.assert_allclose(at_once.mass, stepwise.mass, atol=1e-4)
    features = np.random.default_rng(seed).normal(size=(BATCH, 3, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(
        restore(then(one, two), features), restore(one, restore(two, features)), atol=1e-5, err_msg="restore"
    )
    if "dense" not in (first, second):
        np.testing.assert_array_equal(at_once.origin, stepwise.origin)


def test_composition_keeps_track_of_heads():
    # Token 4 heads slot 1; slot 0 is fused. The second step swaps them and adds an empty slot.
    one = Reduction(jnp.array([[-1, 4]]), jnp.array([[0, 0, -1, -1, 1]]), jnp.ones((1, 5)))
    two = Reduction(jnp.array([[1, 0, -1]]), jnp.array([[1, 0]]), jnp.ones((1, 2)), merges=False)
    np.testing.assert_array_equal(one.then(two).slots, [[4, -1, -1]])
    np.testing.assert_array_equal(one.then(two).assign, [[1, 1, -1, -1, 0]])


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_composition_refuses_a_second_step_over_another_number_of_tokens(first, second):
    with pytest.raises(ValueError, match="second reduces 6 tokens, but this reduction leaves 5"):
        DRAWS[first](0, LENGTH, 5).then(DRAWS[second](0, 6, 3))


def test_slots_that_stand_at_their_head_keep_its_coordinates_and_add_up_mass():
    slots, assign = jnp.array([[0, 3, -1]]), jnp.array([[0, 0, 0, 1, 1, -1]])
    mean = Reduction(slots, assign, jnp.array([[1, 1, 1, 1.5, 1.5, 0]]) / 3, stands_at_head=True)
    first = Reduction(slots, assign, jnp.array([[1.0, 0, 0, 1, 0, 0]]), merges=False, stands_at_head=True)
    features = jnp.arange(12.0).reshape(1, 6, 2)
    tokens = TokenSet.create(features, mass=jnp.array([[1.0, 2, 3, 4, 5, 6]]))
    for reduction, want in ((mean, [[2, 3], [7, 8], [0, 0]]), (first, [[0, 1], [6, 7], [0, 0]])):
        reduced = jax.jit(lambda reduction: reduction.apply(tokens))(reduction)
        np.testing.assert_allclose(reduced.features[0], want, atol=1e-6)
        np.testing.assert_array_equal(reduced.mass[0], [6, 9, 0])
        np.testing.assert_array_equal(reduced.coords[0, :, 0], [0, 3, 0])
        np.testing.assert_allclose(reduction.matrix() @ features, reduced.features, atol=1e-6)


@pytest.mark.parametrize("merges", [False, True])
def test_a_composition_stands_at_heads_only_where_both_parts_do(merges):
    chunks = Reduction(
        jnp.array([[0, 2, 3]]), jnp.array([[0, 0, 1, 2]]), jnp.array([[0.5, 0.5, 1, 1]]), stands_at_head=True
    )
    second = Reduction(jnp.array([[0, 2]]), jnp.array([[0, 0 if merges else -1, 1]]), jnp.ones((1, 3)), merges=merges)
    both, tokens = chunks.then(second), TokenSet.create(jnp.ones((1, 4, 1)))
    assert both.stands_at_head != merges
    got, want = both.apply(tokens), second.apply(chunks.apply(tokens))
    np.testing.assert_array_equal(got.mass, want.mass)
    if not merges:
        np.testing.assert_array_equal(got.coords, want.coords)
