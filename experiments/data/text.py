# SPDX-License-Identifier: Apache-2.0
"""Sources of text as bytes: embedded books, local files, TFDS text fields, and the standard library of the running Python.

A source is one uint8 array, and an example is a window of it, so access is random and a window costs one copy. Nothing
is ever decoded: bytes that are no valid text are data like any other.
"""

from __future__ import annotations

import gzip
import importlib
import logging
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from experiments.data import byte_vocab, tfds_source
from experiments.data.splits import check_fraction, check_split, relative_name, split_of, walk

_BOOKS = tuple(
    str(epath.resource_path("experiments") / "data" / "books" / name)
    for name in ("moby_dick.txt.gz", "sherlock_holmes.txt.gz")
)
_SEPARATOR = b"\n"  # between documents, so that the last word of one and the first of the next stay apart
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


class Objective(Protocol):
    """What turns windows of ids `[B, window]` into training examples (span corruption, next byte)."""

    @property
    def window(self) -> int: ...

    def examples(self, ids: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]: ...


def concatenate(documents: Iterable[bytes], *, what: str) -> np.ndarray:
    """Joins documents, a newline between them, to one uint8 array `[bytes]`.

    Raises:
      ValueError: the documents hold no byte; `what` names the source in the message.
    """
    joined = _SEPARATOR.join(document for document in documents if document)
    if not joined:
        raise ValueError(f"the text source is empty: {what} holds no byte")
    return np.frombuffer(joined, np.uint8)


def capped(documents: Iterable[bytes], max_bytes: int, what: str) -> Iterator[bytes]:
    """Passes on as many documents as make `max_bytes` with what joins them, cuts the last, and reports that it did."""
    if max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} must be positive, or 0 for no limit")
    left = max_bytes
    for document in documents:
        if max_bytes and len(document) > left:
            logging.getLogger(__name__).info("%s: kept the first %d bytes (max_bytes)", what, max_bytes)
            if left > 0:
                yield document[:left]
            return
        left -= len(document) + len(_SEPARATOR)
        yield document


# -- Local files ------------------------------------------------------------------------------------------------------


def find_files(path: str | Sequence[str], *, file_prefix: str = "") -> list[epath.Path]:
    """Returns the sorted files that `path` means: a file, a folder (all files below it), a glob, or several of these.

    Hidden files are left out; `file_prefix` keeps the files whose name starts with it, such as a language.

    Raises:
      ValueError: `path` is empty, or no file matches.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    if not patterns or not all(patterns):
        raise ValueError("data.path is empty: give a text file, a folder, a glob such as 'books/*.txt.gz', or several")
    found: set[epath.Path] = set()
    for pattern in patterns:
        matches = [p for p in _matches(pattern) if p.name.startswith(file_prefix) and not p.name.startswith(".")]
        if not matches:
            named = f" with a name that starts with {file_prefix!r}" if file_prefix else ""
            raise ValueError(f"the text source is empty: {pattern!r} matches no file{named}")
        found.update(matches)
    return sorted(found)


def _matches(pattern: str) -> list[epath.Path]:
    """Expands one file, folder or glob to files."""
    path = epath.Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return list(walk(path))
    if "**" in pattern:
        raise ValueError(f"'**' in {pattern!r} is not supported: name the folder, which is read with all below it")
    parts = path.parts
    first_wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if first_wild is None:
        return []
    root = epath.Path(*parts[:first_wild]) if first_wild else epath.Path(".")
    return [p for p in root.glob("/".join(parts[first_wild:])) if p.is_file()]


def read_file(path: epath.Path, *, limit: int = 0) -> bytes:
    """Returns a file's bytes, unpacked when its name ends in .gz; at most the first `limit` of them unless it is 0.

    Raises:
      ValueError: a .gz file is damaged or is not gzip; the message names it.
    """
    amount = limit or -1
    with path.open("rb") as file:
        if path.suffix != ".gz":
            return file.read(amount)
        try:
            with gzip.open(file) as unpacked:
                return unpacked.read(amount)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error


def _portion(document: bytes, split: str, valid_fraction: float) -> bytes:
    """Cuts out a split's part of one file: the tail is held out, half of it for validation, half for the test."""
    held = int(len(document) * valid_fraction)
    first_valid, first_test = len(document) - 2 * held, len(document) - held
    return {
        "train": document[:first_valid],
        "valid": document[first_valid:first_test],
        "test": document[first_test:],
    }[split]


