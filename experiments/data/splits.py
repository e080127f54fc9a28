# SPDX-License-Identifier: Apache-2.0
"""Names of the three splits, and how the files of a folder are found and divided among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from etils import epath

SPLITS = ("train", "valid", "test")


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of train, valid, test."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; it must be one of {', '.join(SPLITS)}")


def check_fraction(valid_fraction: float) -> None:
    """Raises ValueError unless `valid_fraction` leaves something for each of the three splits."""
    if not 0 < valid_fraction < 0.5:
        raise ValueError(
            f"valid_fraction={valid_fraction} must lie strictly between 0 and 0.5: it is held out twice, "
            "for validation and for the test"
        )


def place_of(name: str) -> float:
    """Returns a hash of a name in [0, 1), the same on every machine; a share of all names lies below that share."""
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(name: str, valid_fraction: float) -> str:
    """Returns the split that a file of this relative name belongs to: a hash, the same on every machine."""
    place = place_of(name)
    if place < valid_fraction:
        return "valid"
    return "test" if place < 2 * valid_fraction else "train"


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the files below a folder in sorted order; hidden files and folders are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def relative_name(path: epath.Path, root: epath.Path) -> str:
    """Returns the path of a file below `root`, with slashes on every system: what `split_of` hashes."""
    return "/".join(path.relative_to(root).parts)
