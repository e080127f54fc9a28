# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 on pairs whose scores follow by hand from the published rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import qa


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Cat's\tHat!", "cats hat"),
        ("an apple a day", "apple day"),
        ("theatre, another", "theatre another"),
        ("U.S.A.", "usa"),
        ("ÉCOLE Über", "école über"),
        ("«москва»", "«москва»"),
        ("the", ""),
    ],
)
def test_normalised_answers(answer, expected):
    assert qa.normalize(answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0, 1.0),
        ("Broncos", ["Denver Broncos"], 0.0, 2 / 3),
        ("in the city of Denver", ["Denver city"], 0.0, 2 * 0.5 * 1.0 / 1.5),
        ("cat cat dog", ["cat dog dog"], 0.0, 2 / 3),
        ("1914", ["1915", "in 1914", "1914"], 1.0, 1.0),
        ("May 1914", ["1915", "1914"], 0.0, 2 / 3),
        ("no", ["yes"], 0.0, 0.0),
        ("", ["the"], 1.0, 0.0),
        ("서울", ["서울"], 1.0, 1.0),
    ],
)
def test_scores(prediction, answers, exact, f1):
    assert qa.exact_match(prediction, answers) == exact
    assert qa.f1(prediction, answers) == pytest.approx(f1)


@settings(deadline=None)
@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_more_answers_never_lower_a_score(prediction, answers):
    for score in (qa.exact_match, qa.f1):
        assert 0.0 <= score(prediction, answers[:1]) <= score(prediction, answers) <= 1.0
    assert qa.f1(prediction, answers) >= qa.exact_match(prediction, answers) * bool(qa.normalize(prediction))


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="at least one answer"):
        qa.exact_match("x", [])
    with pytest.raises(ValueError, match="at least one answer"):
        qa.f1("x", [])
