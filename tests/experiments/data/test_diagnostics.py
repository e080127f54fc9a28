# SPDX-License-Identifier: Apache-2.0
"""Diagnostics: answers agree with regular expressions, and strings with the published description."""

import re

import numpy as np
import pytest

from experiments.data import byte_vocab
from experiments.data.diagnostics import DIAGNOSTICS, Diagnostic

ANSWERS = {
    "vowel_removal": lambda s: re.sub("[aeiouAEIOU]", "", s),
    "contextual_vowel_removal": lambda s: re.sub("([bcdfghjklmnpqrstvwxyz])[aeiouAEIOU]", r"\1", s),
    "sequence_merge": lambda s: s.replace("ABC", "D"),
    "copy": lambda s: s,
}


def _batch(name, count, split="train", **kwargs):
    return Diagnostic(name, split, 10_000, **kwargs).batch(np.arange(count), np.zeros((count, 3)), augment=True)


def _strings(ids):
    return [byte_vocab.decode(row).decode() for row in ids]


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("length", [8, 64])
def test_answers_follow_from_the_strings(name, length):
    batch = _batch(name, 300, length=length)
    inputs, labels = _strings(batch["input_ids"]), _strings(batch["labels"])
    assert labels == [ANSWERS[name](string) for string in inputs]
    assert all(re.fullmatch(f"#[a-zA-Z]{{{length - 2}}}", string) for string in inputs)
    assert (name == "copy") == (labels == inputs)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_rows_end_with_eos_and_padding(name):
    batch = _batch(name, 50)
    for key in ("input_ids", "labels"):
        ends = np.sum(batch[key] != 0, axis=1) - 1
        assert batch[key].dtype == np.int32 and batch[key].shape == (50, 64)
        np.testing.assert_array_equal(batch[key][np.arange(50), ends], byte_vocab.EOS)
        np.testing.assert_array_equal(np.sum(batch[key] == byte_vocab.EOS, axis=1), 1)
    np.testing.assert_array_equal(batch["decoder_input_ids"], byte_vocab.shift_right(batch["labels"]))


def test_letters_are_uniform():
    ids = _batch("copy", 4000)["input_ids"][:, 1:-1] - byte_vocab.OFFSET
    letters, counts = np.unique(ids, return_counts=True)
    assert bytes(letters.astype(np.uint8)).decode().isalpha() and len(letters) == 52
    np.testing.assert_allclose(counts / ids.size, 1 / 52, rtol=0.1)


def test_as_many_triples_are_merged_as_published():
    """max(1, int(N(5, 2.5))) has mean 4.54; no place is short of room for so few."""
    batch = _batch("sequence_merge", 4000)
    merged = (np.sum(batch["input_ids"] != 0, axis=1) - np.sum(batch["labels"] != 0, axis=1)) / 2
    draws = np.random.default_rng(0).normal(5, 2.5, 100_000)
    expected = np.maximum(draws.astype(int), 1)
    assert abs(merged.mean() - expected.mean()) < 0.15 and abs(merged.std() - expected.std()) < 0.15
    assert merged.min() == 1


def test_as_many_vowels_follow_consonants_as_the_published_procedure_gives():
    """A plain restatement: 501 draws with replacement, refused when they overlap."""
    rng = np.random.default_rng(0)
    removed = []
    for _ in range(300):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"), 62)
        wanted, places = max(1, int(rng.normal(25, 12.5))), []
        for place in rng.integers(0, 60, 501):
            if len(places) < wanted and all(abs(place - other) >= 2 for other in places):
                places.append(place)
                letters[place] = rng.choice(list("bcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ"))
                letters[place + 1] = rng.choice(list("aeiouAEIOU"))
        string = "".join(letters)
        removed.append(62 - len(ANSWERS["contextual_vowel_removal"](string)))
    batch = _batch("contextual_vowel_removal", 3000)
    found = np.sum(batch["input_ids"] != 0, axis=1) - np.sum(batch["labels"] != 0, axis=1)
    # Four standard errors of the smaller sample.
    assert abs(found.mean() - np.mean(removed)) < 4 * np.std(removed) / np.sqrt(300)


def test_an_example_depends_on_seed_split_and_index_alone():
    source = Diagnostic("contextual_vowel_removal", "train", 100)
    together = source.batch(np.array([7, 3]), np.zeros((2, 3)), augment=True)
    alone = source.batch(np.array([3]), np.ones((1, 3)), augment=False)
    np.testing.assert_array_equal(together["input_ids"][1], alone["input_ids"][0])
    streams = [
        {row.tobytes() for row in _batch("copy", 200, split=split, seed=seed)["input_ids"]}
        for split, seed in (("train", 0), ("valid", 0), ("test", 0), ("train", 1))
    ]
    assert len(set.union(*streams)) == 800


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"'vowels'.*vowel_removal, contextual"):
        Diagnostic("vowels", "train", 10)
    with pytest.raises(ValueError, match="'dev'"):
        Diagnostic("copy", "dev", 10)
    with pytest.raises(ValueError, match="examples=0"):
        Diagnostic("copy", "train", 0)
    with pytest.raises(ValueError, match="length=5 must be at least 6 for sequence_merge"):
        Diagnostic("sequence_merge", "train", 10, length=5)
    assert _batch("sequence_merge", 5, length=6)["input_ids"].shape == (5, 6)
