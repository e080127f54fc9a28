# SPDX-License-Identifier: Apache-2.0
"""Greedy and sampled generation: one loop on the device around any decode step with an explicit cache.

Shapes: B batch, N encoder tokens, M encoder tokens after a reduction, T generated tokens at most, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import ragged
from adaptive.tokens import Reduction
from layers.t5_layers import Encoded

Step = Callable[[Any, Int[Array, " B"], Int[Array, ""]], tuple[Float[Array, "B V"], Any]]


@flax.struct.dataclass
class Generation:
    """Generated tokens.

    Attributes:
      tokens: `[B, T]`, without the first ids that were given; `pad_id` behind the end of a row.
      lengths: `[B]` tokens of each row, its end of sequence included.
      log_probs: `[B, T]` float32, in nats, of each chosen token under the model itself (no temperature, no filter); 0 behind
        the end.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    log_probs: Float[Array, "B T"]


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """`logits [B, V]` with all but the `k` highest of each row at -inf; of equal ones the lower index stays.

    Raises:
      ValueError: k outside 1..V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k must lie in 1..{logits.shape[-1]} (the vocabulary); got {k}")
    return jnp.where(ragged.rank(logits) < k, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """`logits [B, V]` with all but the nucleus of each row at -inf: the fewest most probable tokens that hold `p` together.

    Args:
      logits: `[B, V]`; -inf for what is excluded already.
      p: probability in (0, 1]; 1 keeps everything.

    Raises:
      ValueError: p outside (0, 1].

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1]; got {p}")
    # The sum of all probabilities may round to less than 1 or more.
    if p == 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < p, axis=-1, keepdims=True)
    return jnp.where(ragged.rank(logits) < kept, logits, -jnp.inf)


def generate(step: Step, cache: Any, first_ids: Int[Array, " B"], **settings: Any) -> Generation:
    """`generate_with_cache` without the cache in the end."""
    return generate_with_cache(step, cache, first_ids, **settings)[0]


def generate_with_cache(
    step: Step,
    cache: Any,
    first_ids: Int[Array, " B"],
    *,
    max_length: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int = 1,
    pad_id: int = 0,
    key: Array | None = None,
    min_length: int = 0,
    vocab_size: int = 0,
) -> tuple[Generation, Any]:
    """Decodes from `first_ids` until every row has ended, in one `lax.while_loop`.

    Everything but `cache`, `first_ids` and `key` is static. A row's draws depend on its key and the position alone: given one
    key a row, they are the same in any batch.

    Args:
      step: `(cache, token_ids [B], position) -> (logits [B, V], cache)`, the logits of what follows `token_ids`.
      cache: any pytree; it must have room for `max_length` tokens.
      first_ids: `[B]`, the tokens at position 0.
      max_length: T, tokens to generate at most.
      temperature: 0 takes the most probable token; else logits are divided by it, then filtered, then sampled.
      top_k: sample among so many most probable tokens; 0 for all. top_p: sample from this nucleus, after `top_k`.
      eos_id: ends a row, and is its last token; pad_id: what finished rows emit.
      key: PRNG key for sampling, or keys `[B]`, one a row.
      min_length: tokens before the end of sequence that a row must have; until then `eos_id` cannot be chosen.
      vocab_size: ids that mean something, from 0 on: no other is chosen; 0 for all V, which many models round up.

    Returns:
      `(generation, cache)`: the cache as the last step left it, so that a caller can donate it.

    Raises:
      ValueError: a value outside its range, or sampling without a key.
    """
    _check_sampling(max_length, temperature, top_k, top_p, min_length, vocab_size, key)
    rows = first_ids.shape[0]
    keys = None if temperature == 0 else _row_keys(key, rows)

    def choose(logits: Float[Array, "B V"], position: Int[Array, ""]) -> Int[Array, " B"]:
        if vocab_size:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        if min_length:
            early = (jnp.arange(logits.shape[-1]) == eos_id) & (position < min_length)
            logits = jnp.where(early, -jnp.inf, logits)
        if keys is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        logits = keep_top_p(keep_top_k(logits, top_k) if top_k else logits, top_p)
        drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))
        return drawn(keys, logits).astype(jnp.int32)

    def unfinished(state: tuple) -> Bool[Array, ""]:
        position, _, _, done, _ = state
        return (position < max_length) & ~jnp.all(done)

    def advance(state: tuple) -> tuple:
        position, cache, ids, done, found = state
        logits, cache = step(cache, ids, position)
        logits = logits.astype(jnp.float32)
        chosen = choose(logits, position)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        ids = jnp.where(done, pad_id, chosen)
        found = Generation(
            found.tokens.at[:, position].set(ids),
            found.lengths + ~done,
            found.log_probs.at[:, position].set(jnp.where(done, 0.0, log_prob)),
        )
        return position + 1, cache, ids, done | (chosen == eos_id), found

    empty = Generation(
        jnp.full((rows, max_length), pad_id, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, max_length), jnp.float32),
    )
    start = (jnp.zeros((), jnp.int32), cache, first_ids.astype(jnp.int32), jnp.zeros(rows, bool), empty)
    _, cache, _, _, found = jax.lax.while_loop(unfinished, advance, start)
    return found, cache


