# SPDX-License-Identifier: Apache-2.0
"""Splits text into words as hierarchical byte-and-word models do, on the host; the words joined are the text again.

A unit is `[one space][word][punctuation]`. Words are cut at Unicode word boundaries, around every punctuation character
(class P), and between a lower-case and an upper-case letter. A run of two or more spaces is a unit of its own, and so is any
other whitespace or control character (a carriage return joins the line feed after it).

Source: Neitemeier et al. 2025 (HAT); the rule of the public splitter (hat-splitter).

Differs: Unicode's word boundaries (UAX 29) come from general categories and a few blocks of scripts without spaces, since
Python's library has no table of them; sequences of joined emoji fall apart.
"""

from __future__ import annotations

import functools
import re
import unicodedata

# Scripts written without spaces, where Unicode's default rules put a boundary after each character.
_ALONE = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3041, 0x3096), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip

# Over classes, one letter a character: u, l other letters and digits w; x extends what comes before; i and y stand alone;
# p punctuation; s space; r, n carriage return and line feed; o other whitespace and controls.
_WORD = "[ulw](?:[xlw]|(?<!l)u)*|[iy]x*"
_UNIT = re.compile(rf"ss+|rn|[rno]|s?(?:{_WORD})(?:px*)*|s?(?:px*)+|s|x+")


def split(text: str) -> list[str]:
    """The units of `text`, in order."""
    classes = "".join(map(_class, text))
    return [text[match.start() : match.end()] for match in _UNIT.finditer(classes)]


def split_with_limit(text: str, max_bytes: int) -> list[bytes]:
    """The units of `text` as UTF-8; longer ones are cut between characters into pieces of at most `max_bytes`.

    Raises:
      ValueError: a single character may be longer than the limit.
    """
    if max_bytes < 4:
        raise ValueError(f"a character of UTF-8 takes up to 4 bytes, so the limit must be at least 4; got {max_bytes}")
    pieces = []
    for unit in split(text):
        piece = b""
        for character in unit:
            encoded = character.encode("utf-8", errors="surrogateescape")
            if len(piece) + len(encoded) > max_bytes:
                pieces.append(piece)
                piece = b""
            piece += encoded
        pieces.append(piece)
    return pieces


@functools.lru_cache(maxsize=1 << 14)
def _class(character: str) -> str:
    """The class of one character, see `_WORD`."""
    if character in " \r\n":
        return {" ": "s", "\r": "r", "\n": "n"}[character]
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return "x"
    if category[0] in "LN" and any(first <= ord(character) <= last for first, last in _ALONE):
        return "i"
    simple = {"Lu": "u", "Lt": "u", "Ll": "l", "Zs": "o", "Zl": "o", "Zp": "o", "Cc": "o"}
    return simple.get(category) or {"L": "w", "N": "w", "P": "p"}.get(category[0], "y")
