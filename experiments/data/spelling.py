# SPDX-License-Identifier: Apache-2.0
"""Spelling correction in context, generated from any text: a piece of it with a typing error, and the piece without.

Letters: B batch, N ids of the encoder, T ids of the decoder.

Source: Kallini et al. 2025 (MrT5), on the data of Huang et al. 2023 ("the actuall name" -> "the actual name");
the lengths are those of the authors' scripts.
Differs: a reconstruction. The published pairs are not used; errors are drawn here, one character at a time, and so work
in every script. An error counts as context-dependent when what it makes is a word of the vocabulary.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data import byte_vocab
from experiments.data.words import Corpus, Vocabulary, encode, swapped

KINDS = ("independent", "dependent")
_SHORTEST = 2  # characters of a word that can carry any of the errors
_GROWTH = 4  # bytes that one error can add: a character of UTF-8
_TRIES = 20


@dataclasses.dataclass(frozen=True)
class SpellingOptions:
    """What one example is.

    Attributes:
      inputs_length, targets_length: N and T, with the final eos.
      errors: words of an example that carry an error, as far as it has so many.
      dependent: share of the examples whose errors should be words themselves, where the vocabulary allows it.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    inputs_length: int = 64
    targets_length: int = 64
    errors: int = 1
    dependent: float = 0.5

    def __post_init__(self) -> None:
        if self.errors < 1:
            raise ValueError(f"errors={self.errors} must be at least 1")
        if not 0 <= self.dependent <= 1:
            raise ValueError(f"dependent={self.dependent} is a share of the examples and must lie in 0..1")
        if self.window < 2 * _GROWTH:
            shortest = 2 * _GROWTH + 1
            raise ValueError(
                f"inputs_length={self.inputs_length}, targets_length={self.targets_length} are too short: with "
                f"errors={self.errors} at least {shortest + _GROWTH * self.errors} and {shortest} are needed"
            )

    @property
    def window(self) -> int:
        """Bytes of text that always fit, with errors on one side and eos on both."""
        return min(self.inputs_length - _GROWTH * self.errors, self.targets_length) - 1


class SpellingCorrection:
    """Pieces of a text from one word to another, with typing errors in the input; raw text stands between the words."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, options: SpellingOptions) -> None:
        """Takes a split's text and the vocabulary of the training text.

        Raises:
          ValueError: no word of the corpus has two characters and fits.
        """
        sizes = corpus.last_byte - corpus.first_byte
        self._eligible = (corpus.ends - corpus.starts >= _SHORTEST) & (sizes <= options.window)
        self._first = np.flatnonzero(self._eligible)
        if not self._first.size:
            raise ValueError(
                f"the text has no word of {_SHORTEST} characters or more and at most {options.window} bytes: "
                "give other text or longer examples"
            )
        self._first_bytes = corpus.first_byte[self._first]
        self._corpus = corpus
        self._vocabulary = vocabulary
        self._options = options

    def __len__(self) -> int:
        """Number of pieces side by side."""
        return max(int(self._corpus.last_byte[-1]) // self._options.window, 1)

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns the sequences of `byte_vocab.pack_pairs` and `kind [B]` int32, an index of `KINDS`.

        `entropy [B, E]` seeds each row's errors, and in training its shift by up to one piece.
        """
        rngs = [np.random.default_rng(row) for row in entropy]
        examples = [self._example(int(i), rng, augment) for i, rng in zip(indices, rngs, strict=True)]
        inputs, targets, kinds = zip(*examples, strict=True)
        lengths = dict(inputs_length=self._options.inputs_length, targets_length=self._options.targets_length)
        return {**byte_vocab.pack_pairs(inputs, targets, **lengths), "kind": np.array(kinds, np.int32)}

    def _example(self, index: int, rng: np.random.Generator, augment: bool) -> tuple[bytes, bytes, int]:
        window = self._options.window
        wanted = index * window + (rng.integers(1 - window, window) if augment else 0)
        first = self._first[min(np.searchsorted(self._first_bytes, wanted), len(self._first) - 1)]
        end = np.searchsorted(self._corpus.last_byte, self._corpus.first_byte[first] + window, side="right")
        places = first + np.flatnonzero(self._eligible[first:end])
        errors = self._errors(places, rng)

        start, stop = self._corpus.starts[first], self._corpus.ends[end - 1]
        pieces, at = [], start
        for place in sorted(errors):
            pieces += [self._corpus.text[at : self._corpus.starts[place]], errors[place]]
            at = self._corpus.ends[place]
        wrong = "".join(pieces) + self._corpus.text[at:stop]
        kind = all(word in self._vocabulary for word in errors.values())
        return encode(wrong), encode(self._corpus.text[start:stop]), int(kind)

    def _errors(self, places: np.ndarray, rng: np.random.Generator) -> dict[int, str]:
        """Returns what becomes of some of the words at `places`."""
        places = rng.permutation(places)
        words = self._other_words(places, rng) if rng.random() < self._options.dependent else {}
        if words:
            return words
        return {int(place): self._non_word(self._corpus.word(place), rng) for place in places[: self._options.errors]}

    def _other_words(self, places: np.ndarray, rng: np.random.Generator) -> dict[int, str]:
        """Returns words of the vocabulary in place of words that are one error away from them; empty if there are none."""
        found: dict[int, str] = {}
        for place in places:
            near = self._vocabulary.neighbours(self._corpus.word(place))
            if near:
                found[int(place)] = near[rng.integers(len(near))]
            if len(found) == self._options.errors:
                break
        return found

    def _non_word(self, word: str, rng: np.random.Generator) -> str:
        """Returns `word` with a random error; only where many tries all make words, one of these."""
        wrong = word[0] + word
        for _ in range(_TRIES):
            tried = self._random_error(word, rng)
            if tried == word:
                continue
            wrong = tried
            if wrong not in self._vocabulary:
                break
        return wrong

    def _random_error(self, word: str, rng: np.random.Generator) -> str:
        place = int(rng.integers(len(word)))
        kind = int(rng.integers(4))
        if kind == 0:
            return swapped(word, place)
        if kind == 1:
            return word[:place] + word[place + 1 :]
        # Letters as frequent as in the text: that of a random place in a random word.
        other = self._corpus.word(int(rng.integers(len(self._corpus))))
        letter = other[int(rng.integers(len(other)))]
        return word[:place] + letter + word[place + (kind == 2) :]
