# SPDX-License-Identifier: Apache-2.0
"""Work on tokens that lie across the lanes in a TPU kernel, a sequence a row: neither a sort nor a transposition.

Lanes come in whole registers of 128. A row's numbers change places by shuffles of registers, of which there are few.

Shapes: S sequences, L lanes, T lanes of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

LANES = 128
# Columns of a fold that are worked together.
UNROLL = 8


def whole(lanes: int) -> int:
    """Lanes of whole registers."""
    return -(-lanes // LANES) * LANES


def padded(rows: Shaped[Array, "S n"], lanes: int, fill: float = 0) -> Shaped[Array, "S L"]:
    """Rows with `fill` behind them."""
    return jnp.pad(rows, ((0, 0), (0, lanes - rows.shape[1])), constant_values=fill)


def number(shape: tuple[int, ...]) -> Int[Array, "S L"]:
    """Places of lanes."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def count_before(ones: Float[Array, "S L"]) -> Float[Array, "S L"]:
    """How many ones stand before each place: products with a triangle, exact in bfloat16."""
    shape, counts, before = (LANES, LANES), [], 0.0
    ahead = jax.lax.broadcasted_iota(jnp.int32, shape, 0) < number(shape)
    triangle = jnp.where(ahead, 1.0, 0.0).astype(jnp.bfloat16)
    for piece in _registers(ones):
        counts.append(jnp.dot(piece.astype(jnp.bfloat16), triangle, preferred_element_type=jnp.float32) + before)
        before += jnp.sum(piece, axis=1, keepdims=True)
    return jnp.concatenate(counts, axis=1)


def take(table: Shaped[Array, "S T"], index: Int[Array, "S L"]) -> Shaped[Array, "S L"]:
    """`table[s, index[s, l]]`; anything where the index is not in the table."""
    out = []
    for piece in _registers(index):
        lane, register = piece & (LANES - 1), piece >> 7
        found = [_shuffle(part, lane) for part in _registers(table)]
        best = found[0]
        for place, part in enumerate(found[1:], 1):
            best = jnp.where(register == place, part, best)
        out.append(best)
    return jnp.concatenate(out, axis=1)


def halves(rows: Shaped[Array, "S L"]) -> tuple[Shaped[Array, "S half"], Shaped[Array, "S half"]]:
    """The numbers at even and at odd places, of an even number of registers."""
    pieces = _registers(rows)
    lane = number(pieces[0].shape)
    parts = []
    for odd in range(2):
        place = (2 * lane + odd) & (LANES - 1)
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        parts.append([jnp.where(lane < LANES // 2, _shuffle(a, place), _shuffle(b, place)) for a, b in pairs])
    return jnp.concatenate(parts[0], axis=1), jnp.concatenate(parts[1], axis=1)


def interleaved(even: Shaped[Array, "S L"], odd: Shaped[Array, "S L"]) -> Shaped[Array, "S both"]:
    """The inverse of `halves`."""
    pieces = []
    for a, b in zip(_registers(even), _registers(odd), strict=True):
        lane = number(a.shape)
        for start in (0, LANES // 2):
            place = start + lane // 2
            pieces.append(jnp.where(lane % 2 == 0, _shuffle(a, place), _shuffle(b, place)))
    return jnp.concatenate(pieces, axis=1)


def packed(values: Int[Array, "S L"], gaps: Int[Array, "S L"], most: int) -> Int[Array, "S L"]:
    """Each value moved down by its gap, by one bit of the gap after the other; anything behind the last one.

    Args:
      values: in 0..2^15.
      gaps: in 0..most, places that are free before each value; 0 for what is not a value. They never fall from a value to
        the next one, so that none meets another on its way.
      most: below 2^15.
    """
    word = gaps << 16 | values
    for bit in range(most.bit_length()):
        coming = pltpu.roll(word, word.shape[1] - (1 << bit), 1)
        comes, goes = ((x >> (16 + bit)) & 1 for x in (coming, word))
        word = jnp.where(comes == 1, coming, jnp.where(goes == 1, 0, word))
    return word & 0xFFFF


def fold(arrays: tuple[Array, ...], count: Any, body: Callable[..., Any], state: Any) -> Any:
    """`state = body(place, columns, state)` for the first `count` places, with the arrays' columns there in every lane.

    A count that is only known when the kernel runs may be exceeded by `UNROLL - 1` places, which are then to change nothing.
    """
    pieces = [_registers(array) for array in arrays]
    for register, parts in enumerate(zip(*pieces, strict=True)):
        start = register * LANES

        def step(lane: Any, state: Any, parts: tuple = parts, start: int = start) -> Any:
            place = jnp.full(parts[0].shape, lane, jnp.int32)
            return body(start + lane, [_shuffle(part, place) for part in parts], state)

        def several(turn: Any, state: Any, step: Callable[..., Any] = step) -> Any:
            for lane in range(UNROLL):
                state = step(turn * UNROLL + lane, state)
            return state

        left = min(max(count - start, 0), LANES) if isinstance(count, int) else jnp.clip(count - start, 0, LANES)
        turns = left // UNROLL if isinstance(count, int) else pl.cdiv(left, UNROLL)
        state = jax.lax.fori_loop(0, turns, several, state)
        if isinstance(count, int):
            for lane in range(turns * UNROLL, left):
                state = step(lane, state)
    return state


def spread(column: Shaped[Array, "S 128"], lanes: int) -> Shaped[Array, "S L"]:
    """A column of `fold` in more registers."""
    return jnp.concatenate([column] * (lanes // LANES), axis=1)


def _registers(rows: Array) -> list[Array]:
    return [rows[:, start : start + LANES] for start in range(0, rows.shape[1], LANES)]


def _shuffle(register: Array, lane: Array) -> Array:
    return jnp.take_along_axis(register, lane, axis=1, mode="promise_in_bounds")
