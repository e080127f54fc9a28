# SPDX-License-Identifier: Apache-2.0
"""Question and answer as two strings, from prepared TFDS sets: XNLI and TyDi QA in its gold passage form.

Letters: B batch, N ids of the encoder, T ids of the decoder. Texts are bytes throughout and are never decoded.

Source: Kallini et al. 2025 (MrT5); strings and lengths are those of the authors' data collator.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data import byte_vocab, tfds_source
from experiments.data.languages import choose

_TRUNCATIONS = ("end", "refuse")
_CLASSES = 3
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
# As TyDi QA writes them at the head of an example's id.
_TYDI_NAMES = {
    "ar": "arabic",
    "bn": "bengali",
    "en": "english",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}
TYDI_LANGUAGES = tuple(_TYDI_NAMES)
_TYDI_CODES = {name: code for code, name in _TYDI_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """How strings become rows of ids.

    Attributes:
      inputs_length, targets_length: N and T, with the final eos.
      truncation: of strings that are too long: `"end"` cuts their end off, wherever that falls; `"refuse"` raises.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    inputs_length: int = 1024
    targets_length: int = 128
    truncation: str = "end"

    def __post_init__(self) -> None:
        for name in ("inputs_length", "targets_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2: one byte and eos")
        if self.truncation not in _TRUNCATIONS:
            raise ValueError(f"truncation={self.truncation!r} must be one of {', '.join(_TRUNCATIONS)}")

    def fitted(self, string: bytes, length: int) -> bytes:
        """Returns a string that fits with its eos.

        Raises:
          ValueError: it does not, and is not to be cut.
        """
        if self.truncation == "refuse" and len(string) >= length:
            raise ValueError(
                f"a string of {len(string)} bytes and its eos do not fit into {length} ids: raise the length, or set "
                f"data.truncation='end'; it begins {string[:60]!r}"
            )
        return string[: length - 1]


