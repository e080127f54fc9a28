# SPDX-License-Identifier: Apache-2.0
"""Word search, generated from any text: a clue, a string of letters that hides several words, and the one that is meant.

Letters: B batch, N ids of the encoder, T ids of the decoder.

Source: Kallini et al. 2025 (MrT5), on the data of Huang et al. 2023, whose inputs have the form "clue: letters"
with words written forwards or backwards; the lengths are those of the authors' scripts.
Differs: a reconstruction. Definitions and paraphrases are not at hand, so the clue is the words that stand around the
hidden word in the text; there are no paraphrase kinds, and which words are held out is decided by a hash.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from experiments.data import byte_vocab
from experiments.data.splits import place_of
from experiments.data.words import Corpus, Vocabulary, encode

KINDS = ("plain", "overlap", "oov", "oov_overlap")
_CLUE = (-2, -1, 1, 2)  # words of the clue, counted from the hidden one
_SHORTEST = 3  # bytes of a hidden word, which has two characters or more
_COLON = b": "


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What one example is.

    Attributes:
      inputs_length, targets_length: N and T, with the final eos.
      held_out: share of all words that occur nowhere in training.
      overlap: share of the examples in which the hidden word should share a letter with the word before it.
      distractors: words that are hidden beside the one that is meant, as far as they fit.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    inputs_length: int = 128
    targets_length: int = 16
    held_out: float = 0.1
    overlap: float = 0.5
    distractors: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} is a share of the words and must lie in [0, 1)")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap={self.overlap} is a share of the examples and must lie in 0..1")
        if self.distractors < 1:
            raise ValueError(f"distractors={self.distractors} must be at least 1")
        if self.targets_length < _SHORTEST + 1:
            raise ValueError(f"targets_length={self.targets_length} must be at least {_SHORTEST + 1}")
        # Half for the clue; in the other half a distractor and the hidden word.
        shortest = 2 * (2 * self.targets_length + len(_COLON))
        if self.inputs_length < shortest:
            raise ValueError(
                f"inputs_length={self.inputs_length} must be at least {shortest} for targets_length={self.targets_length}"
            )


class WordSearch:
    """One example for each distinct word of a text; where it stands is drawn anew each time."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, options: SearchOptions, *, train: bool) -> None:
        """Takes a split's text, the vocabulary of the training text, and whether held-out words are left out.

        Raises:
          ValueError: fewer than two words of the text, or of the vocabulary, can be hidden.
        """
        self._corpus = corpus
        self._options = options
        self._known = [word for word in vocabulary.words if self._fits(word) and not self._held_out(word)]
        known = frozenset(self._known)
        self._occurrences = collections.defaultdict(list)
        for place, word in enumerate(corpus.words):
            if word in known or (not train and self._fits(word)):
                self._occurrences[word].append(place)
        self._words = sorted(self._occurrences)
        self._is_known = known.__contains__
        if min(len(self._words), len(self._known)) < 2:
            raise ValueError(
                f"the text has {len(self._words)} words to hide and its vocabulary {len(self._known)}; at least 2 of each "
                f"are needed, of 2 characters or more and {_SHORTEST} to {options.targets_length - 1} bytes: give more text"
            )
        self._ending = collections.defaultdict(list)
        for word in self._known:
            self._ending[word[-1]].append(word)
            self._ending[word[0]].append(word[::-1])

    def __len__(self) -> int:
        """Number of distinct words."""
        return len(self._words)

    def _fits(self, word: str) -> bool:
        return len(word) > 1 and _SHORTEST <= len(word.encode()) < self._options.targets_length

    def _held_out(self, word: str) -> bool:
        return place_of(word) < self._options.held_out

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns the sequences of `byte_vocab.pack_pairs` and `kind [B]` int32, an index of `KINDS`.

        `entropy [B, E]` seeds each row's occurrence, distractors and order.
        """
        del augment
        rngs = [np.random.default_rng(row) for row in entropy]
        words = [self._words[int(i)] for i in indices]
        inputs, overlaps = zip(*(self._example(word, rng) for word, rng in zip(words, rngs, strict=True)), strict=True)
        kinds = [int(overlaps[i]) + 2 * (not self._is_known(word)) for i, word in enumerate(words)]
        lengths = dict(inputs_length=self._options.inputs_length, targets_length=self._options.targets_length)
        pairs = byte_vocab.pack_pairs(inputs, [word.encode() for word in words], **lengths)
        return {**pairs, "kind": np.array(kinds, np.int32)}

    def _example(self, word: str, rng: np.random.Generator) -> tuple[bytes, bool]:
        """Returns the input and whether the hidden word shares a letter."""
        places = self._occurrences[word]
        clue = self._clue(places[int(rng.integers(len(places)))], word)
        room = self._options.inputs_length - 1 - len(clue) - len(_COLON)
        hidden = _either_way(word, rng)
        before = self._ending.get(hidden[0], ()) if rng.random() < self._options.overlap else ()
        if before:
            hidden = before[int(rng.integers(len(before)))][:-1] + hidden
        pieces, room = [hidden], room - len(hidden.encode())
        for _ in range(self._options.distractors - bool(before)):
            piece = _either_way(self._known[int(rng.integers(len(self._known)))], rng)
            if len(piece.encode()) <= room:
                pieces.append(piece)
                room -= len(piece.encode())
        letters = "".join(pieces[i] for i in rng.permutation(len(pieces)))
        return clue + _COLON + letters.encode(), bool(before)

    def _clue(self, place: int, word: str) -> bytes:
        """Returns the words around a place, in order; without `word` itself and held-out words, and at most half of N."""
        kept, room = [], self._options.inputs_length // 2
        for step in _CLUE:
            if not 0 <= place + step < len(self._corpus):
                continue
            other = self._corpus.word(place + step)
            size = len(encode(other)) + 1
            if other != word and not self._held_out(other) and size <= room:
                kept.append(other)
                room -= size
        return encode(" ".join(kept))


def _either_way(word: str, rng: np.random.Generator) -> str:
    return word if rng.random() < 0.5 else word[::-1]
