# SPDX-License-Identifier: Apache-2.0
"""Subword vocabularies: text as the ids of a `tokenizer.json`, which the package `tokenizers` reads and trains.

    python -m experiments.data.subword --path=BOOKS --size=4096 --out=books.json
    python -m experiments.data.subword --size=2048 --out=novels.json        # the two embedded novels

Such a file lies in the directories of most checkpoints (Llama, Qwen2). Training on ids is exact in bytes all the same: of each
id is known how many bytes of the text it stands for, so that losses are reported in bits per byte and compare with byte models.
Letters: T ids of a text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.data import text

# Texts are cut at a line's end near this many bytes, so that one call of the tokenizer does not hold all of a corpus.
_PIECE = 1 << 16
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")


class Subword:
    """The vocabulary of a `tokenizer.json`.

    Attributes:
      size: of the embedding table that the ids need.
      eos_id: of the mark that ends a text; -1 where there is none.
    """

    def __init__(self, path: str) -> None:
        """Reads the file, or the `tokenizer.json` of a directory.

        Raises:
          ImportError: the package `tokenizers` is not installed.
          ValueError: there is no such file, or it is no tokenizer.
        """
        file = epath.Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not path or not file.is_file():
            raise ValueError(f"data.tokenizer={path!r} is no tokenizer.json, nor a directory that has one")
        try:
            self._tokenizer = _library().Tokenizer.from_str(file.read_text())
        except ImportError:
            raise
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ids = (self._tokenizer.token_to_id(mark) for mark in _ENDS)
        self.eos_id = next((id_ for id_ in ids if id_ is not None), -1)

    def encode(self, data: bytes) -> np.ndarray:
        """Ids `[T]` int32 of a text, without marks at its ends; bytes that are no UTF-8 become the replacement character."""
        return self.encode_corpus(np.frombuffer(data, np.uint8))[0]

    def encode_corpus(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, sizes)`, both `[T]` int32, of uint8 `[bytes]`: sizes are the bytes that ids stand for.

        They add up to the bytes of the text, in which a byte that is no UTF-8 counts as the three of the replacement character.
        """
        ids, sizes = [], []
        for piece in _pieces(data):
            decoded = piece.decode("utf-8", errors="replace")
            found = self._tokenizer.encode(decoded, add_special_tokens=False)
            if not found.ids:
                raise ValueError(f"the tokenizer makes no id of {decoded[:40]!r}")
            ends = np.array([end for _, end in found.offsets], np.int64)
            # Ids that share a character, each with some of its bytes, all end behind it: the first of them counts it. What the
            # tokenizer passes over, such as white space, counts for the id that follows, at the very end for the last.
            reached = np.maximum.accumulate(_byte_places(decoded)[ends])
            reached[-1] = len(decoded.encode())
            ids.append(np.array(found.ids, np.int32))
            sizes.append(np.diff(reached, prepend=0).astype(np.int32))
        return np.concatenate(ids), np.concatenate(sizes)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The text of ids `[T]` as UTF-8, without special marks.

        Raises:
          ValueError: an id lies outside the table.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise ValueError(f"ids of this vocabulary lie in 0..{self.size - 1}; got {ids.min()}..{ids.max()}")
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()


def train(data: np.ndarray, size: int) -> str:
    """The `tokenizer.json` of a byte-pair encoding of `size` ids, learned from uint8 `[bytes]`; the last id ends a text.

    Raises:
      ImportError: the package `tokenizers` is not installed.
      ValueError: fewer ids than bytes and the mark.
    """
    if size < 257:
        raise ValueError(f"size must be at least 257 (256 bytes and the mark of the end); got {size}")
    tokenizers = _library()
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator((piece.decode("utf-8", errors="replace") for piece in _pieces(data)), trainer)
    learned.add_special_tokens([_ENDS[0]])
    return json.dumps(json.loads(learned.to_str()), ensure_ascii=False, indent=1)


def _pieces(data: np.ndarray) -> Iterator[bytes]:
    """The text in pieces that end behind a line's end; where there is none, behind a character's."""
    start = 0
    while start < data.size:
        stop = min(start + _PIECE, data.size)
        lines = np.flatnonzero(data[start:stop] == ord("\n"))
        if stop < data.size:
            stop = start + int(lines[-1]) + 1 if lines.size else _before_character(data, stop)
        yield data[start:stop].tobytes()
        start = stop


def _before_character(data: np.ndarray, place: int) -> int:
    """`place`, or where the character begins that it would cut: at most three bytes of UTF-8 follow the first."""
    starts = (first for first in range(place, place - 4, -1) if data[first] & 0xC0 != 0x80)
    return next(starts, place)


def _byte_places(decoded: str) -> np.ndarray:
    """`[characters + 1]`: how many bytes of UTF-8 stand before each character, and before the end."""
    codes = np.frombuffer(decoded.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("subword vocabularies need the package tokenizers: pip install tokenizers") from error
    return tokenizers


def main(argv: list[str] | None = None) -> int:
    """Learns a vocabulary and writes it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.subword",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", default="", help="text file, folder or glob (default: two embedded novels)")
    parser.add_argument("--size", type=int, default=4096, help="ids, the end of a text included (default %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=0, help="of text to learn from; 0 for all (default)")
    parser.add_argument("--out", required=True, help="file to write, usually tokenizer.json")
    options = parser.parse_args(argv)
    limits = dict(split="train", max_bytes=options.max_bytes)
    try:
        data = text.from_files(options.path, **limits) if options.path else text.from_books(**limits)
        epath.Path(options.out).expanduser().write_text(train(data, options.size))
        found, sizes = Subword(options.out).encode_corpus(data[: 1 << 20])
    except (ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.size} ids, {sizes.sum() / found.size:.2f} bytes an id on the text's first bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
