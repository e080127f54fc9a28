# SPDX-License-Identifier: Apache-2.0
"""The keys of `config.data`, by source, with their defaults; anything else is refused with the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from experiments.data import span_corruption

_COMMON = {
    "source": "",
    "seed": 0,  # of the data set itself and of what evaluation draws; the run's seed orders and augments
    "threads": 2,  # that make batches ahead; 0 makes each batch when it is asked for
    "prefetch": 4,  # batches made ahead
    "workers": 0,  # processes that make batches ahead; 0: only threads
}
_DIGITS = {
    "image_size": 64,
    "channels": 1,
    "digits": 1,
    "scale": (0.25, 0.5),
    "clutter": 8,
    "background": 0.2,
    "noise": 0.1,
    "examples": 20000,
    "valid_examples": 2000,  # also of the test split
    "cache": False,
}
_MOVING = {**_DIGITS, "image_size": 32, "frames": 8, "speed": (0.5, 2.0), "examples": 10000, "valid_examples": 1000}
_IMAGES = {
    "image_size": 32,
    "channels": 3,
    "mean": (0.5,),
    "std": (0.5,),
    "flip": True,
    "crop": "pad",
    "crop_padding": 4,
}
_TFDS = {"name": "", "data_dir": "", "train_split": "train[:95%]", "valid_split": "train[95%:]", "test_split": "test"}
_PATHS = {"path": "", "valid_path": "", "test_path": "", "valid_fraction": 0.05}
_SOURCES = {
    "digits": _DIGITS,
    "moving_digits": _MOVING,
    "tfds_images": {**_TFDS, "image_key": "image", "label_key": "label", **_IMAGES},
    "image_folder": {**_PATHS, **_IMAGES},
    "text": {"text": "books", "objective": "span_corruption", "max_bytes": 0},
    "diagnostic": {
        "diagnostic": "vowel_removal",
        "length": 64,  # ids of a row, with "#" and eos
        "examples": 1_280_000,
        "valid_examples": 16_000,  # also of the test split
    },
    "characters": {
        "characters": "spelling_correction",
        "text": "books",
        "max_bytes": 10_000_000,  # of each split's text; words are found in all of it
        "vocabulary": 20_000,  # most frequent words of the training text
    },
    "pairs": {"pairs": "xnli", "truncation": "end"},
}
_TEXTS = {
    "books": {"valid_fraction": 0.05},  # two novels: the same text on every machine
    "stdlib": {"valid_fraction": 0.05},  # of the running Python: more text, another one with each version
    "files": {**_PATHS, "file_prefix": ""},
    "tfds": {**_TFDS, "field": "text"},
    "languages": {
        "path": "",
        "include": "",  # keeps files whose name matches this glob
        "languages": (),  # of training; empty: all that are found
        "eval_languages": (),  # of validation and test; empty: those of training
        "eval_examples": 0,  # of each language; 0: as many as the smallest language has windows
        "valid_fraction": 0.05,
    },
}
_OBJECTIVES = {
    "span_corruption": {"inputs_length": 1024, "noise_density": 0.15, "mean_span": 20.0},
    "next_byte": {"context": 512, "targets_length": 512},  # for encoder-decoder models
    "next_token": {"length": 256},  # for decoder-only models
    "next_subword": {"length": 256, "tokenizer": ""},  # the same in the ids of a tokenizer.json
}
_CHARACTERS = {
    "spelling_correction": {"inputs_length": 64, "targets_length": 64, "errors": 1, "dependent": 0.5},
    "word_search": {"inputs_length": 128, "targets_length": 16, "held_out": 0.1, "overlap": 0.5, "distractors": 3},
}
_PAIRS = {
    "xnli": {
        "name": "xnli",
        "train_name": "multi_nli",  # XNLI has no training split; "" reads `train_split` of `name`
        "data_dir": "",
        "train_split": "train",
        "valid_split": "validation",
        "test_split": "test",
        "languages": ("en",),
        "eval_languages": (),  # empty: all
        "inputs_length": 1024,
        "targets_length": 2,
    },
    "tydi_qa": {
        "name": "tydi_qa/goldp",
        "data_dir": "",
        "train_split": "train[:80%]",
        "valid_split": "train[80%:]",
        "test_split": "validation",
        "languages": (),  # empty: all
        "eval_languages": (),
        "inputs_length": 2048,
        "targets_length": 128,
    },
}
# What a source leaves to choose: a key, and the keys that come with each of its values.
_CHOICES = {
    "text": {"text": _TEXTS, "objective": _OBJECTIVES},
    "characters": {
        "characters": _CHARACTERS,
        "text": {name: keys for name, keys in _TEXTS.items() if name != "languages"},
    },
    "pairs": {"pairs": _PAIRS},
}

SOURCES = tuple(_SOURCES)
TEXTS = tuple(_TEXTS)
OBJECTIVES = tuple(_OBJECTIVES)
# Objectives of decoder-only models.
NEXT_TOKEN = ("next_token", "next_subword")


def _choose(key: str, value: Any, valid: Iterable[str]) -> str:
    """Returns `value` if it is one of `valid`, else raises ValueError with the nearest and all valid ones."""
    valid = tuple(valid)
    if value in valid:
        return value
    raise ValueError(f"unknown {key}={value!r}{_nearest(value, valid)}; valid: {', '.join(valid)}")


def _nearest(value: Any, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that are valid beside the choices that `config` makes, with their defaults."""
    source = _choose("data.source", config.get("source", ""), SOURCES)
    keys = {**_COMMON, **_SOURCES[source]}
    for choice, options in _CHOICES.get(source, {}).items():
        keys |= options[_choose(f"data.{choice}", config.get(choice, keys[choice]), options)]
    return keys


