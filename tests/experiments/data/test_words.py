# SPDX-License-Identifier: Apache-2.0
"""Words are found in every script, and neighbours are exactly the words one error away."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import words
from experiments.data.words import Corpus, Vocabulary


def _corpus(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return Corpus.from_bytes(np.frombuffer(raw, np.uint8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, it's 12 cats!", ["The", "cat", "it", "s", "cats"]),
        ("über_naïve été", ["über", "naïve", "été"]),
        ("Привет, мир", ["Привет", "мир"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("서울은 도시", ["서울은", "도시"]),
        ("渤海國是本國歷史，但", ["渤海", "國是", "本國", "歷史", "但"]),
        ("ab中國人", ["ab", "中國", "人"]),
        ("x", ["x"]),
        ("12 ...", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert _corpus(text).words == expected


def test_undecodable_bytes_belong_to_no_word_and_come_back():
    raw = b"one\xff\xfetwo \xe4\xb8 three"
    corpus = _corpus(raw)
    assert corpus.words == ["one", "two", "three"]
    assert words.encode(corpus.text) == raw


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "é", "中", "字", "𐍈", " ", ".", "и"]), max_size=30).map("".join),
    st.binary(max_size=5),
)
def test_byte_places_cut_out_the_words(text, junk):
    raw = text.encode() + junk
    corpus = _corpus(raw)
    for index, (first, last) in enumerate(zip(corpus.first_byte, corpus.last_byte, strict=True)):
        assert raw[first:last] == words.encode(corpus.word(index))
    assert (corpus.ends > corpus.starts).all() and (corpus.starts[1:] >= corpus.ends[:-1]).all()
    assert corpus.words == [corpus.word(index) for index in range(len(corpus))]


def test_a_vocabulary_is_the_most_frequent_words():
    corpus = _corpus("b b b a a c c d e")
    assert Vocabulary(corpus, 10).words == ("b", "a", "c"), "words that occur once are left out, ties are alphabetic"
    assert Vocabulary(corpus, 2).words == ("b", "a")
    assert "a" in Vocabulary(corpus, 2) and "c" not in Vocabulary(corpus, 2)


def _one_error_away(word, other):
    """Plain restatement: swap, insertion, deletion or replacement of one character."""
    letters = set(other)
    made = {word[:i] + word[i + 1 :] for i in range(len(word))}
    made |= {word[:i] + c + word[i:] for i, c in itertools.product(range(len(word) + 1), letters)}
    made |= {word[:i] + c + word[i + 1 :] for i, c in itertools.product(range(len(word)), letters)}
    made |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return other in made and other != word


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=2, max_size=25, unique=True),
    st.text("abcd", min_size=1, max_size=5),
)
def test_neighbours_are_one_error_away(listed, word):
    vocabulary = Vocabulary(_corpus(" ".join(2 * listed)), 100)
    assert vocabulary.neighbours(word) == sorted(other for other in listed if _one_error_away(word, other))


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="4 words, of which 1 occur more than once"):
        Vocabulary(_corpus("a a b c"), 10)
    with pytest.raises(ValueError, match="vocabulary=1"):
        Vocabulary(_corpus("a a b b"), 1)
