# SPDX-License-Identifier: Apache-2.0
"""Word search: the word is hidden once more among others, kinds are true, and held-out words never occur in training."""

import numpy as np
import pytest

from experiments.data import byte_vocab
from experiments.data.splits import place_of
from experiments.data.word_search import KINDS, SearchOptions, WordSearch
from experiments.data.words import Corpus, Vocabulary

# Every word twice, so that all are in the vocabulary.
_SYLLABLES = ("ba", "de", "fi", "go", "lu", "mer", "tan", "sol", "ник", "ист")
WORDS = sorted({a + b for a in _SYLLABLES for b in _SYLLABLES} | {a + b + "s" for a in _SYLLABLES for b in _SYLLABLES})
TEXT = " ".join(np.random.default_rng(0).permutation(2 * WORDS).tolist())
NEW = ("novel", "unseen", "другой")


def _corpus(text):
    return Corpus.from_bytes(np.frombuffer(text.encode(), np.uint8))


def _source(*, train=True, text=TEXT, **options):
    vocabulary = Vocabulary(_corpus(TEXT), 1000)
    return WordSearch(_corpus(text), vocabulary, SearchOptions(**options), train=train)


def _batch(source, count=None, seed=0):
    count = len(source) if count is None else count
    entropy = np.stack([np.full(count, seed), np.arange(count)], axis=1)
    return source.batch(np.arange(count) % len(source), entropy, augment=True)


def _parts(batch):
    inputs = [byte_vocab.decode(row).decode() for row in batch["input_ids"]]
    targets = [byte_vocab.decode(row).decode() for row in batch["labels"]]
    return [(*line.split(": "), target) for line, target in zip(inputs, targets, strict=True)]


def test_the_word_is_hidden_forwards_or_backwards_and_the_clue_stands_around_it():
    source = _source()
    listed = TEXT.split(" ")
    ways = set()
    for clue, letters, target in _parts(_batch(source)):
        forwards, backwards = target in letters, target[::-1] in letters
        assert forwards or backwards
        ways.add((forwards, backwards))
        around = [listed[max(i - 2, 0) : i + 3] for i, word in enumerate(listed) if word == target]
        assert any(set(clue.split()) <= set(place) for place in around) and target not in clue.split()
    assert {(True, False), (False, True)} <= ways


def test_letters_are_whole_words_of_the_vocabulary():
    """Without overlap, the letters divide into four words, each forwards or backwards."""
    either = set(WORDS) | {word[::-1] for word in WORDS}

    def divisions(letters, count):
        if count == 0:
            return not letters
        return any(letters.startswith(word) and divisions(letters[len(word) :], count - 1) for word in either)

    parts = _parts(_batch(_source(overlap=0.0), 60))
    assert all(divisions(letters, 4) for _, letters, _ in parts)


def test_an_overlap_shares_one_letter():
    either = set(WORDS) | {word[::-1] for word in WORDS}
    for overlap in (0.0, 1.0):
        batch = _batch(_source(overlap=overlap, distractors=1))
        for (_, letters, target), kind in zip(_parts(batch), batch["kind"], strict=True):
            before = [letters.removesuffix(way) + way[0] for way in (target, target[::-1]) if letters.endswith(way)]
            assert KINDS[kind] == ("overlap" if overlap else "plain")
            assert not overlap or any(word in either for word in before)


def test_held_out_words_occur_nowhere_in_training():
    held = {word for word in WORDS if place_of(word) < 0.2}
    assert 0 < len(held) < len(WORDS) / 2
    train = _source(held_out=0.2)
    for clue, _, target in _parts(_batch(train)):
        assert not held & {*clue.split(), target}
    assert len(train) == len(WORDS) - len(held)
    distractors = {word for words in train._ending.values() for word in words}
    assert not held & (distractors | {word[::-1] for word in distractors})


def test_evaluation_has_words_that_training_never_saw():
    source = _source(train=False, text=" ".join([*NEW, *WORDS]), held_out=0.2)
    batch = _batch(source)
    assert len(source) == len(WORDS) + len(NEW)
    for (_, _, target), kind in zip(_parts(batch), batch["kind"], strict=True):
        assert KINDS[kind].startswith("oov") == (target in NEW or place_of(target) < 0.2)
    assert set(batch["kind"].tolist()) == {0, 1, 2, 3}


def test_batches_repeat_and_differ_with_their_entropy():
    source = _source()
    first, again, other = _batch(source, 20), _batch(source, 20), _batch(source, 20, seed=1)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    np.testing.assert_array_equal(first["labels"], other["labels"])
    assert (first["input_ids"] != other["input_ids"]).any(axis=1).sum() > 15


def test_long_surroundings_fit():
    text = ("x" * 60 + " " + "ж" * 20 + " short word " + "y" * 100 + " other ") * 3
    source = WordSearch(_corpus(text), Vocabulary(_corpus(text), 100), SearchOptions(held_out=0.0), train=True)
    assert source._words == ["other", "short", "word"]
    batch = _batch(source, 200)
    assert batch["input_ids"].shape == (200, 128) and batch["labels"].shape == (200, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"overlap": -0.1}, "overlap=-0.1"),
        ({"distractors": 0}, "distractors=0"),
        ({"targets_length": 3}, "targets_length=3 must be at least 4"),
        ({"inputs_length": 67}, "inputs_length=67 must be at least 68"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="the text has 1 words to hide"):
        _source(train=False, text="single a b c")