def _checked(key: str, value: Any, default: Any) -> Any:
    """Returns `value` in the type of `default`, or raises ValueError when it is of another kind."""
    if isinstance(default, tuple) or key in ("path", "valid_path", "test_path"):
        return tuple(value) if isinstance(value, list) else value
    kinds = {bool: bool, int: int, float: (int, float), str: str}[type(default)]
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"data.{key}={value!r} must be of type {type(default).__name__}, as its default {default!r}")
    return float(value) if isinstance(default, float) else value


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns `config.data` with every key that applies to its source, defaults filled in.

    Call it in `get_config`, so that each key can be overridden on the command line and stands in the run's record.

    Raises:
      ValueError: source, text or objective is unknown, a key does not belong to them, or a value has another type.
    """
    given = dict(config.items())
    keys = _defaults(given)
    for key in given:
        if key in keys:
            continue
        chosen = "/".join(str({**keys, **given}[k]) for k in ("source", *_CHOICES.get(given["source"], ())))
        raise ValueError(f"unknown key data.{key}{_nearest(key, keys)}; valid for {chosen}: {', '.join(sorted(keys))}")
    return ml_collections.ConfigDict(
        {key: _checked(key, given.get(key, default), default) for key, default in keys.items()}
    )


def lengths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (N, T), the lengths of `input_ids` and `labels` in the batches that a resolved `config.data` describes.

    Raises:
      ValueError: the source has no pairs of byte sequences, or an objective's lengths do not fit together.
    """
    source = config["source"]
    if source == "text" and config["objective"] == "span_corruption":
        inputs = config["inputs_length"]
        return inputs, span_corruption.lengths(inputs, config["noise_density"], config["mean_span"])[1]
    if source == "text" and config["objective"] in NEXT_TOKEN:
        return config["length"], config["length"]
    if source == "text":
        return config["context"], config["targets_length"]
    if source == "diagnostic":
        return config["length"], config["length"]
    if source in ("characters", "pairs"):
        return config["inputs_length"], config["targets_length"]
    raise ValueError(
        f"data.source={source!r} gives no sequences of bytes; those that do: text, diagnostic, characters, pairs"
    )
