# SPDX-License-Identifier: Apache-2.0
"""Synthetic diagnostics: random strings of letters whose right answer leaves known bytes out.

Letters: B batch, N ids of a row with prefix and eos, S random letters (N - 2). Rows begin with "#" and end with eos.

Source: Kallini et al. 2025 (MrT5); the details are those of the authors' data script.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable

import numpy as np

from experiments.data import byte_vocab
from experiments.data.splits import SPLITS, check_split

# The published length has 62 letters; the numbers of insertions belong to it and grow with the length.
_PUBLISHED_LETTERS = 62


def _bytes(letters: str) -> np.ndarray:
    return np.frombuffer(letters.encode(), np.uint8)


_LETTERS = _bytes(string.ascii_letters)
_VOWELS = _bytes("aeiouAEIOU")
_CONSONANTS = np.setdiff1d(_LETTERS, _VOWELS)
_LOWER_CONSONANTS = np.setdiff1d(_bytes(string.ascii_lowercase), _VOWELS)
_TRIPLE = _bytes("ABC")


def _is_one_of(letters: np.ndarray) -> np.ndarray:
    table = np.zeros(256, bool)
    table[letters] = True
    return table


_IS_VOWEL = _is_one_of(_VOWELS)
_IS_LOWER_CONSONANT = _is_one_of(_LOWER_CONSONANTS)


def without_vowels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(rows, keep)` for rows of letters `[B, S]` uint8: every vowel, small or capital, is left out."""
    return rows, ~_IS_VOWEL[rows]


def without_contextual_vowels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(rows, keep)` for rows `[B, S]` uint8: a vowel is left out only after a lower-case consonant."""
    follows = np.zeros(rows.shape, bool)
    follows[:, 1:] = _IS_LOWER_CONSONANT[rows[:, :-1]]
    return rows, ~(_IS_VOWEL[rows] & follows)


def merged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(rows, keep)` for rows `[B, S]` uint8: each "ABC" becomes one "D"."""
    first = np.zeros(rows.shape, bool)
    first[:, :-2] = (rows[:, :-2] == ord("A")) & (rows[:, 1:-1] == ord("B")) & (rows[:, 2:] == ord("C"))
    keep = np.ones(rows.shape, bool)
    keep[:, 1:] &= ~first[:, :-1]
    keep[:, 2:] &= ~first[:, :-2]
    return np.where(first, np.uint8(ord("D")), rows), keep


def copied(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(rows, keep)` for rows `[B, S]` uint8 that stay as they are."""
    return rows, np.ones(rows.shape, bool)


def _random_pairs(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.stack([rng.choice(_CONSONANTS, count), rng.choice(_VOWELS, count)], axis=1)


def _same_triples(rng: np.random.Generator, count: int) -> np.ndarray:
    del rng
    return np.broadcast_to(_TRIPLE, (count, _TRIPLE.size))


@dataclasses.dataclass(frozen=True)
class _Task:
    """How the answer follows from letters, and what is inserted into them.

    `pieces(rng, count)` gives `count` pieces of `width` letters; about `inserted` of them stand among 62 letters.
    """

    answer: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    pieces: Callable[[np.random.Generator, int], np.ndarray] | None = None
    width: int = 0
    inserted: int = 0


_TASKS = {
    "vowel_removal": _Task(without_vowels),
    "contextual_vowel_removal": _Task(without_contextual_vowels, _random_pairs, 2, 25),
    "sequence_merge": _Task(merged, _same_triples, 3, 5),
    "copy": _Task(copied),
}
DIAGNOSTICS = tuple(_TASKS)


def _free_places(order: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Returns `[B, P]` bool, the starts of at most `counts [B]` insertions of `width` letters that do not overlap.

    Places are tried in the order of `order [B, P]` until there are enough or none is left.
    """
    row = np.arange(len(order))
    chosen = np.zeros(order.shape, bool)
    blocked = np.zeros((len(order), order.shape[1] + 2 * (width - 1)), bool)
    left = counts.copy()
    for place in order.T:
        free = (left > 0) & ~blocked[row, place + width - 1]
        chosen[row, place] = free
        left -= free
        for shift in range(2 * width - 1):
            blocked[row, place + shift] |= free
    return chosen


class Diagnostic:
    """Examples made from their index, the data set's seed and the split; nothing is stored.

    Differs: insertions are placed by trying every position once in random order, where the authors draw positions with
    replacement at most 501 times; at lengths other than 64 their number is scaled with the number of letters.
    """

    def __init__(self, diagnostic: str, split: str, examples: int, *, length: int = 64, seed: int = 0) -> None:
        """Takes a name of `DIAGNOSTICS`, a split, its number of examples, and N.

        Raises:
          ValueError: no such diagnostic or split, no example, or a length too short for what is inserted.
        """
        check_split(split)
        if diagnostic not in _TASKS:
            raise ValueError(f"unknown data.diagnostic={diagnostic!r}; valid: {', '.join(DIAGNOSTICS)}")
        if examples < 1:
            raise ValueError(f"examples={examples} must be at least 1")
        self._task = _TASKS[diagnostic]
        shortest = self._task.width + 3
        if length < shortest:
            raise ValueError(
                f"length={length} must be at least {shortest} for {diagnostic}: '#', {shortest - 2} letters and eos"
            )
        self._examples = examples
        self._length = length
        self._stream = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        """Number of examples."""
        return self._examples

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `decoder_input_ids` and `labels`, all `[B, N]` int32; an example depends on its index alone."""
        del entropy, augment
        letters = self._letters(indices)
        rows, keep = self._task.answer(letters)
        order = np.argsort(~keep, axis=1, kind="stable")
        packed = np.take_along_axis(rows, order, axis=1)
        labels = self._ids(packed, np.sum(keep, axis=1))
        return {
            "input_ids": self._ids(letters, np.full(len(indices), letters.shape[1])),
            "decoder_input_ids": byte_vocab.shift_right(labels),
            "labels": labels,
        }

    def _letters(self, indices: np.ndarray) -> np.ndarray:
        """Random letters `[B, S]` uint8 with what the task inserts."""
        rngs = [np.random.default_rng((*self._stream, int(index))) for index in indices]
        count = self._length - 2
        letters = _LETTERS[np.stack([rng.integers(0, _LETTERS.size, count) for rng in rngs])]
        if self._task.pieces is None:
            return letters
        width = self._task.width
        mean = self._task.inserted * count / _PUBLISHED_LETTERS
        counts = np.array([max(1, int(rng.normal(mean, mean / 2))) for rng in rngs])
        # As in the authors' script, nothing is inserted at the very end.
        order = np.stack([rng.permutation(count - width) for rng in rngs])
        pieces = np.stack([self._task.pieces(rng, count) for rng in rngs])
        row, place = np.nonzero(_free_places(order, counts, width))
        letters[row[:, None], place[:, None] + np.arange(width)] = pieces[row, place]
        return letters

    def _ids(self, letters: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Rows `[B, N]` int32 of "#", the first `counts [B]` letters, eos and padding."""
        ids = np.zeros((len(letters), self._length), np.int32)
        ids[:, 0] = ord("#") + byte_vocab.OFFSET
        kept = np.arange(letters.shape[1]) < counts[:, None]
        ids[:, 1:-1] = np.where(kept, byte_vocab.encode(letters), 0)
        ids[np.arange(len(letters)), counts + 1] = byte_vocab.EOS
        return ids
