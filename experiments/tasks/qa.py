# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 of answers, as question answering sets are scored.

Source: Rajpurkar et al. 2016 (SQuAD), section 6.1, and its evaluation script, version 1.1.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Returns an answer in lower case, without ASCII punctuation, English articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the prediction equals one of the accepted answers once normalised, else 0.0.

    Raises:
      ValueError: there is no answer.
    """
    return _best(lambda answer: float(normalize(prediction) == normalize(answer)), answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall of words, normalised, for the best of the accepted answers.

    Words count as often as they occur; no word in common is 0.0, also where both sides are empty.

    Raises:
      ValueError: there is no answer.
    """
    return _best(lambda answer: _word_f1(normalize(prediction).split(), normalize(answer).split()), answers)


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("a prediction is scored against at least one answer; got none")
    return max(score(answer) for answer in answers)


def _word_f1(prediction: list[str], answer: list[str]) -> float:
    common = (collections.Counter(prediction) & collections.Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0
