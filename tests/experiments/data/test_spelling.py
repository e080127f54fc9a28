# SPDX-License-Identifier: Apache-2.0
"""Spelling correction: targets are pieces of the text, inputs differ by typing errors, and kinds are true."""

import numpy as np
import pytest

from experiments.data import byte_vocab
from experiments.data.spelling import KINDS, SpellingCorrection, SpellingOptions
from experiments.data.words import Corpus, Vocabulary, find_words

ENGLISH = (
    "the cat then sat on a mat; the rat (not that cat) ate what the hat had. There where here their hare, there. "
    "An actual name, was actually happy, or the actual names of things form from what was then. "
) * 4
TEXTS = {
    "english": ENGLISH.encode(),
    "russian": ("административный центр района, центра области и областей; таких как грузовое движения. " * 8).encode(),
    "chinese": (
        "渤海國是本國歷史，但不使用南北國時代這個詞匯。流過的滁河、高淳的固城湖、溧水的石臼湖等。" * 8
    ).encode(),
    "bytes": b"some \xff\xfe words \xe4\xb8 and some \xf0 other word\xffs and " * 20,
}


def _source(text, **options):
    corpus = Corpus.from_bytes(np.frombuffer(text, np.uint8))
    vocabulary = Vocabulary(corpus, 1000)
    return SpellingCorrection(corpus, vocabulary, SpellingOptions(**options)), vocabulary


def _entropy(count):
    return np.stack([np.full(count, 3), np.arange(count)], axis=1)


def _pairs(batch):
    return [[byte_vocab.decode(row) for row in batch[key]] for key in ("input_ids", "labels")]


def _words(raw):
    text = raw.decode(errors="surrogateescape")
    starts, ends = find_words(text)
    return [text[s:e] for s, e in zip(starts, ends, strict=True)]


def _distance(a, b):
    """Edit distance with swaps of neighbours (optimal string alignment)."""
    d = np.zeros((len(a) + 1, len(b) + 1), int)
    d[:, 0], d[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
    return d[-1, -1]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("augment", [False, True])
def test_inputs_are_pieces_of_the_text_with_one_error(name, augment):
    source, _ = _source(TEXTS[name])
    indices = np.arange(100) % len(source)
    inputs, targets = _pairs(source.batch(indices, _entropy(100), augment=augment))
    for wrong, right in zip(inputs, targets, strict=True):
        assert right in TEXTS[name]
        assert _distance(wrong.decode(errors="surrogateescape"), right.decode(errors="surrogateescape")) == 1


def test_kinds_say_whether_the_error_is_a_word():
    source, vocabulary = _source(TEXTS["english"])
    batch = source.batch(np.arange(300) % len(source), _entropy(300), augment=True)
    inputs, targets = _pairs(batch)
    seen = 0
    for wrong, right, kind in zip(inputs, targets, batch["kind"], strict=True):
        new = [word for word in _words(wrong) if _words(wrong).count(word) > _words(right).count(word)]
        if len(_words(wrong)) == len(_words(right)) and len(new) == 1:
            seen += 1
            assert KINDS[kind] == ("dependent" if new[0] in vocabulary else "independent")
    assert seen > 150
    assert batch["kind"].dtype == np.int32 and 0.35 < batch["kind"].mean() < 0.65


@pytest.mark.parametrize(("dependent", "low", "high"), [(0.0, 0.0, 0.05), (1.0, 0.9, 1.0)])
def test_the_share_of_dependent_errors_is_as_asked(dependent, low, high):
    source, _ = _source(TEXTS["english"], dependent=dependent)
    kinds = source.batch(np.arange(100) % len(source), _entropy(100), augment=True)["kind"]
    assert low <= kinds.mean() <= high


def test_several_words_may_carry_an_error():
    source, _ = _source(TEXTS["english"], errors=3, dependent=0.0)
    inputs, targets = _pairs(source.batch(np.arange(50) % len(source), _entropy(50), augment=True))
    changed = [_distance(wrong.decode(), right.decode()) for wrong, right in zip(inputs, targets, strict=True)]
    assert max(changed) == 3 and np.mean(changed) > 2


def test_all_errors_occur():
    source, _ = _source(TEXTS["russian"], dependent=0.0)
    inputs, targets = _pairs(source.batch(np.arange(200) % len(source), _entropy(200), augment=True))
    growth = [len(a.decode()) - len(b.decode()) for a, b in zip(inputs, targets, strict=True)]
    same = [sorted(a) == sorted(b) for a, b, g in zip(inputs, targets, growth, strict=True) if g == 0]
    assert set(growth) == {-1, 0, 1} and set(same) == {True, False}


def test_training_moves_the_pieces_and_evaluation_does_not():
    source, _ = _source(TEXTS["english"])
    fixed = [source.batch(np.array([4]), _entropy(9)[[i]], augment=False)["labels"].tobytes() for i in range(9)]
    moved = [source.batch(np.array([4]), _entropy(9)[[i]], augment=True)["labels"].tobytes() for i in range(9)]
    assert len(set(fixed)) == 1 and len(set(moved)) > 3


def test_examples_depend_on_their_own_entropy_alone():
    source, _ = _source(TEXTS["chinese"])
    together = source.batch(np.arange(5), _entropy(5), augment=True)
    for row in range(5):
        alone = source.batch(np.array([row]), _entropy(5)[[row]], augment=True)
        for key, value in alone.items():
            np.testing.assert_array_equal(value[0], together[key][row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": 0}, "errors=0"),
        ({"dependent": 1.5}, "dependent=1.5"),
        ({"inputs_length": 12}, "inputs_length=12.*at least 13 and 9"),
        ({"targets_length": 8}, "targets_length=8"),
        ({"errors": 14}, "at least 65 and 9"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpellingOptions(**options)


def test_the_shortest_lengths_work():
    source, _ = _source(TEXTS["english"], inputs_length=13, targets_length=9)
    batch = source.batch(np.arange(20) % len(source), _entropy(20), augment=True)
    assert batch["input_ids"].shape == (20, 13) and batch["labels"].shape == (20, 9)


def test_a_text_without_a_word_to_change_is_refused():
    with pytest.raises(ValueError, match="no word of 2 characters or more and at most 59 bytes"):
        _source(b"a b a b " * 10)
