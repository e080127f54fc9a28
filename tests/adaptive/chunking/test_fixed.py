# SPDX-License-Identifier: Apache-2.0
"""Strides, space patches and words: against examples, loops over bytes, and the splitter on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.tokens import Signals, TokenSet
from experiments.data import byte_vocab, hat_splitter

LENGTH = 32


@functools.cache
def compiled(name, hyper=()):
    return jax.jit(lambda tokens, signals: registry.get(name)(tokens, signals, **dict(hyper)).starts)


def cut(name, text, **hyper):
    """The pieces into which a method cuts a text of at most `LENGTH` bytes, as bytes; special ids may stand in it too."""
    ids = np.asarray(byte_vocab.encode(text) if isinstance(text, str | bytes) else text)
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    tokens = TokenSet.create(jnp.zeros((1, LENGTH, 1)), mask=jnp.asarray(np.arange(LENGTH)[None] < len(ids)))
    starts = np.flatnonzero(compiled(name, tuple(hyper.items()))(tokens, Signals(token_ids=jnp.asarray(padded)))[0])
    return [byte_vocab.decode(piece) if min(piece) >= 3 else piece.tolist() for piece in np.split(ids, starts[1:])]


def test_strides_are_equal_and_a_last_one_may_be_short():
    assert cut("strided", "abcdefghij", stride=4) == [b"abcd", b"efgh", b"ij"]
    assert cut("strided", "abc", stride=1) == [b"a", b"b", b"c"]
    for name in ("strided", "gbst"):
        with pytest.raises(ValueError, match="a stride has at least one token; got 0"):
            cut(name, "abc", stride=0)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the cat  sat.", [b"t", b"he ", b"cat ", b" sat."]),
        (" ab", [b" ", b"ab"]),
        ("a-b", [b"a", b"-", b"b"]),
        ("aé b", [b"a", b"\xc3", b"\xa9 ", b"b"]),
        ([100, 100, 1, 100, 100], [b"a", [100, 1], b"aa"]),
    ],
)
def test_space_patches_of_examples(text, pieces):
    assert cut("space_patches", text) == pieces


def loop_space_patches(raw):
    """Starts by the rule, byte by byte."""
    spaces = [b >= 0xC0 or (b < 128 and not chr(b).isalnum()) for b in raw]
    ends = [spaces[i] and not (i and spaces[i - 1]) for i in range(len(raw))]
    return sorted({0, 1} | {i + 1 for i in range(1, len(raw)) if ends[i]})


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=2, max_size=LENGTH))
def test_space_patches_equal_a_loop(raw):
    starts = [start for start in loop_space_patches(raw) if start < len(raw)]
    assert cut("space_patches", raw) == [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The quick  brownFox.", ["The", " quick", "  ", "brown", "Fox."]),
        ("don't (x), 3.14", ["don'", "t", " (", "x),", " 3.", "14"]),
        ("\n\n\ta\r\nb", ["\n", "\n", "\t", "a", "\r\n", "b"]),
        ("a+=b; x_y", ["a", "+", "=", "b;", " x_", "y"]),
        ("HTTPServer xY", ["HTTPServer", " x", "Y"]),
        (" a  ", [" a", "  "]),
        ("über Öl", ["über", " Öl"]),
    ],
)
def test_words_of_examples_on_the_device_and_on_the_host(text, pieces):
    assert [piece.decode() for piece in cut("words", text)] == pieces == hat_splitter.split(text)


@settings(max_examples=150, deadline=None)
@given(st.text("aZbQ0 .,_+$\n\r\t\x01'(", min_size=1, max_size=LENGTH))
def test_words_on_the_device_equal_the_splitter_on_ascii_text(text):
    assert [piece.decode() for piece in cut("words", text)] == hat_splitter.split(text)


def test_a_special_id_is_a_word_of_its_own():
    ids = [*byte_vocab.encode("ab"), 1, *byte_vocab.encode("cd")]
    assert cut("words", ids) == [b"ab", [1], b"cd"]


@pytest.mark.parametrize("name", ["words", "space_patches"])
def test_long_pieces_are_cut(name):
    whole, short = cut(name, "abcdefgh ijklmnopq rst"), cut(name, "abcdefgh ijklmnopq rst", longest=3)
    assert max(map(len, whole)) > 3 and max(map(len, short)) == 3
    assert b"".join(short) == b"".join(whole)
