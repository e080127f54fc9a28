# SPDX-License-Identifier: Apache-2.0
"""Pruning and its baselines against loops over lists: who survives, in which order, and what is fused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import budgets, registry
from adaptive.reduction import combine, select
from adaptive.tokens import Signals, TokenSet

LENGTH, WIDTH = 9, 3


@functools.cache
def method(name, budget, cls_token=False):
    """The method under jit: `(tokens, **signals) -> (reduction, reduced tokens)`."""

    def run(tokens, **signals):
        out = registry.get(name)(tokens, Signals(**signals, cls_token=cls_token), budget)
        return out, out.apply(tokens)

    return jax.jit(run)


def draw(seed, cls_token=False):
    """Tokens of two rows, the second with padding at random places (never at a class token), and scores."""
    rng = np.random.default_rng(seed)
    mask = rng.random((2, LENGTH)) < 0.7
    mask[0] = True
    mask[:, 0] |= cls_token or not mask[1].any()
    tokens = TokenSet.create(
        jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)), jnp.float32),
        mask=jnp.asarray(mask),
        mass=jnp.asarray(rng.integers(1, 4, (2, LENGTH)), jnp.float32),
    )
    return tokens, rng.random((2, LENGTH)).astype(np.float32)


def loop_survivors(scores, valid, slots, cls_token, value=-np.inf):
    """Indices that survive in one row, in order."""
    real = [i for i in range(len(scores)) if valid[i]]
    best = sorted(real, key=lambda i: (-(np.inf if cls_token and i == 0 else scores[i]), i))
    stay = [i for place, i in enumerate(best[:slots]) if place == 0 or scores[i] > value or (cls_token and i == 0)]
    return sorted(stay)


def check_pruned(out, reduced, tokens, row, stay):
    """A row of a pruning holds the tokens `stay`, unchanged and in order, and padding behind them."""
    slots = out.num_slots
    np.testing.assert_array_equal(out.slots[row], (stay + [-1] * slots)[:slots])
    np.testing.assert_array_equal(out.assign[row], [stay.index(i) if i in stay else -1 for i in range(LENGTH)])
    np.testing.assert_array_equal(reduced.features[row, : len(stay)], np.asarray(tokens.features)[row, stay])
    np.testing.assert_array_equal(reduced.mass[row, : len(stay)], np.asarray(tokens.mass)[row, stay])
    np.testing.assert_array_equal(reduced.coords[row, : len(stay), 0], stay)
    np.testing.assert_array_equal(reduced.mass[row, len(stay) :], 0)


@pytest.mark.parametrize("budget", [1, 4, budgets.Threshold(0.6, 5)])
@pytest.mark.parametrize("cls_token", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_class_attention_keeps_what_the_class_token_looks_at(budget, cls_token, seed):
    tokens, attention = draw(seed, cls_token)
    out, reduced = method("class_attention", budget, cls_token)(tokens, cls_attention=attention)
    value = budget.value if isinstance(budget, budgets.Threshold) else -np.inf
    for row in range(2):
        stay = loop_survivors(attention[row], tokens.valid[row], budgets.capacity(budget), cls_token, value)
        check_pruned(out, reduced, tokens, row, stay)


@pytest.mark.parametrize("budget", [2, 5, budgets.Threshold(0.6, 5)])
@pytest.mark.parametrize("cls_token", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_evit_fuses_the_others_weighted_by_attention(budget, cls_token, seed):
    tokens, attention = draw(seed, cls_token)
    out, reduced = method("evit", budget, cls_token)(tokens, cls_attention=attention)
    value = budget.value if isinstance(budget, budgets.Threshold) else -np.inf
    slots = budgets.capacity(budget)
    for row in range(2):
        stay = loop_survivors(attention[row], tokens.valid[row], slots - 1, cls_token, value)
        others = [i for i in range(LENGTH) if tokens.valid[row, i] and i not in stay]
        np.testing.assert_array_equal(out.slots[row], [*stay, *[-1] * (slots - len(stay))])
        np.testing.assert_allclose(
            reduced.features[row, : len(stay)], np.asarray(tokens.features)[row, stay], atol=1e-6
        )
        np.testing.assert_array_equal(reduced.mass[row, len(stay) : slots - 1], 0)
        np.testing.assert_allclose(reduced.mass[row, -1], sum(float(tokens.mass[row, i]) for i in others))
        if others:
            weights = attention[row, others] / attention[row, others].sum()
            fused = (weights[:, None] * np.asarray(tokens.features)[row, others]).sum(0)
            np.testing.assert_allclose(reduced.features[row, -1], fused, atol=1e-5)
        else:
            np.testing.assert_array_equal(reduced.features[row, -1], 0)


def test_evit_fuses_tokens_that_get_no_attention_at_all_into_their_mean():
    tokens, _ = draw(0)
    attention = np.zeros((2, LENGTH), np.float32)
    attention[:, :2] = 0.5
    _, reduced = method("evit", 3)(tokens, cls_attention=attention)
    np.testing.assert_allclose(reduced.features[0, -1], np.asarray(tokens.features)[0, 2:].mean(0), atol=1e-5)


def test_evit_needs_room_for_a_kept_token_beside_the_fused_one():
    tokens, attention = draw(0)
    with pytest.raises(ValueError, match=r"evit needs a budget of at least 2 .*got 1"):
        registry.get("evit")(tokens, Signals(cls_attention=attention), 1)


@pytest.mark.parametrize("budget", [1, 4, 8])
@pytest.mark.parametrize("cls_token", [False, True])
def test_truncate_keeps_the_first_real_tokens(budget, cls_token):
    tokens, _ = draw(3, cls_token)
    out, reduced = method("truncate", budget, cls_token)(tokens)
    for row in range(2):
        real = [i for i in range(LENGTH) if tokens.valid[row, i]]
        check_pruned(out, reduced, tokens, row, real[:budget])


def test_truncate_under_a_threshold_keeps_the_share_of_the_length_that_is_asked_for():
    tokens, _ = draw(3)
    # Shares of the length left are 1, 8/9, 7/9, ...; five of them exceed 0.5.
    _, reduced = method("truncate", budgets.Threshold(0.5, 8))(tokens)
    np.testing.assert_array_equal(reduced.coords[0, :5, 0], [0, 1, 2, 3, 4])
    assert reduced.count[0] == 5


@pytest.mark.parametrize("budget", range(1, LENGTH))
@pytest.mark.parametrize("cls_token", [False, True])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_stride_spaces_the_survivors_evenly_over_the_real_tokens(budget, cls_token, seed):
    tokens, _ = draw(seed, cls_token)
    out, reduced = method("stride", budget, cls_token)(tokens)
    for row in range(2):
        real = [i for i in range(LENGTH) if tokens.valid[row, i]]
        head, rest, free = real[:cls_token], real[cls_token:], budget - cls_token
        if len(rest) > free:
            # The first token of each of `free` equal steps over n tokens: ceil(k n / free).
            rest = [rest[-(-k * len(rest) // free)] for k in range(free)]
        check_pruned(out, reduced, tokens, row, head + rest)


def test_random_survivors_are_uniform_in_order_and_drawn_for_each_row():
    rows, keep = 3000, 3
    tokens = TokenSet.create(jnp.zeros((rows, LENGTH, 1)))
    out, reduced = method("random", keep)(tokens, rng=jax.random.key(0))
    taken = (np.asarray(out.assign) >= 0).sum(0)
    chance = keep / LENGTH
    assert np.all(np.abs(taken - rows * chance) < 4 * np.sqrt(rows * chance * (1 - chance)))
    assert np.all(np.diff(np.asarray(reduced.coords)[..., 0], axis=1) > 0)
    # All 84 subsets turn up.
    assert len(np.unique(np.asarray(out.slots), axis=0)) == 84


def test_random_depends_on_the_key_alone_and_keeps_the_class_token():
    tokens, _ = draw(1, cls_token=True)
    run = method("random", 3, True)
    first, again, other = (run(tokens, rng=jax.random.key(seed))[0].slots for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first[:, 0], 0)


def test_a_random_threshold_keeps_the_share_above_it():
    tokens = TokenSet.create(jnp.zeros((400, LENGTH, 1)))
    _, reduced = method("random", budgets.Threshold(0.25, LENGTH))(tokens, rng=jax.random.key(2))
    kept, total = float(reduced.count.sum()), 400 * LENGTH
    assert abs(kept - 0.75 * total) < 4 * np.sqrt(total * 0.75 * 0.25)


def test_identity_keeps_everything_whatever_the_budget():
    tokens, _ = draw(5)
    _, reduced = method("identity", 2)(tokens)
    for before, after in zip(jax.tree.leaves(tokens), jax.tree.leaves(reduced), strict=True):
        np.testing.assert_array_equal(before, after)


# --- Shared parts -------------------------------------------------------------------------------------------------


def test_guard_puts_the_class_token_above_and_padding_below_everything():
    tokens = TokenSet.create(jnp.zeros((1, 4, 1)), mask=jnp.array([[True, True, False, True]]))
    scores = jnp.array([[-5.0, 1.0, 9.0, 2.0]], jnp.bfloat16)
    guarded = select.guard(scores, tokens, Signals(cls_token=True))
    assert guarded.dtype == jnp.float32
    np.testing.assert_array_equal(guarded, [[np.inf, 1, -np.inf, 2]])
    np.testing.assert_array_equal(select.guard(scores, tokens, Signals())[0, 0], -5)


def test_a_row_of_padding_alone_keeps_nothing():
    tokens = TokenSet.create(jnp.ones((1, 4, 1)), mask=jnp.zeros((1, 4), bool))
    for budget in (2, budgets.Threshold(0.5, 2)):
        kept = select.prune(jnp.ones((1, 4)), tokens, Signals(), budget).apply(tokens)
        np.testing.assert_array_equal(kept.mass, [[0, 0]])
        np.testing.assert_array_equal(kept.features, 0)


def test_weighted_mean_gives_each_slot_coefficients_that_sum_to_one():
    assign = jnp.array([[0, 1, 0, -1, 2]])
    out = combine.weighted_mean(jnp.array([[0, 1, -1]]), assign, jnp.array([[1.0, 5.0, 3.0, 7.0, 0.0]]))
    np.testing.assert_allclose(out.weight, [[0.25, 1, 0.75, 0, 0]])
    np.testing.assert_allclose(out.matrix().sum(-1), [[1, 1, 0]])
