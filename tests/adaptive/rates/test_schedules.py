# SPDX-License-Identifier: Apache-2.0
"""Schedules and the spaces that are searched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import flops
from adaptive.rates.schedules import Schedule, Space, cost_of

SPEC = flops.ViTSpec(patch_size=4, width=16, depth=4, mlp_dim=32, num_classes=5, image_size=(16, 16))
COST = cost_of(SPEC)
DENSE = COST((17,) * 4)


def _space(share=0.6, **options):
    return Space(4, 17, COST, share * DENSE, **options)


def test_numbers_above_what_is_there_change_nothing():
    schedule = Schedule((20, 12, 14, 3), (18, 10, 12, 5)).on(17)
    assert schedule == Schedule((17, 12, 10, 3), (17, 10, 10, 3))
    assert schedule.counts == (17, 10, 10, 3)


def test_a_schedule_must_fit_its_backbone():
    with pytest.raises(ValueError, match="3 layers and the backbone 4"):
        Schedule.of_counts((17, 9, 3)).check(4, 17)
    with pytest.raises(ValueError, match="keeps up to 18 tokens of 17"):
        Schedule.of_counts((18, 9, 3, 3)).check(4, 17)
    with pytest.raises(ValueError, match="at least 1 token"):
        Schedule((3, 0), (3, 3))
    with pytest.raises(ValueError, match="got 2 and 1"):
        Schedule((3, 3), (3,))


def test_a_budget_that_no_schedule_meets_is_an_error():
    with pytest.raises(ValueError, match=r"no schedule meets a budget of .*: the smallest, \(17, 2, 2, 2\)"):
        _space(0.1)
    with pytest.raises(ValueError, match=r"least=18 must lie in 1\.\.17"):
        _space(least=18)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.65, 1.0), st.booleans(), st.integers(0, 1), st.integers(0, 10_000))
def test_every_family_meets_the_budget_and_spends_it(share, halving, first, seed):
    space = _space(share, halving=halving, first=first)
    for counts in (space.linear(), space.level(), space.random(np.random.default_rng(seed))):
        assert space.fits(counts), counts
        for layer in range(4):
            more = (*counts[:layer], counts[layer] + 1, *counts[layer + 1 :])
            assert not (space.repair(more) == more and space.fits(more))


def test_a_whole_budget_is_the_dense_model():
    for counts in (_space(1.0).linear(), _space(1.0).level(), _space(1.0).random(np.random.default_rng(0))):
        assert counts == (17,) * 4


def test_repair_keeps_counts_whole_falling_and_halved_at_most():
    assert _space().repair((3, 8.2, 12, 1)) == (17, 9, 9, 2)
    assert _space(0.8, halving=True, first=0).repair((2, 2, 2, 2)) == (9, 5, 3, 2)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_the_linear_family_removes_about_as_many_everywhere(share):
    spec = flops.ViTSpec(patch_size=4, width=16, depth=6, mlp_dim=32, num_classes=5, image_size=(32, 32))
    cost = cost_of(spec)
    counts = Space(6, 65, cost, share * cost((65,) * 6), first=0, halving=True).linear()
    removed = -np.diff([65, *counts])
    # What is left of the budget goes to the last layer, whose tokens are the cheapest.
    assert removed[:-1].max() - removed[:-1].min() <= 1 and 0 < removed[-1] <= removed.max()


@pytest.mark.parametrize(("pruned", "alive"), [(0.0, (17, 11, 7)), (0.5, (14, 9, 5)), (1.0, (11, 7, 4))])
def test_a_share_of_what_goes_is_pruned(pruned, alive):
    assert Schedule.split((11, 7, 4), 17, pruned) == Schedule(alive, (11, 7, 4))


def test_a_share_of_pruning_beyond_all_is_an_error():
    with pytest.raises(ValueError, match=r"pruned=1.5 is the share .* in \[0, 1\]"):
        Schedule.split((11, 7), 17, 1.5)
