# SPDX-License-Identifier: Apache-2.0
"""Which vocabulary the ids of a run are of: bytes, or the subwords of a tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.data import byte_vocab
from experiments.data.subword import Subword


class Vocabulary(Protocol):
    """Text to ids and back; see `subword.Subword`."""

    size: int
    eos_id: int

    def encode(self, data: bytes) -> np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes: ...


class Bytes:
    """The vocabulary of `byte_vocab`."""

    size = byte_vocab.TABLE_SIZE
    eos_id = byte_vocab.EOS

    def encode(self, data: bytes) -> np.ndarray:
        """Ids `[bytes]` int32."""
        return byte_vocab.encode(data)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """What `byte_vocab.decode` gives."""
        return byte_vocab.decode(ids)


def vocabulary(config: Mapping[str, Any]) -> Vocabulary:
    """That of a resolved `config.data`.

    Raises:
      ImportError, ValueError: as `subword.Subword`.
    """
    return _subword(config["tokenizer"]) if config.get("tokenizer") else Bytes()


@functools.lru_cache(maxsize=8)
def _subword(path: str) -> Subword:
    return Subword(path)
