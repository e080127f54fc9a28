# SPDX-License-Identifier: Apache-2.0
"""Which examples of an evaluation are also measured apart: those of one language, or of one kind.

They are known from the config and the names of files, so that a compiled evaluation has one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.data import languages, pairs, schema, spelling, word_search

_KINDS = {"spelling_correction": spelling.KINDS, "word_search": word_search.KINDS}
_PAIR_LANGUAGES = {"xnli": pairs.XNLI_LANGUAGES, "tydi_qa": pairs.TYDI_LANGUAGES}


class Group(NamedTuple):
    """The examples whose batch has `value` at `key`; metrics of them end in `/name`."""

    name: str
    key: str
    value: int


@dataclasses.dataclass(frozen=True)
class Languages:
    """Files of each language found, and the languages of training, of evaluation, and of both (`names`)."""

    files: languages.Files
    train: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All languages of the data set; their places are the numbers in a batch."""
        return tuple(sorted({*self.train, *self.evaluation}))


def choose_languages(config: Mapping[str, Any]) -> Languages:
    """Finds the files of a resolved `config.data` with `text="languages"`; evaluation without a choice takes training's.

    Raises:
      ValueError: no file matches, or a language is not found.
    """
    files = languages.find_languages(config["path"], include=config["include"])
    train = languages.choose(config["languages"], tuple(files), key="languages")
    wanted = config["eval_languages"] or train
    return Languages(files, train, languages.choose(wanted, tuple(files), key="eval_languages"))


def groups(data_config: Mapping[str, Any]) -> tuple[Group, ...]:
    """Returns the groups of the evaluation splits that `config.data` describes; none for most sources.

    Raises:
      ValueError: as `schema.resolve` and `choose_languages` do.
    """
    config = schema.resolve(data_config)
    if config.source == "characters":
        return tuple(Group(name, "kind", value) for value, name in enumerate(_KINDS[config.characters]))
    if config.source == "pairs":
        names = _PAIR_LANGUAGES[config.pairs]
        wanted = languages.choose(config.eval_languages, names, key="eval_languages")
    elif config.source == "text" and config.text == "languages":
        chosen = choose_languages(config)
        names, wanted = chosen.names, chosen.evaluation
    else:
        return ()
    return tuple(Group(name, "language", names.index(name)) for name in wanted)
