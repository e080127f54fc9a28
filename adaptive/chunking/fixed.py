# SPDX-License-Identifier: Apache-2.0
"""Chunks that nothing needs to be learned for: equal strides, space patches, words.

The rules for bytes read ids of ByT5's vocabulary: byte b is id b + 3, lower ids are special.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

import string

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from adaptive.chunking.chunks import Chunks, first_token, shifted, split_long
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

# Special ids come before the bytes.
OFFSET = 3
_BYTES = np.arange(256)


def _table(characters: str) -> np.ndarray:
    return np.isin(_BYTES, [ord(character) for character in characters])


_UPPER, _LOWER = _table(string.ascii_uppercase), _table(string.ascii_lowercase)
_ALPHANUMERIC = _UPPER | _LOWER | _table(string.digits)
# The ASCII characters of Unicode's classes P and S.
_PUNCTUATION, _SYMBOL = _table("!\"#%&'()*,-./:;?@[\\]_{}"), _table("$+<=>^`|~")
_WORD = _ALPHANUMERIC | (_BYTES >= 128)
_SPACE_LIKE = (_BYTES < 128) & ~_ALPHANUMERIC | (_BYTES >= 0xC0)


@register(
    "strided",
    kind="chunking",
    paper="CANINE: Pre-training an Efficient Tokenization-Free Encoder for Language Representation",
    citation="Clark, Garrette, Turc, Wieting. TACL 2022. arXiv:2103.06874",
    trained="optional",
)
def strided(tokens: TokenSet, signals: Signals, *, stride: int = 4) -> Chunks:
    """A chunk every `stride` positions; `layers.chunkers.StridedConv` pools them by a learned convolution.

    Args:
      tokens: `[B, N, D]`.
      signals: none.
      stride: tokens in a chunk (4 in CANINE; 2, 3 and 4 in MrT5's baseline).

    Raises:
      ValueError: the stride is not positive.

    Source: Clark et al. 2022 (downsampling); Kallini et al. 2025, section 4 (convolutional pooling baseline).

    Differs: a last chunk that is not full is kept, while the public code drops it; CANINE's class position is left out.
    """
    del signals
    if stride < 1:
        raise ValueError(f"a stride has at least one token; got {stride}")
    return Chunks.create(jnp.broadcast_to(jnp.arange(tokens.mass.shape[1]) % stride == 0, tokens.mass.shape), tokens)


@register(
    "space_patches",
    kind="chunking",
    paper="Byte Latent Transformer: Patches Scale Better Than Tokens",
    citation="Pagnoni et al. ACL 2025. arXiv:2412.09871 (space patching)",
    signals=("token_ids",),
)
def space_patches(tokens: TokenSet, signals: Signals, *, longest: int | None = None) -> Chunks:
    """Patches that end with the first space-like byte of a run; the first patch has one byte.

    Space-like are ASCII bytes that are no letter and no digit, and bytes that lead a UTF-8 character (from 0xC0 on). A special
    id always ends its patch.

    Args:
      tokens: `[B, N, D]`.
      signals: `token_ids`.
      longest: bytes in a patch at most; longer ones are cut into pieces of that length.

    Source: Pagnoni et al. 2025; rules of the public code (`patcher.py`).

    Differs: ids start at 3, those of ByT5, where BLT's bytes start at 4.
    """
    ids = signals.token_ids
    space = _is(ids, _SPACE_LIKE)
    ends = (space & ~shifted(space)) | (ids < OFFSET)
    starts = shifted(ends) | (position(tokens) == 1)
    return Chunks.create(split_long(starts, tokens, longest), tokens)


@register(
    "words",
    kind="chunking",
    paper="Hierarchical Autoregressive Transformers: Combining Byte- and Word-Level Processing for Robust, Adaptable LMs",
    citation="Neitemeier, Deiseroth, Eichenberg, Balles. ICLR 2025. arXiv:2501.10322",
    signals=("token_ids",),
)
def words(tokens: TokenSet, signals: Signals, *, longest: int | None = None) -> Chunks:
    """Words with the space before and the punctuation after them: `[one space][word][punctuation]`.

    Words are also cut between a lower-case and an upper-case letter. A run of two or more spaces is a chunk of its own, and so
    is any other whitespace or control byte (a carriage return joins the line feed after it) and a special id.
    `experiments.data.hat_splitter` splits text by the same rule on the host, with Unicode's categories.

    Args:
      tokens: `[B, N, D]`.
      signals: `token_ids`.
      longest: bytes in a chunk at most; longer ones are cut into pieces of that length.

    Source: Neitemeier et al. 2025; the rule of the public splitter (hat-splitter).

    Differs: ids alone decide, on the device, so every byte beyond ASCII counts as part of a word; [recon] each ASCII symbol
    that is no punctuation ("+", "=", "$") is a word; `longest` cuts between bytes, not between characters.
    """
    ids = signals.token_ids
    special = ids < OFFSET
    space, mark, symbol, word, lower, upper, feed, carriage = (
        _is(ids, table)
        for table in (_table(" "), _PUNCTUATION, _SYMBOL, _WORD, _LOWER, _UPPER, _table("\n"), _table("\r"))
    )
    # The first real token has nothing before it, whatever stands in padding.
    before = ~first_token(tokens.valid)
    after_space = shifted(space) & before
    lone_space = after_space & ~shifted(after_space)
    run_of_word = word & shifted(word) & ~(upper & shifted(lower))
    run_of_mark = mark & (shifted(word) | shifted(mark) | shifted(symbol))
    joins = (
        run_of_word
        | run_of_mark
        | ((word | mark | symbol) & lone_space)
        | (space & after_space)
        | (feed & shifted(carriage))
    )
    return Chunks.create(split_long(special | ~joins, tokens, longest), tokens)


def position(tokens: TokenSet) -> Int[Array, "B N"]:
    """`[B, N]` place of each real token in its row, from 0; not meaningful in padding."""
    return jnp.cumsum(tokens.valid, axis=-1, dtype=jnp.int32) - 1


def _is(ids: Int[Array, "B N"], table: np.ndarray) -> Bool[Array, "B N"]:
    """Whether each id is a byte that `table [256]` marks; special ids and unused rows are not."""
    byte = ids - OFFSET
    return (byte >= 0) & (byte < 256) & jnp.asarray(table)[jnp.clip(byte, 0, 255)]
