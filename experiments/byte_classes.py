# SPDX-License-Identifier: Apache-2.0
"""Classes of bytes, and which of them a gate deletes: counts of deleted bytes by class.

Classes by the value of the byte, so that they need no decoding: ASCII whitespace, letters, digits and punctuation; the first
byte of a longer UTF-8 character ("lead", two to four bytes) and its other bytes ("continuation"); and "special": end of
sequence, unknown, control characters, and byte values that UTF-8 never uses, which are the first span sentinels (248..258).
A text with more than eleven spans uses ids of lead bytes as sentinels too, which count as such.

Shapes: B batch, N bytes, C classes.
"""

from __future__ import annotations

import string

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.data import byte_vocab

CLASSES = ("whitespace", "letter", "digit", "punctuation", "lead", "continuation", "special")


def _table() -> np.ndarray:
    """`[384]` index of the class of each id."""
    members = {
        "whitespace": string.whitespace.encode(),
        "letter": string.ascii_letters.encode(),
        "digit": string.digits.encode(),
        "punctuation": string.punctuation.encode(),
        "lead": range(0xC2, 0xF5),
        "continuation": range(0x80, 0xC0),
    }
    table = np.full(byte_vocab.TABLE_SIZE, CLASSES.index("special"), np.int32)
    for name, values in members.items():
        table[np.array(list(values)) + byte_vocab.OFFSET] = CLASSES.index(name)
    return table


_TABLE = _table()


def class_of(token_ids: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """Index in `CLASSES` of each id of ByT5's vocabulary."""
    return jnp.asarray(_TABLE)[token_ids]


def deleted_by_class(
    kept: Bool[Array, "B N"], token_ids: Int[Array, "B N"], valid: Bool[Array, "B N"]
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """`{class: (deleted, there are)}`: the share of each class's bytes that were deleted, as sums and counts.

    Args:
      kept: `[B, N]` True for bytes that stay.
      token_ids: `[B, N]` in ByT5's vocabulary, 0..383.
      valid: `[B, N]` True for bytes that count; padding is not one of them.
    """
    classes = class_of(token_ids)
    member = (classes[None] == jnp.arange(len(CLASSES))[:, None, None]) & valid
    count = jnp.sum(member, axis=(1, 2), dtype=jnp.float32)
    deleted = jnp.sum(member & ~kept, axis=(1, 2), dtype=jnp.float32)
    return {name: (deleted[index], count[index]) for index, name in enumerate(CLASSES)}
