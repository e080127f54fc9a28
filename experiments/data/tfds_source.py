# SPDX-License-Identifier: Apache-2.0
"""Random access to prepared TensorFlow Datasets folders, without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds


def open_split(name: str, *, data_dir: str, split: str) -> Sequence[dict[str, Any]]:
    """Opens one split of a prepared set, as `tfds.data_source` gives it; nothing is downloaded.

    Args:
      name: the set's name, with config and version where wanted (`"cifar10"`, `"wikipedia/20230601.sw:1.0.0"`).
      data_dir: the folder that holds the prepared sets; empty for the usual `~/tensorflow_datasets`.
      split: a split in TFDS notation (`"train"`, `"train[:95%]"`).

    Raises:
      ValueError: no name or split is given, the set is unknown, is not prepared in a random-access format under
        `data_dir`, has no such split, or the split is empty.
    """
    if not name:
        raise ValueError("data.name is empty: give the name of a TFDS set, for example 'cifar10'")
    if not split:
        raise ValueError(f"no TFDS split is configured for this part of {name!r}; give one, for example 'train[95%:]'")
    where = data_dir or "the default folder"
    try:
        source = tfds.data_source(name, data_dir=data_dir or None, split=split, download=False)
    except tfds.core.DatasetNotFoundError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"TFDS knows no set {name!r} and {where} holds none: {first_line}") from error
    except (NotImplementedError, AssertionError, FileNotFoundError) as error:
        raise ValueError(
            f"TFDS set {name!r} is not prepared for random access under {where}; "
            f"prepare it with `tfds build {name} --file_format=array_record`, or correct data.data_dir"
        ) from error
    except ValueError as error:
        raise ValueError(f"split {split!r} of TFDS set {name!r} under {where} cannot be opened: {error}") from error
    if not len(source):
        raise ValueError(f"split {split!r} of TFDS set {name!r} under {where} holds no example")
    return source


def require_field(source: Sequence[dict[str, Any]], field: str, *, name: str, option: str) -> None:
    """Raises ValueError when the records of `source` have no `field`; `option` is the config key to correct."""
    fields = sorted(source[0])
    if field not in fields:
        raise ValueError(f"TFDS set {name!r} has no field {field!r}; it has {fields}; correct data.{option}")
