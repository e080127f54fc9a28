# SPDX-License-Identifier: Apache-2.0
"""Deleted bytes by class: the table of classes, and the sums."""

import string

import jax
import numpy as np
import pytest

from experiments.byte_classes import CLASSES, deleted_by_class
from experiments.data import byte_vocab

count = jax.jit(deleted_by_class)


def class_of(token_id):
    """The class of one id: the only one that has a byte."""
    found = count(np.zeros((1, 1), bool), np.array([[token_id]]), np.ones((1, 1), bool))
    (name,) = [name for name, (_, there) in found.items() if there]
    return name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" \t\n\r\x0b\x0c", "whitespace"),
        ("azAZ", "letter"),
        ("09", "digit"),
        (string.punctuation, "punctuation"),
        ("\x00\x1f\x7f", "special"),
    ],
)
def test_classes_of_ascii(text, name):
    assert {class_of(token_id) for token_id in byte_vocab.encode(text)} == {name}


@pytest.mark.parametrize("character", ["é", "ß", "я", "中", "ह", "😀", "\U0010ffff", "\x80"])
def test_characters_of_several_bytes_are_a_lead_byte_and_continuations(character):
    first, *rest = (class_of(token_id) for token_id in byte_vocab.encode(character))
    assert first == "lead" and set(rest) == {"continuation"} and rest


def test_special_ids():
    ids = [byte_vocab.PAD, byte_vocab.EOS, byte_vocab.UNK, *byte_vocab.sentinels(11), byte_vocab.TABLE_SIZE - 1]
    assert {class_of(token_id) for token_id in ids} == {"special"}
    # The twelfth sentinel shares its id with a byte that UTF-8 does use.
    assert class_of(byte_vocab.sentinels(12)[-1]) == "lead"


def test_every_id_has_one_class_and_deleted_bytes_are_counted_in_it():
    ids = np.arange(byte_vocab.TABLE_SIZE).reshape(2, -1)
    rng = np.random.default_rng(0)
    kept, valid = rng.random(ids.shape) < 0.4, rng.random(ids.shape) < 0.7
    found = count(kept, ids, valid)
    assert set(found) == set(CLASSES)
    assert sum(float(there) for _, there in found.values()) == valid.sum()
    assert sum(float(deleted) for deleted, _ in found.values()) == (valid & ~kept).sum()
    letters = np.isin(ids, byte_vocab.encode(string.ascii_letters)) & valid
    assert [float(part) for part in found["letter"]] == [(letters & ~kept).sum(), letters.sum()]
