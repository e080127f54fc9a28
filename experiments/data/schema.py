# SPDX-License-Identifier: Apache-2.0
"""The keys of `config.data`, by source, with their defaults; anything else is refused with the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

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
    "text": {"text": "stdlib", "objective": "span_corruption", "max_bytes": 0},
}
_TEXTS = {
    "stdlib": {"valid_fraction": 0.05},
    "files": {**_PATHS, "file_prefix": ""},
    "tfds": {**_TFDS, "field": "text"},
}
_OBJECTIVES = {
    "span_corruption": {"inputs_length": 1024, "noise_density": 0.15, "mean_span": 20.0},
    "next_byte": {"context": 512, "targets_length": 512},
}

SOURCES = tuple(_SOURCES)
TEXTS = tuple(_TEXTS)
OBJECTIVES = tuple(_OBJECTIVES)


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
    if source == "text":
        keys |= _TEXTS[_choose("data.text", config.get("text", keys["text"]), TEXTS)]
        keys |= _OBJECTIVES[_choose("data.objective", config.get("objective", keys["objective"]), OBJECTIVES)]
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
        chosen = "/".join(str({**keys, **given}[k]) for k in ("source", "text", "objective") if k in keys)
        raise ValueError(f"unknown key data.{key}{_nearest(key, keys)}; valid for {chosen}: {', '.join(sorted(keys))}")
    return ml_collections.ConfigDict(
        {key: _checked(key, given.get(key, default), default) for key, default in keys.items()}
    )