def from_files(
    path: str | Sequence[str],
    *,
    split: str,
    valid_path: str | Sequence[str] = "",
    test_path: str | Sequence[str] = "",
    file_prefix: str = "",
    valid_fraction: float = 0.05,
    max_bytes: int = 0,
) -> np.ndarray:
    """Returns the bytes of one split of local text files, plain or .gz, as a uint8 array `[bytes]`.

    A split with a path of its own is read from there. Otherwise each file of `path` is divided: its tail of twice
    `valid_fraction` is validation, then test, and what comes before is for training. Where validation and test both
    have paths, all of `path` is for training.

    Args:
      path: file, folder, glob, or a sequence of these; the training text.
      split: `"train"`, `"valid"` or `"test"`.
      valid_path: the same for validation, or empty.
      test_path: the same for the test, or empty.
      file_prefix: keeps files whose name starts with it.
      valid_fraction: share of each file that is held out for validation, and again for the test.
      max_bytes: reads at most this much from `path` (or from a split's own path); 0 for no limit.

    Raises:
      ValueError: unknown split, no matching file, no byte in the split, or a damaged .gz file.
    """
    check_split(split)
    check_fraction(valid_fraction)
    own_paths = {"valid": valid_path, "test": test_path}
    what = f"the {split} split of {own_paths.get(split) or path!r}"

    def read(files: list[epath.Path]) -> Iterator[bytes]:
        limit = max_bytes + 1 if max_bytes else 0  # one more than allowed, so that a cut is noticed and reported
        documents = (read_file(file, limit=limit) for file in files)
        return capped(documents, max_bytes, what)

    if own_paths.get(split):
        return concatenate(read(find_files(own_paths[split], file_prefix=file_prefix)), what=what)
    documents = read(find_files(path, file_prefix=file_prefix))
    if valid_path and test_path:  # nothing to hold out: all of `path` is for training
        return concatenate(documents, what=what)
    return concatenate((_portion(document, split, valid_fraction) for document in documents), what=what)


# -- The embedded books -----------------------------------------------------------------------------------------------


def from_books(*, split: str, valid_fraction: float = 0.05, max_bytes: int = 0) -> np.ndarray:
    """Returns the bytes of two novels, 1.8 MB of English that come with the package, as uint8 `[bytes]`.

    Args:
      split: `"train"`, `"valid"` or `"test"`; the end of each novel is held out.
      valid_fraction: share of each that is held out for validation, and again for the test.
      max_bytes: reads at most this much, Moby-Dick first; 0 for no limit.

    Raises:
      ValueError: unknown split.
    """
    return from_files(_BOOKS, split=split, valid_fraction=valid_fraction, max_bytes=max_bytes)


# -- TFDS -------------------------------------------------------------------------------------------------------------


def from_tfds(
    name: str, *, data_dir: str = "", split: str = "train", field: str = "text", max_bytes: int = 0
) -> np.ndarray:
    """Returns the bytes of a text field of a prepared TFDS set, examples joined by newlines, as uint8 `[bytes]`.

    Args:
      name: the set, with config and version where wanted.
      data_dir: folder of prepared sets; empty for the usual one.
      split: a split in TFDS notation.
      field: the text field to read.
      max_bytes: reads at most this much; 0 for no limit.

    Raises:
      ValueError: set, split or field is missing, the field is not text, or it is empty everywhere.
    """
    source = tfds_source.open_split(name, data_dir=data_dir, split=split)
    tfds_source.require_field(source, field, name=name, option="field")
    if not isinstance(source[0][field], bytes | str):
        raise ValueError(f"field {field!r} of TFDS set {name!r} is not text but {type(source[0][field]).__name__}")
    what = f"field {field!r} of split {split!r} of TFDS set {name!r}"
    values = (source[i][field] for i in range(len(source)))
    documents = (value if isinstance(value, bytes) else value.encode() for value in values)
    return concatenate(capped(documents, max_bytes, what), what=what)


# -- The standard library ---------------------------------------------------------------------------------------------