def generate_t5(
    model: Any,
    variables: Any,
    input_ids: Int[Array, "B N"],
    attention_mask: Bool[Array, "B N"] | None = None,
    *,
    max_length: int,
    deletion: str | None = None,
    rungs: Sequence[int] | None = None,
    key: Array | None = None,
    rngs: Mapping[str, Array] | None = None,
    **sampling: Any,
) -> tuple[Generation, dict[str, Any]]:
    """Encodes and generates as one compiled program, with no host round trip.

    The decode loop runs on the smallest rung that holds every row's encoder tokens, so that cross-attention pays for the
    tokens that deletion, padding or a reduction left. The result does not depend on the rungs. As with every ladder, do not
    put it under `vmap`.

    Args:
      model: a `layers.t5.T5` with a decoder, or another module with its methods `encode`, `unrolled_decoder`,
        `start_decoding` and `decode_step`.
      variables: of the model.
      input_ids, attention_mask, deletion: see `T5.__call__`.
      max_length: tokens to generate at most.
      rungs: ladder of the decode loop, rising, the last at least the length of the encoder's output; the model's own when
        None. The loop is compiled once for each rung.
      key: for sampling; see `generate`.
      rngs: for encoders that draw ("deletion", "reduction").
      **sampling: of `generate`, all static.

    Returns:
      `(generation, aux)`: "delete_gate" and "kept" of the encoder (`[B, N]` or None), and "tokens" `[L, B]`.

    Raises:
      ValueError: the model has no decoder, the input is longer than the ladder, and what `T5` and `generate` refuse.
    """
    rungs = model.rungs if rungs is None else tuple(rungs)
    settings = tuple(sorted((sampling | {"max_length": max_length}).items()))
    return _generate_t5(model, deletion, rungs, settings, variables, input_ids, attention_mask, key, dict(rngs or {}))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate_t5(
    model: Any,
    deletion: str | None,
    rungs: tuple[int, ...] | None,
    settings: tuple[tuple[str, Any], ...],
    variables: Any,
    input_ids: Array,
    attention_mask: Array | None,
    key: Array | None,
    rngs: dict[str, Array],
) -> tuple[Generation, dict[str, Any]]:
    encoded = model.apply(variables, input_ids, attention_mask, deletion=deletion, rngs=rngs, method="encode")
    aux = {name: encoded.aux[name] for name in ("delete_gate", "kept", "tokens")}
    return decode_t5(model, variables, encoded, rungs=rungs, key=key, **dict(settings)), aux


def decode_t5(
    model: Any,
    variables: Any,
    encoded: Encoded,
    *,
    max_length: int,
    rungs: Sequence[int] | None = None,
    key: Array | None = None,
    **sampling: Any,
) -> Generation:
    """The second half of `generate_t5`, from what `T5.encode` returned; to be compiled by the caller."""
    rows, slots = encoded.key_bias.shape
    model, variables = model.unrolled_decoder(variables)

    def step(cache: Any, token_ids: Array, position: Array) -> tuple[Array, Any]:
        return model.apply(variables, cache, token_ids, position, method="decode_step")

    def work(reduction: Reduction, encoded: Encoded, key: Array | None) -> Generation:
        cache = model.apply(variables, pack(encoded, reduction), max_length, method="start_decoding")
        # T5's decoder starts with id 0.
        first_ids = jnp.zeros(rows, jnp.int32)
        return generate(step, cache, first_ids, max_length=max_length, key=key, **sampling)

    rungs = (slots,) if rungs is None else rungs
    return ragged.on_ladder(work, encoded.valid, rungs, encoded.replace(aux=None), key)


