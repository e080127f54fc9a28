# SPDX-License-Identifier: Apache-2.0
"""The byte vocabulary of ByT5: every string of bytes has ids, and no string is out of vocabulary.

Ids: 0 pad (also the decoder's start id), 1 eos, 2 unk, byte b is b + 3 (3..258); embedding tables have 384 rows.
Span sentinels re-use the top byte ids: 258, 257, 256, ... in order of occurrence.

Source: Xue et al. 2022 (ByT5), section 3.1; the id layout is that of the released ByT5 checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAD = 0
EOS = 1
UNK = 2
OFFSET = 3
BYTES = 256
TABLE_SIZE = 384
FIRST_SENTINEL = OFFSET + BYTES - 1


def encode(text: str | bytes | np.ndarray, *, eos: bool = False) -> np.ndarray:
    """Returns the ids `[N]` int32 of a string (as UTF-8), of bytes, or of a uint8 array; `eos=True` appends id 1.

    Lone surrogates, as Python makes them from undecodable file names, turn back into the bytes they stand for.

    Raises:
      TypeError: an array is not uint8 (ids are not bytes: encoding twice is a mistake).
    """
    if isinstance(text, str):
        text = text.encode("utf-8", errors="surrogateescape")
    if isinstance(text, np.ndarray) and text.dtype != np.uint8:
        raise TypeError(f"encode takes raw bytes as a uint8 array, got dtype {text.dtype}; ids are already encoded")
    raw = text if isinstance(text, np.ndarray) else np.frombuffer(text, np.uint8)
    ids = raw.astype(np.int32) + OFFSET
    return np.append(ids, np.int32(EOS)) if eos else ids


def decode(ids: Sequence[int] | np.ndarray) -> bytes:
    """Returns the bytes of ids `[N]`; pad, eos, unk and the table's unused rows (259..383) stand for no byte.

    Raises:
      ValueError: an id lies outside the table, 0..383.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= TABLE_SIZE):
        bad = ids[(ids < 0) | (ids >= TABLE_SIZE)][0]
        raise ValueError(f"id {bad} is not in the byte vocabulary; ids run from 0 to {TABLE_SIZE - 1}")
    is_byte = (ids >= OFFSET) & (ids < OFFSET + BYTES)
    return (ids[is_byte] - OFFSET).astype(np.uint8).tobytes()


def decode_text(ids: Sequence[int] | np.ndarray) -> str:
    """Returns ids as text to be read by people; bytes that are not UTF-8 show as the replacement character."""
    return decode(ids).decode("utf-8", errors="replace")


def sentinels(count: int) -> np.ndarray:
    """Returns the first `count` span sentinels, 258 downwards, as `[count]` int32.

    Raises:
      ValueError: `count` is negative or larger than the number of byte ids, 256.
    """
    if not 0 <= count <= BYTES:
        raise ValueError(f"{count} sentinels asked for; the byte vocabulary has between 0 and {BYTES}")
    return FIRST_SENTINEL - np.arange(count, dtype=np.int32)


def shift_right(labels: np.ndarray) -> np.ndarray:
    """Returns the decoder's input for `labels [..., T]`: the start id 0, then all labels but the last."""
    shifted = np.zeros_like(labels)
    shifted[..., 1:] = labels[..., :-1]
    return shifted


def pack_pairs(
    inputs: Sequence[bytes], targets: Sequence[bytes], *, inputs_length: int, targets_length: int
) -> dict[str, np.ndarray]:
    """Returns the encoder-decoder batch of B pairs of strings, each closed by eos and padded with 0.

    `input_ids [B, N]`, `decoder_input_ids [B, T]` (labels shifted right, start id 0) and `labels [B, T]`, all int32.

    Raises:
      ValueError: a string has no room for its eos within its length.
    """
    labels = _rows(targets, targets_length, "target")
    return {
        "input_ids": _rows(inputs, inputs_length, "input"),
        "decoder_input_ids": shift_right(labels),
        "labels": labels,
    }


def _rows(strings: Sequence[bytes], length: int, what: str) -> np.ndarray:
    sizes = np.array([len(string) for string in strings], np.int64)
    if sizes.max(initial=0) >= length:
        raise ValueError(f"{what} of {sizes.max()} bytes and its eos do not fit into {length} ids")
    rows = np.zeros((len(strings), length), np.int32)
    rows[np.arange(length) < sizes[:, None]] = encode(b"".join(strings))
    rows[np.arange(len(strings)), sizes] = EOS
    return rows