class _PairSource(abc.ABC):
    """Examples from `_pairs(indices) -> [(input, target, number of the language)]`."""

    def __init__(self, options: PairOptions) -> None:
        self._options = options

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def _pairs(self, indices: Sequence[int]) -> list[tuple[bytes, bytes, int]]:
        """Returns input, target and number of the language of some examples."""

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns the sequences of `byte_vocab.pack_pairs` and `language [B]` int32; nothing is random."""
        del entropy, augment
        inputs, targets, languages = zip(*self._pairs([int(i) for i in indices]), strict=True)
        sizes = dict(inputs_length=self._options.inputs_length, targets_length=self._options.targets_length)
        inputs = [self._options.fitted(string, sizes["inputs_length"]) for string in inputs]
        targets = [self._options.fitted(string, sizes["targets_length"]) for string in targets]
        return {**byte_vocab.pack_pairs(inputs, targets, **sizes), "language": np.array(languages, np.int32)}


class Xnli(_PairSource):
    """Natural language inference: "Premise: P Hypothesis: H", and "0", "1" or "2" for entailment, neutral, contradiction.

    Read from `xnli` or `xtreme_xnli` of TFDS, whose records hold a pair in many languages: examples `i * G` to
    `i * G + G - 1` are record i in the G chosen ones. A set whose texts are plain strings, such as `multi_nli`, on
    whose English the published models are trained, has one language.

    Attributes:
      together: G.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: str = "",
        split: str,
        languages: Sequence[str] = (),
        key: str = "languages",
        options: PairOptions | None = None,
    ) -> None:
        """Opens a split, given in TFDS notation.

        Args:
          name: the set, with version where wanted.
          data_dir: folder of prepared sets; empty for the usual one.
          split: a split in TFDS notation.
          languages: a choice; empty for all that the set has. A set of plain strings needs exactly one.
          key: the config key of the choice, for messages.
          options: how strings become rows.

        Raises:
          ValueError: set, split, field or language is missing, or several languages are asked of a set of one.
        """
        super().__init__(options or PairOptions(targets_length=2))
        self._source = tfds_source.open_split(name, data_dir=data_dir, split=split)
        for field in ("premise", "hypothesis", "label"):
            tfds_source.require_field(self._source, field, name=name, option="name")
        premise = self._source[0]["premise"]
        self._plain = not isinstance(premise, Mapping)
        if self._plain and len(languages) != 1:
            raise ValueError(
                f"TFDS set {name!r} holds texts in one language, which data.{key} must name alone; got {tuple(languages)}"
            )
        self._languages = choose(languages, XNLI_LANGUAGES if self._plain else tuple(premise), key=key)
        self._ids = [XNLI_LANGUAGES.index(language) for language in self._languages]
        self.together = len(self._languages)

    def __len__(self) -> int:
        """Number of examples, all languages together."""
        return len(self._source) * self.together

    def _pairs(self, indices: Sequence[int]) -> list[tuple[bytes, bytes, int]]:
        records = self._source.__getitems__([index // self.together for index in indices])
        return [self._pair(record, i % self.together) for record, i in zip(records, indices, strict=True)]

    def _pair(self, record: Mapping[str, Any], number: int) -> tuple[bytes, bytes, int]:
        label = int(record["label"])
        if not 0 <= label < _CLASSES:
            raise ValueError(
                f"label {label} of an inference pair is not in 0..{_CLASSES - 1}; leave unlabelled splits out"
            )
        premise, hypothesis = record["premise"], record["hypothesis"]
        if not self._plain:
            language = self._languages[number]
            translations = dict(zip(hypothesis["language"], hypothesis["translation"], strict=True))
            premise, hypothesis = premise[language], translations[language.encode()]
        text = b"Premise: " + premise + b" Hypothesis: " + hypothesis
        return text, str(label).encode(), self._ids[number]


class TydiQa(_PairSource):
    """Question answering: "Question: Q Context: C", and the first answer; read from `tydi_qa/goldp` of TFDS.

    Differs: the published targets are as long as the longest answer of a batch; here they have a fixed length.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: str = "",
        split: str,
        languages: Sequence[str] = (),
        key: str = "languages",
        options: PairOptions | None = None,
    ) -> None:
        """Opens a split, given in TFDS notation; with a choice of languages it is read through once.

        Args:
          name: the set, with config and version where wanted.
          data_dir: folder of prepared sets; empty for the usual one.
          split: a split in TFDS notation.
          languages: a choice, as codes of two letters; empty for all.
          key: the config key of the choice, for messages.
          options: how strings become rows.

        Raises:
          ValueError: set, split or field is missing, or a language has no example.
        """
        super().__init__(options or PairOptions(inputs_length=2048))
        self._source = tfds_source.open_split(name, data_dir=data_dir, split=split)
        for field in ("id", "question", "context", "answers"):
            tfds_source.require_field(self._source, field, name=name, option="name")
        self._rows: Sequence[int] = range(len(self._source))
        if languages:
            codes = [_tydi_language(self._source[row]) for row in self._rows]
            chosen = choose(languages, sorted(set(codes)), key=key)
            self._rows = [row for row, code in enumerate(codes) if code in chosen]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    def answers(self, index: int) -> list[str]:
        """Returns all accepted answers of an example, which generated ones are scored against (see `tasks.qa`)."""
        texts = self._source[self._rows[index]]["answers"]["text"]
        return [text.decode("utf-8", errors="replace") for text in texts]

    def _pairs(self, indices: Sequence[int]) -> list[tuple[bytes, bytes, int]]:
        return [_tydi_pair(record) for record in self._source.__getitems__([self._rows[index] for index in indices])]


def _tydi_language(record: Mapping[str, Any]) -> str:
    """The code of the language that an example's id begins with.

    Raises:
      ValueError: the id begins with no language of TyDi QA.
    """
    name = record["id"].decode("utf-8", errors="replace").partition("-")[0]
    if name not in _TYDI_CODES:
        raise ValueError(f"the id {record['id']!r} begins with no language of TyDi QA: {', '.join(_TYDI_CODES)}")
    return _TYDI_CODES[name]


def _tydi_pair(record: Mapping[str, Any]) -> tuple[bytes, bytes, int]:
    if not record["answers"]["text"]:
        raise ValueError(f"example {record['id']!r} has no answer; the gold passage task answers every question")
    text = b"Question: " + record["question"] + b" Context: " + record["context"]
    return text, record["answers"]["text"][0], TYDI_LANGUAGES.index(_tydi_language(record))
