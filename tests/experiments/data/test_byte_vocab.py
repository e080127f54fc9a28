# SPDX-License-Identifier: Apache-2.0
"""Every string of bytes goes through the vocabulary unharmed; what is no byte decodes to nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import byte_vocab


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_survive(raw):
    ids = byte_vocab.encode(raw)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [b + 3 for b in raw])
    assert byte_vocab.decode(ids) == raw
    byte_vocab.decode_text(ids)  # never an error, valid UTF-8 or not


@settings(deadline=None)
@given(st.text(max_size=50))
def test_text_survives_with_eos(text):
    text = text.encode("utf-8", "ignore").decode()
    ids = byte_vocab.encode(text, eos=True)
    assert ids[-1] == 1
    assert byte_vocab.decode_text(ids) == text


def test_surrogates_from_file_names_become_their_bytes():
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert byte_vocab.decode(byte_vocab.encode(name)) == b"caf\xe9"


def test_specials_and_unused_rows_decode_to_nothing():
    assert byte_vocab.decode([0, 1, 2, 68, 259, 383]) == b"A"


def test_empty():
    assert byte_vocab.encode("").shape == (0,)
    assert byte_vocab.decode([]) == b""


@pytest.mark.parametrize("bad", [-1, 384])
def test_ids_outside_the_table_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        byte_vocab.decode([5, bad])


def test_encoding_ids_again_is_refused():
    with pytest.raises(TypeError, match="already encoded"):
        byte_vocab.encode(byte_vocab.encode("abc"))


def test_sentinels_descend_from_258():
    np.testing.assert_array_equal(byte_vocab.sentinels(3), [258, 257, 256])
    assert byte_vocab.sentinels(256)[-1] == 3
    with pytest.raises(ValueError, match="257"):
        byte_vocab.sentinels(257)


def test_shift_right_starts_with_pad():
    labels = np.array([[5, 6, 1], [7, 1, 0]], np.int32)
    np.testing.assert_array_equal(byte_vocab.shift_right(labels), [[0, 5, 6], [0, 7, 1]])


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=4)), min_size=1, max_size=5))
def test_pairs_are_closed_and_padded(strings):
    inputs, targets = zip(*strings, strict=True)
    batch = byte_vocab.pack_pairs(inputs, targets, inputs_length=10, targets_length=5)
    for key, side, length in (("input_ids", inputs, 10), ("labels", targets, 5)):
        expected = [[*(b + 3 for b in raw), 1, *([0] * (length - 1 - len(raw)))] for raw in side]
        np.testing.assert_array_equal(batch[key], expected)
        assert batch[key].dtype == np.int32
    np.testing.assert_array_equal(batch["decoder_input_ids"], byte_vocab.shift_right(batch["labels"]))


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="input of 10 bytes and its eos do not fit into 10 ids"):
        byte_vocab.pack_pairs([b"", b"0123456789"], [b"", b""], inputs_length=10, targets_length=5)
    with pytest.raises(ValueError, match="target of 5 bytes"):
        byte_vocab.pack_pairs([b""], [b"01234"], inputs_length=10, targets_length=5)