def _stdlib_files() -> list[tuple[str, epath.Path]]:
    """Returns (relative name, path) of the standard library's source files, sorted by name, tests left out."""
    root = epath.Path(sysconfig.get_path("stdlib"))
    files = []
    for name in sorted(sys.stdlib_module_names):  # what is named here is the library itself, never an installed package
        module = root / f"{name}.py"
        if module.is_file():
            files.append((module.name, module))
        if (root / name).is_dir():
            files.extend((relative_name(p, root), p) for p in walk(root / name) if p.suffix == ".py")
    return sorted((name, path) for name, path in files if not _TEST_FOLDERS & set(name.split("/")))


def _pydoc_topics() -> list[tuple[str, bytes]]:
    """Returns (name, text) of the language reference that `help()` shows; none where a distribution leaves it out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return sorted((f"pydoc_data/topics/{name}", text.encode()) for name, text in topics.items())


def from_stdlib(*, split: str, valid_fraction: float = 0.05, max_bytes: int = 0) -> np.ndarray:
    """Returns source and documentation text of the running Python's standard library as uint8 `[bytes]`.

    It is there wherever Python is, so training on real text needs no download; it differs between Python versions.
    A file or topic belongs wholly to one split, by a hash of its relative name.

    Args:
      split: `"train"`, `"valid"` or `"test"`.
      valid_fraction: share of the files held out for validation, and again for the test.
      max_bytes: reads at most this much of the split, documentation first; 0 for no limit.

    Raises:
      ValueError: unknown split, or the library's source is not installed as files.
    """
    check_split(split)
    check_fraction(valid_fraction)
    what = f"the {split} split of the standard library under {sysconfig.get_path('stdlib')}"

    def documents() -> Iterator[bytes]:
        for name, text in _pydoc_topics():
            if split_of(name, valid_fraction) == split:
                yield text
        for name, path in _stdlib_files():
            # topics.py holds the topics again, as one quoted literal
            if name != "pydoc_data/topics.py" and split_of(name, valid_fraction) == split:
                yield path.read_bytes()

    return concatenate(capped(documents(), max_bytes, what), what=what)


# -- Windows ----------------------------------------------------------------------------------------------------------


class TextSource:
    """Examples from windows of a text: window i starts at byte (or id) `i * window`, shifted at random in training.

    The shift, up to one window either way within the text, makes all bytes starts and ends of examples over the epochs.
    """

    def __init__(self, data: np.ndarray, objective: Objective, sizes: np.ndarray | None = None) -> None:
        """Takes `data` and an objective.

        Args:
          data: uint8 `[bytes]`, or int32 `[ids]` of a subword vocabulary.
          objective: what makes examples of windows of ids.
          sizes: `[ids]` bytes that each id of a subword vocabulary stands for; examples then have `bytes`, those of their
            labels, which are the ids of a window but the first.

        Raises:
          ValueError: the text is shorter than one window.
        """
        self._data = data
        self._objective = objective
        self._sizes = sizes
        self._window = objective.window
        if data.size < self._window:
            unit = "bytes" if data.dtype == np.uint8 else "ids"
            raise ValueError(
                f"the text has {data.size} {unit} but one example needs {self._window}; "
                "give more text (or a larger valid_fraction), or make the examples shorter"
            )

    def __len__(self) -> int:
        """Number of whole windows side by side."""
        return self._data.size // self._window

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns the objective's examples for `indices [B]`; `entropy [B, E]` seeds each row's generator."""
        rngs = [np.random.default_rng(row) for row in entropy]
        starts = indices.astype(np.int64) * self._window
        if augment:
            lowest = np.maximum(starts - self._window + 1, 0)
            highest = np.minimum(starts + self._window - 1, self._data.size - self._window)
            bounds = zip(rngs, lowest, highest, strict=True)
            starts = np.array([rng.integers(low, high, endpoint=True) for rng, low, high in bounds])
        places = starts[:, None] + np.arange(self._window)
        windows = self._data[places]
        if self._sizes is None:
            return self._objective.examples(byte_vocab.encode(windows), rngs)
        return {**self._objective.examples(windows, rngs), "bytes": self._sizes[places[:, 1:]]}
