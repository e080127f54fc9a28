# SPDX-License-Identifier: Apache-2.0
"""The word splitter: what it loses (nothing), where it cuts, and limits in bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import hat_splitter


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_the_units_joined_are_the_text(text):
    assert "".join(hat_splitter.split(text)) == text
    assert all(hat_splitter.split(text))


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("", []),
        ("Hello, world!", ["Hello,", " world!"]),
        ("a   b", ["a", "   ", "b"]),
        ("camelCaseÄÖ éÉ", ["camel", "Case", "ÄÖ", " é", "É"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("漢字 かな", ["漢", "字", " か", "な"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("a\u00a0b\u3000", ["a", "\u00a0", "b", "\u3000"]),
        ("«oui»", ["«", "oui»"]),
        ("x → y", ["x", " →", " y"]),
        ("\r\n\r", ["\r\n", "\r"]),
    ],
)
def test_units_of_examples(text, units):
    assert hat_splitter.split(text) == units


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.integers(4, 9))
def test_pieces_are_whole_characters_within_the_limit_and_lose_nothing(text, limit):
    pieces = hat_splitter.split_with_limit(text, limit)
    assert b"".join(pieces) == text.encode()
    assert all(0 < len(piece) <= limit and piece.decode() for piece in pieces)
    # A unit that fits is not cut.
    assert [p.decode() for p in hat_splitter.split_with_limit(text, 1000)] == hat_splitter.split(text)


def test_a_long_word_is_cut_between_characters():
    assert hat_splitter.split_with_limit("üüü abc", 4) == ["üü".encode(), "ü".encode(), b" abc"]


def test_a_limit_below_one_character_is_an_error():
    with pytest.raises(ValueError, match="must be at least 4; got 3"):
        hat_splitter.split_with_limit("a", 3)
