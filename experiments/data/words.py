# SPDX-License-Identifier: Apache-2.0
"""Words of a text in any language: where they stand, how frequent they are, and which are one typing error apart.

A word is a run of letters and combining marks (Unicode categories L and M). Scripts that leave no space between words
have no such runs of a useful length; theirs are cut every two characters. Bytes that are no UTF-8 belong to no word.
Letters: W words of a text.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import unicodedata
from collections.abc import Iterable

import numpy as np

_ERRORS = "surrogateescape"
_ESCAPED = (0xDC80, 0xDD00)  # code points that stand for one undecodable byte each
# Thai and Lao, Myanmar, Khmer, kana, ideographs.
_SPACELESS = (
    (0xE00, 0xF00),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
    (0x3040, 0x3100),
    (0x3400, 0xA000),
    (0x20000, 0x32000),
)
_PIECE = 2  # characters of a word in those scripts
_RARE = 1  # words that occur no oftener may be errors of the text itself


def encode(text: str) -> bytes:
    """Returns the bytes of a text, also of those that were no UTF-8."""
    return text.encode("utf-8", errors=_ERRORS)


def find_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns where words start and where they end, `[W]` each, in characters and in order."""
    codes = _codes(text)
    is_letter = np.zeros(0x110000, bool)
    is_letter[[ord(c) for c in set(text) if unicodedata.category(c)[0] in "LM"]] = True
    edges = np.diff(is_letter[codes].astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    spaceless = np.flatnonzero(_lies_in(codes, _SPACELESS) & is_letter[codes])
    offset = spaceless - starts[np.searchsorted(starts, spaceless, side="right") - 1]
    cuts = spaceless[(offset > 0) & (offset % _PIECE == 0)]
    return np.sort(np.append(starts, cuts)), np.sort(np.append(ends, cuts))


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _lies_in(codes: np.ndarray, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    return functools.reduce(np.logical_or, ((codes >= low) & (codes < high) for low, high in ranges))


def _byte_places(text: str) -> np.ndarray:
    """Returns the byte at which each character starts, and where the last one ends."""
    codes = _codes(text)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[_lies_in(codes, (_ESCAPED,))] = 1
    return np.append(0, np.cumsum(sizes))


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text and its words.

    Attributes:
      text: undecodable bytes as lone surrogates, which `encode` turns back.
      starts, ends: of the words, `[W]`, in characters.
      first_byte, last_byte: of the words, `[W]`, in bytes; the last is exclusive.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray
    first_byte: np.ndarray
    last_byte: np.ndarray

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> Corpus:
        """Finds the words of a text, given as uint8 `[bytes]`."""
        text = data.tobytes().decode("utf-8", errors=_ERRORS)
        starts, ends = find_words(text)
        places = _byte_places(text)
        return cls(text, starts, ends, places[starts], places[ends])

    def __len__(self) -> int:
        """Number of words, W."""
        return len(self.starts)

    def word(self, index: int) -> str:
        """The word with this number."""
        return self.text[self.starts[index] : self.ends[index]]

    @functools.cached_property
    def words(self) -> list[str]:
        """All words in order."""
        return [self.text[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


class Vocabulary:
    """The most frequent words of a corpus; words that occur only once are left out.

    Attributes:
      words: the most frequent first, ties in alphabetic order.
    """

    def __init__(self, corpus: Corpus, size: int) -> None:
        """Counts the words of a corpus and keeps `size` of them.

        Raises:
          ValueError: the size is not positive, or fewer than two words occur more than once.
        """
        if size < 2:
            raise ValueError(f"vocabulary={size} must be at least 2 words")
        counts = collections.Counter(corpus.words)
        ranked = sorted((-count, word) for word, count in counts.items() if count > _RARE)
        if len(ranked) < 2:
            raise ValueError(
                f"the text has {len(corpus)} words, of which {len(ranked)} occur more than once; a vocabulary needs at "
                "least 2 such words: give more text"
            )
        self.words = tuple(word for _, word in ranked[:size])

    def __contains__(self, word: str) -> bool:
        """Whether it is one of the words."""
        return word in self._members

    @functools.cached_property
    def _members(self) -> frozenset[str]:
        return frozenset(self.words)

    @functools.cached_property
    def _with_gap(self) -> dict[tuple[int, str], list[str]]:
        """Words by what is left of them without the character at a place, with that place."""
        found = collections.defaultdict(list)
        for word in self.words:
            for place in range(len(word)):
                found[place, word[:place] + word[place + 1 :]].append(word)
        return dict(found)

    def neighbours(self, word: str) -> list[str]:
        """Returns the words of the vocabulary that one swap, insertion, deletion or replacement makes of `word`, sorted."""
        found = set()
        for place in range(len(word) + 1):
            found.update(self._with_gap.get((place, word), ()))
            rest = word[:place] + word[place + 1 :]
            found.update(self._with_gap.get((place, rest), ()))
            found.update({rest, swapped(word, place)} & self._members)
        return sorted(found - {word})


def swapped(word: str, place: int) -> str:
    """Returns a word with the characters at `place` and after it exchanged, if there are both."""
    return word[:place] + word[place + 1 : place + 2] + word[place : place + 1] + word[place + 2 :]
