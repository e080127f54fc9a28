# SPDX-License-Identifier: Apache-2.0
"""Searches on losses whose best schedule is known."""

import itertools

import numpy as np
import pytest

from adaptive import flops
from adaptive.rates import search
from adaptive.rates.schedules import Space, cost_of

SPEC = flops.ViTSpec(patch_size=4, width=16, depth=4, mlp_dim=32, num_classes=5, image_size=(16, 16))
COST = cost_of(SPEC)
DENSE = COST((17,) * 4)
SPACE = Space(4, 17, COST, 0.75 * DENSE)


class Recorder:
    """A loss that counts what it is asked for."""

    def __init__(self, loss):
        self.loss, self.asked = loss, []

    def __call__(self, counts, share=1.0):
        self.asked.append((tuple(counts), share))
        return self.loss(counts)


def towards(target):
    return Recorder(lambda counts: float(sum((a - b) ** 2 for a, b in zip(counts, target, strict=True))))


def falling(scales):
    """Each layer has its own price for tokens that are gone; all rise, as fewer tokens are kept."""
    return Recorder(lambda counts: float(sum(s * (17 - c) ** 2 for s, c in zip(scales, counts, strict=True))))


def every_schedule():
    for counts in itertools.product(range(2, 18), repeat=3):
        if SPACE.fits((17, *counts)):
            yield (17, *counts)


def test_evopress_finds_the_best_of_all_schedules():
    for scales in ((0.0, 3.0, 0.5, 1.0), (0.0, 1.0, 0.2, 5.0)):
        loss = falling(scales)
        best = min(every_schedule(), key=loss.loss)
        found = search.evopress(SPACE, loss, generations=12, offspring=16, stages=((1.0, 1),), seed=0)
        assert loss.loss(found) == loss.loss(best) < loss.loss(SPACE.linear())


def test_evopress_never_leaves_the_budget_and_never_gets_worse():
    loss = towards((17, 17, 5, 3))
    history = [
        loss.loss(search.evopress(SPACE, loss, generations=n, offspring=4, stages=((0.25, 2), (1.0, 1)), seed=1))
        for n in (0, 2, 6)
    ]
    assert history[0] >= history[1] >= history[2] and history[2] < history[0]
    assert all(SPACE.fits(counts) for counts, _ in loss.asked)
    assert {share for _, share in loss.asked} == {0.25, 1.0}
    with pytest.raises(ValueError, match=r"the last stage must be \(1.0, 1\)"):
        search.evopress(SPACE, loss, generations=1, offspring=1, stages=((0.5, 1),), seed=0)


def test_evopress_proposes_no_mutant_twice():
    loss = towards((17, 14, 4, 3))
    search.evopress(SPACE, loss, generations=5, offspring=6, stages=((0.5, 3), (1.0, 1)), seed=2)
    early = [counts for counts, share in loss.asked if share == 0.5]
    # Sorting asks once for each mutant of a generation.
    assert len(early) == len(set(early))


def test_random_search_returns_its_best_and_repeats_with_its_seed():
    loss = towards((17, 9, 9, 9))
    found = search.random_search(SPACE, loss, trials=12, seed=3)
    asked = [counts for counts, _ in loss.asked]
    assert len(set(asked)) == len(asked) == 12 and found == min(asked, key=loss.loss)
    assert search.random_search(SPACE, loss, trials=12, seed=3) == found


def test_g_search_is_exhaustive_search_where_the_loss_is_monotone():
    """The fewest tokens layer by layer, deeper layers at the same number, against a scan of all numbers."""
    loss, tolerance = falling((0.0, 1.0, 0.2, 0.1)), 30.0
    want = (17,)
    for layer in range(1, 4):
        fits = [k for k in range(2, want[-1] + 1) if loss.loss((*want, *(k,) * (4 - layer))) <= tolerance]
        want = (*want, min(fits))
    assert search.g_search(SPACE, loss, tolerance=tolerance) == want
    assert search.g_search(SPACE, loss, tolerance=0.0) == (17,) * 4
    with pytest.raises(ValueError, match="at least 0; got -1"):
        search.g_search(SPACE, loss, tolerance=-1)


def test_g_search_meets_a_budget_or_says_that_it_cannot():
    loss = falling((0.0, 0.01, 0.002, 0.001))
    counts = search.g_search_budget(SPACE, loss, highest=10.0)
    assert SPACE.fits(counts) and SPACE.cost(counts) > 0.9 * SPACE.budget
    with pytest.raises(ValueError, match="raise the highest tolerance"):
        search.g_search_budget(SPACE, loss, highest=1e-4)


def test_p_sigmoid_tries_what_is_suggested_and_stays_in_the_budget():
    points = iter([(0.2, 0.1), (3.0, 0.0), (0.2, 0.1), (1.0, 0.5)])
    told = []

    def suggest(history):
        told.append(list(history))
        return next(points)

    loss = towards((17, 16, 6, 2))
    found = search.p_sigmoid(SPACE, loss, trials=4, suggest=suggest)
    asked = [counts for counts, _ in loss.asked]
    assert 2 <= len(asked) == len(set(asked)) < 4
    assert found == min(asked, key=loss.loss) and all(map(SPACE.fits, asked))
    assert [point for point, _ in told[-1]] == [(0.2, 0.1), (3.0, 0.0), (0.2, 0.1)]


def test_the_sigmoid_falls_steeper_with_its_steepness_and_not_below_its_floor():
    spec = flops.ViTSpec(4, 16, 8, 32, 5, (32, 32))
    space = Space(8, 65, cost_of(spec), 0.6 * cost_of(spec)((65,) * 8))
    gentle, steep = (search.sigmoid_family(space, s, 0.1) for s in (0.2, 4.0))
    assert max(-np.diff(steep)) > 1.5 * max(-np.diff(gentle))
    assert min(search.sigmoid_family(space, 4.0, 0.4)) >= 0.4 * 65 - 1
    assert search.uniform_search(space, towards((1,) * 8)) == space.linear()
