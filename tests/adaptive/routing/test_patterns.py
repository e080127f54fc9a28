# SPDX-License-Identifier: Apache-2.0
"""Patterns, their numbers and costs, and the errors of impossible budgets."""

import itertools
import math

import numpy as np
import pytest

from adaptive.routing import patterns


@pytest.mark.parametrize(("layers", "choices"), [(1, 2), (3, 3), (4, 2), (2, 5)])
def test_all_patterns_are_the_product_in_order(layers, choices):
    want = list(itertools.product(range(choices), repeat=layers))
    assert patterns.all_patterns(layers, choices).tolist() == [list(pattern) for pattern in want]


def test_patterns_with_so_many_big_modules_are_counted_by_binomials():
    """Duo-LLM: C(12, b) patterns of small and big with b big ones."""
    bigs = patterns.cost_of(patterns.all_patterns(12, 2), (0, 1))
    counts = np.bincount(bigs).tolist()
    assert counts == [1, 12, 66, 220, 495, 792, 924, 792, 495, 220, 66, 12, 1]
    assert sum(counts) == 4096 and len(patterns.all_patterns(8, 3)) == 6561
    with_skip = np.bincount(patterns.cost_of(patterns.all_patterns(5, 3), (0, 0, 1)))
    assert with_skip.tolist() == [math.comb(5, b) * 2 ** (5 - b) for b in range(6)]


def test_decode_inverts_the_numbering():
    every = patterns.all_patterns(4, 3)
    assert patterns.decode(np.array([0, 5, 80]), 4, 3).tolist() == every[[0, 5, 80]].tolist()


@pytest.mark.parametrize(
    ("budget", "costs", "kind", "message"),
    [
        (5, (0, 0, 1), ValueError, r"must lie in 0\.\.4.*got 5"),
        (-1, (0, 1), ValueError, r"must lie in 0\.\.4.*got -1"),
        (3, (1, 2), ValueError, r"must lie in 4\.\.8.*got 3"),
        (1.5, (0, 1), TypeError, r"whole number.*1\.5"),
        (1, (0,), ValueError, "two choices or more"),
        (1, (0, -1), ValueError, "whole numbers >= 0"),
    ],
)
def test_impossible_budgets_are_refused(budget, costs, kind, message):
    with pytest.raises(kind, match=message):
        patterns.check_budget(budget, 4, costs)


def test_a_pattern_must_fit_the_layers():
    assert patterns.check_pattern([0, 2, 1], 3, 3).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"each of 4 layers; got shape \(3,\)"):
        patterns.check_pattern([0, 2, 1], 4, 3)
    with pytest.raises(ValueError, match=r"0\.\.1; got \[0, 2, 1\]"):
        patterns.check_pattern([0, 2, 1], 3, 2)


def test_a_model_needs_layers():
    with pytest.raises(ValueError, match="at least one layer; got 0"):
        patterns.Layered(0, (0, 1), lambda x, _: x, lambda x, *_: x, lambda x: x)
