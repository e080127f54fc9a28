# SPDX-License-Identifier: Apache-2.0
"""Budgets and removal schedules: the published schedules, their token counts, and what is refused."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive import budgets


def loop_ramp(mean, inflection, layers):
    """ToMe's linear ramp, one layer at a time."""
    low = int(mean * (1.0 - inflection))
    high = 2 * mean - low
    return [int(low + (high - low) / (layers - 1) * layer) for layer in range(layers)]


def test_the_decreasing_schedule_of_the_paper():
    assert budgets.removal_schedule((8, -1.0), 12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)


def test_a_number_is_a_constant_schedule_and_a_list_is_padded_with_zeros():
    assert budgets.removal_schedule(13, 12) == (13,) * 12
    assert budgets.removal_schedule([5, 3], 4) == (5, 3, 0, 0)
    assert budgets.removal_schedule((5, 3, 1), 3) == (5, 3, 1)
    assert budgets.removal_schedule(0, 3) == (0, 0, 0)
    # Two ints are a list; only a float makes the second one an inflection.
    assert budgets.removal_schedule((8, 1), 3) == (8, 1, 0)


@given(st.integers(0, 40), st.floats(-1, 1), st.integers(2, 40))
def test_ramps_equal_the_published_formula(mean, inflection, layers):
    schedule = budgets.removal_schedule((mean, inflection), layers)
    assert list(schedule) == loop_ramp(mean, inflection, layers)
    # Truncation takes less than one token a layer.
    assert mean * layers - layers - 1e-6 <= sum(schedule) <= mean * layers + 1e-6


def test_a_flat_ramp_is_the_constant_schedule_and_signs_mirror():
    assert budgets.removal_schedule((8, 0.0), 12) == (8,) * 12
    assert budgets.removal_schedule((6, 1.0), 13) == budgets.removal_schedule((6, -1.0), 13)[::-1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((8, -1.5), r"lies in \[-1, 1\]; got -1.5"),
        ((8, 1.01), r"lies in \[-1, 1\]; got 1.01"),
        (-1, "removes 0 or more"),
        ([3, -2], r"removes 0 or more.*\(3, -2, 0, 0\)"),
        ([1, 1, 1, 1, 1], r"5 entries for 4 layers: \(1, 1, 1, 1, 1\)"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        budgets.removal_schedule(spec, 4)


def test_token_counts_of_the_paper():
    constant = budgets.token_counts(budgets.removal_schedule(13, 12), 197, protected=1)
    assert constant == tuple(197 - 13 * layer for layer in range(1, 13))
    assert constant[0] == 184 and constant[-1] == 41
    with pytest.warns(UserWarning, match=r"layer 11 is to remove 16 of 21 tokens.*at most 10.*; 10 are removed"):
        clamped = budgets.token_counts(budgets.removal_schedule(16, 12), 197, protected=1, clamp=True)
    assert clamped == (*(197 - 16 * layer for layer in range(1, 12)), 11)
    with pytest.warns(UserWarning, match=r"layer 23 is to remove 8 of 13 tokens.*; 6 are removed"):
        large = budgets.token_counts(budgets.removal_schedule(8, 24), 197, protected=1, clamp=True)
    assert large[0] == 189 and large[-2:] == (13, 7)


def test_asking_for_more_than_can_go_is_an_error_that_names_the_layer():
    with pytest.raises(
        ValueError, match=r"layer 11 is to remove 16 of 21 tokens, but at most 10 can go \(1 protected\)"
    ):
        budgets.token_counts((16,) * 12, 197, protected=1)


def test_pruning_can_take_all_but_the_protected_ones_and_leaves_one():
    assert budgets.token_counts((8,), 10, protected=2, halving=False) == (2,)
    assert budgets.token_counts((9,), 10, halving=False) == (1,)
    with pytest.raises(ValueError, match="at most 9 can go"):
        budgets.token_counts((10,), 10, halving=False)
    with pytest.raises(ValueError, match="at most 0 can go"):
        budgets.token_counts((1,), 1, protected=1)


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(1, 100), st.integers(0, 3), st.booleans())
def test_counts_never_rise_and_every_layer_removes_what_it_can(schedule, tokens, protected, halving):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = budgets.token_counts(schedule, tokens, protected=protected, clamp=True, halving=halving)
    assert len(counts) == len(schedule)
    for removed, before, after in zip(schedule, (tokens, *counts), counts, strict=False):
        free = max(before - protected, 0)
        assert before - after == min(removed, free // 2 if halving else min(free, before - 1))
        assert after >= 1


@pytest.mark.parametrize("budget", [0, -3, 9, budgets.Threshold(0.5, 0), budgets.Threshold(0.5, 9)])
def test_a_budget_outside_the_tokens_is_refused(budget):
    slots = budgets.capacity(budget)
    with pytest.raises(ValueError, match=rf"prune: a budget of {slots} surviving tokens is outside 1\.\.8; .*survive"):
        budgets.check(budget, 8, "prune")


def test_a_budget_that_fits_comes_back():
    threshold = budgets.Threshold(0.5, 8)
    assert budgets.check(threshold, 8) is threshold
    assert budgets.check(8, 8) == 8
    assert budgets.capacity(threshold) == 8


def test_numpy_integers_are_budgets_and_fractions_are_not():
    checked = budgets.check(np.int64(8), 8)
    assert checked == 8 and type(checked) is int
    with pytest.raises(TypeError, match=r"prune: a budget is a whole number of tokens; got 7\.9"):
        budgets.check(7.9, 8, "prune")
