# SPDX-License-Identifier: Apache-2.0
"""Text in several languages, from files whose names begin with the language: `LANG_name.txt` or `LANG_name.txt.gz`.

A language is two or three small letters, with subtags where wanted, as in `de` or `zh-Latn`.
Windows never cross languages. Training draws the language of each example uniformly; evaluation gives each language as
many windows, spread evenly over its text. Nothing is decoded: bytes that are no valid text are data like any other.
Letters: B batch, G languages.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container, Mapping, Sequence

import numpy as np
from etils import epath

from experiments.data import byte_vocab, text
from experiments.data.splits import check_fraction, check_split

# "en_books.train.txt.gz", "zh-Latn_web.txt": language, and the split where the name has one.
_NAME = re.compile(r"(?P<language>[a-z]{2,3}(-[A-Za-z0-9]+)*)_.*?(\.(?P<split>train|valid|test))?\.txt(\.gz)?")

Files = dict[str, list[epath.Path]]


def find_languages(path: str | Sequence[str], *, include: str = "") -> Files:
    """Returns the files of each language below `path`, languages and files in order.

    Args:
      path: as in `text.find_files`; files of other names are left out.
      include: keeps files whose name matches this glob, such as `"*_ud.*"`; empty for all.

    Raises:
      ValueError: no file matches.
    """
    found: Files = {}
    for file in text.find_files(path):
        match = _NAME.fullmatch(file.name)
        if match and fnmatch.fnmatchcase(file.name, include or "*"):
            found.setdefault(match["language"], []).append(file)
    if not found:
        chosen = f" and matches {include!r}" if include else ""
        raise ValueError(f"no file under {path!r} is named LANGUAGE_*.txt or LANGUAGE_*.txt.gz{chosen}")
    return dict(sorted(found.items()))


def choose(wanted: Sequence[str], found: Sequence[str], *, key: str) -> tuple[str, ...]:
    """Returns the wanted languages in alphabetic order; all that are found when none is named.

    Raises:
      ValueError: a language is not found; `key` is the config key to correct.
    """
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise ValueError(f"data.{key} names {', '.join(unknown)}; the languages found are {', '.join(sorted(found))}")
    return tuple(sorted(set(wanted or found)))


def read_language(
    files: Sequence[epath.Path], *, split: str, valid_fraction: float = 0.05, max_bytes: int = 0
) -> np.ndarray:
    """Returns the bytes of one split of a language's files as uint8 `[bytes]`, files joined by newlines.

    Files named `.train.`, `.valid.` and `.test.` belong to those splits. Without test files each validation file is
    halved, for validation and for the test; without validation files either, each training file is divided as
    `text.from_files` does. A file without such a name is a training file.

    Args:
      files: of one language.
      split: `"train"`, `"valid"` or `"test"`.
      valid_fraction: share of each file that is held out for each of validation and test where no file is for them.
      max_bytes: keeps at most so much; 0 for no limit.

    Raises:
      ValueError: unknown split or wrong fraction, no byte in the split, or a damaged .gz file.
    """
    check_split(split)
    check_fraction(valid_fraction)
    by_split: Files = {}
    for file in files:
        by_split.setdefault(_NAME.fullmatch(file.name)["split"] or "train", []).append(file)
    source, part = _source(by_split, split, valid_fraction)
    what = f"the {split} split of {', '.join(file.name for file in files)}"
    documents = (text.read_file(file) for file in by_split.get(source, ()))
    parts = (document[int(part[0] * len(document)) : int(part[1] * len(document))] for document in documents)
    return text.concatenate(text.capped(parts, max_bytes, what), what=what)


def _source(named: Container[str], split: str, valid_fraction: float) -> tuple[str, tuple[float, float]]:
    """Returns which files a split is read from, and which part of each, as shares; `named` are the splits with files."""
    if split == "test" and "test" in named:
        return "test", (0.0, 1.0)
    if "valid" in named:
        half = 1.0 if "test" in named else 0.5
        return {"train": ("train", (0.0, 1.0)), "valid": ("valid", (0.0, half)), "test": ("valid", (half, 1.0))}[split]
    first, second = 1 - 2 * valid_fraction, 1 - valid_fraction
    return "train", {"train": (0.0, first), "valid": (first, second), "test": (second, 1.0)}[split]


class LanguageSource:
    """Windows of the texts of G languages; examples `i * G` to `i * G + G - 1` are the i-th window of each.

    Attributes:
      names: of the languages, as `language` in a batch indexes them.
      together: G; evaluation keeps these examples in one another's neighbourhood.
    """

    def __init__(
        self,
        texts: Mapping[str, np.ndarray],
        objective: text.Objective,
        *,
        names: Sequence[str],
        examples: int = 0,
    ) -> None:
        """Takes uint8 `[bytes]` for each language, and an objective.

        Args:
          texts: of the languages of this split.
          objective: makes examples from windows.
          names: all languages of the data set, to number those of `texts`.
          examples: windows of each language; 0 for as many as the smallest language has side by side.

        Raises:
          ValueError: a language has less text than one window, or `examples` is negative.
        """
        if examples < 0:
            raise ValueError(
                f"eval_examples={examples} must be positive, or 0 for as many as the smallest language has"
            )
        self._window = objective.window
        for language, data in texts.items():
            if data.size < self._window:
                raise ValueError(
                    f"the text in {language!r} has {data.size} bytes but one example needs {self._window}; give more text "
                    "(or a larger valid_fraction), leave the language out, or make the examples shorter"
                )
        self.names = tuple(names)
        self.together = len(texts)
        self._ids = np.array([self.names.index(language) for language in texts], np.int32)
        self._texts = list(texts.values())
        self._objective = objective
        self._examples = examples or min(data.size for data in self._texts) // self._window

    def __len__(self) -> int:
        """Number of windows, all languages together."""
        return self._examples * self.together

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns the objective's examples for `indices [B]`, and `language [B]` int32, an index of `names`.

        With `augment` language and window of each row are drawn from its entropy `[B, E]`; the index then says nothing.
        """
        rngs = [np.random.default_rng(row) for row in entropy]
        if augment:
            languages = np.array([rng.integers(self.together) for rng in rngs])
        else:
            languages = indices % self.together
        last = np.array([self._texts[language].size - self._window for language in languages])
        if augment:
            starts = np.array([rng.integers(end, endpoint=True) for rng, end in zip(rngs, last, strict=True)])
        else:
            starts = indices // self.together * last // max(self._examples - 1, 1)
        places = zip(languages, starts, strict=True)
        windows = np.stack([self._texts[language][start : start + self._window] for language, start in places])
        return {**self._objective.examples(byte_vocab.encode(windows), rngs), "language": self._ids[languages]}