def generate_lm(
    model: Any,
    variables: Any,
    input_ids: Int[Array, "B N"],
    attention_mask: Bool[Array, "B N"] | None = None,
    *,
    max_length: int,
    key: Array | None = None,
    **sampling: Any,
) -> tuple[Generation, dict[str, Any]]:
    """Continues prompts of different lengths: one program reads them, another decodes, and the cache stays on the device.

    Args:
      model: a `layers.decoder_lm.DecoderLM`; its `policy` says which layers run for a token.
      variables: of the model.
      input_ids, attention_mask: prompts `[B, N]`, padded on either side; what is generated does not depend on the padding.
      max_length: T, tokens to generate at most.
      key: for sampling; see `generate_with_cache`.
      **sampling: of `generate_with_cache`, all static.

    Returns:
      `(generation, aux)`: "tokens" `[L, B]`, tokens of each row that ran through each layer in decoding, and "steps" `[L]`,
      steps at which a layer ran for any row. A row that has ended is counted on until all have.

    Raises:
      ValueError: what the model and `generate_with_cache` refuse.
    """
    settings = tuple(sorted((sampling | {"max_length": max_length}).items()))
    cache, first_ids = prefill(model, max_length, variables, input_ids, attention_mask)
    generation, cache = decode_lm(model, settings, variables, cache, first_ids, key)
    return generation, {"tokens": cache.tokens, "steps": cache.steps}


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    model: Any, max_length: int, variables: Any, input_ids: Array, attention_mask: Array | None = None
) -> tuple[Any, Int[Array, " B"]]:
    """The compiled first half of `generate_lm`: `(cache, first_ids)`."""
    return model.apply(variables, input_ids, attention_mask, max_length=max_length, method="prefill")


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode_lm(
    model: Any,
    settings: tuple[tuple[str, Any], ...],
    variables: Any,
    cache: Any,
    first_ids: Int[Array, " B"],
    key: Array | None = None,
) -> tuple[Generation, Any]:
    """The compiled second half of `generate_lm`: `(generation, cache)`. It takes the memory of the cache that it is given.

    Args:
      settings: sorted pairs of `generate_with_cache`, "max_length" among them.
    """

    def step(cache: Any, token_ids: Array, position: Array) -> tuple[Array, Any]:
        return model.apply(variables, cache, token_ids, position, method="decode_step")

    return generate_with_cache(step, cache, first_ids, key=key, **dict(settings))


def pack(encoded: Encoded, reduction: Reduction) -> Encoded:
    """The encoder's output in the slots of a compaction, such as `ragged.compact` makes of `encoded.valid`."""
    key_bias = jnp.where(reduction.slots >= 0, reduction.reduce(encoded.key_bias), -jnp.inf)
    return encoded.replace(features=reduction.reduce(encoded.features), key_bias=key_bias)


def _check_sampling(
    max_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_length: int,
    vocab_size: int,
    key: Array | None,
) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token; got {max_length}")
    if not 0 <= min_length <= max_length:
        raise ValueError(f"min_length must lie in 0..{max_length} (max_length); got {min_length}")
    if vocab_size < 0:
        raise ValueError(f"vocab_size must be 0 (all ids of the table) or positive; got {vocab_size}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite; got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (no limit) or positive; got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    if temperature > 0 and key is None:
        raise ValueError(
            f"sampling at temperature {temperature} needs key=jax.random.key(seed); greedy is temperature=0"
        )


def _row_keys(key: Array, rows: int) -> Array:
    """One key a row `[B]`: those given, or the one given folded with each row's number."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be made by jax.random.key; got an array of {key.dtype}")
    if not key.ndim:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key must be one key, or one for each of {rows} rows; got shape {key.shape}")
    return key
