# SPDX-License-Identifier: Apache-2.0
"""Decoding with a decoder language model: the prompts at once, then token by token with a cache, in all layers or in some.

Shapes: B batch, N prompt tokens, T decoded tokens, K = N + T slots of the cache, L layers, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.decoder_layers import Place, Stream


@flax.struct.dataclass
class DecoderCache:
    """What decoding remembers.

    Attributes:
      memories: of each layer, its keys and values in K slots: the prompt's, padding included, then one a step.
      valid: `[B, N]` the prompt's tokens that can be attended to.
      start: `[B]` position of the token that the first step gets.
      tokens: `[L, B]` tokens that ran through each layer in decoding.
      steps: `[L]` steps at which a layer ran for any row.
      max_length: T.
    """

    memories: tuple[Any, ...]
    valid: Bool[Array, "B N"]
    start: Int[Array, " B"]
    tokens: Int[Array, "L B"]
    steps: Int[Array, " L"]
    max_length: int = flax.struct.field(pytree_node=False)

    def place(self, position: Int[Array, ""]) -> Place:
        """Where the decoded tokens number `position` stand."""
        rows, prompt = self.valid.shape
        decoded = jnp.broadcast_to(jnp.arange(self.max_length) <= position, (rows, self.max_length))
        key_bias = jnp.where(jnp.concatenate([self.valid, decoded], axis=1), 0.0, -jnp.inf)
        return Place(prompt + position, (self.start + position)[:, None], key_bias)


class DepthPolicy(Protocol):
    """A hashable value that says which layers run for a token in decoding."""

    def prompt_layers(self, depth: int) -> tuple[bool, ...]:
        """Which layers run for prompts; static."""
        ...

    def start(self, x: Float[Array, "B D"]) -> Any:
        """What the policy carries through the layers of one step, from the features before the first."""
        ...

    def runs(
        self, layer: int, position: Int[Array, ""], x: Float[Array, "B D"], state: Any, model: Any
    ) -> tuple[Bool[Array, " B"] | Bool[Array, ""] | bool, Any]:
        """Whether `layer` runs on features `x`, at the decoded token number `position`, and the new state.

        A plain bool is static: such a layer needs no branch. `[]` is for all rows alike: nothing is stored in a layer that
        does not run, so later tokens must not run it either. `[B]` is for each row by itself: rows that it does not run for
        keep their features, and their keys and values are stored as those features have them.
        """
        ...


class Decoding(nn.Module):
    """Decoding for a language model whose class makes the parts: `block`, `depth`, `policy`, `embed` and `logits`.

    A layer that no row needs is not run, and one that some rows need runs on those, packed: it stands in branches of its own
    (`lax.cond`, `lax.switch`), so that one compiled step serves all positions. Do not put a step with a policy under `vmap`,
    which runs every branch.
    """

    def prefill(
        self, input_ids: Int[Array, "B N"], attention_mask: Bool[Array, "B N"] | None = None, *, max_length: int
    ) -> tuple[DecoderCache, Int[Array, " B"]]:
        """The cache of the prompts but for their last tokens, and those: they are what the first step gets.

        Args:
          input_ids: `[B, N]`; attention_mask: `[B, N]` True for real tokens, padding on either side; all when None. A row
            without any is taken for its first id alone.
          max_length: T, tokens that will be decoded at most; rounded up where the cache is read in whole pages.

        Raises:
          ValueError: `max_length` is not positive, or shapes do not fit.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token; got {max_length}")
        rows, length = input_ids.shape
        if self.reads is not None:
            max_length += -(length + max_length) % self.reads.page
        stream = Stream.create(input_ids, attention_mask)
        valid = jnp.ones(input_ids.shape, bool) if stream.valid is None else stream.valid
        places = jnp.arange(length)
        last = jnp.max(jnp.where(valid, places, 0), axis=1)[:, None]
        stream = stream.replace(valid=valid & (places != last))
        x, memories = self.embed(input_ids), []
        wanted = (True,) * self.depth if self.policy is None else self.policy.prompt_layers(self.depth)
        for block, runs in zip(self.block, wanted, strict=True):
            if runs:
                x, memory = block.prefill(x, stream, length + max_length)
            else:
                memory = block.empty(x, length + max_length)
            memories.append(memory)
        none = jnp.zeros((self.depth, rows), jnp.int32)
        start = jnp.take_along_axis(stream.positions, last, axis=1)[:, 0]
        cache = DecoderCache(tuple(memories), stream.valid, start, none, none[:, 0], max_length)
        return cache, jnp.take_along_axis(input_ids, last, axis=1)[:, 0]

    def decode_step(
        self, cache: DecoderCache, token_ids: Int[Array, " B"], position: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits `[B, V]` of what follows `token_ids [B]`, and the cache with them.

        They are the tokens number `position` (from 0) since the prompts' last ones, which are number 0. Those before must have
        been decoded, in order.

        Raises:
          ValueError: a Python position outside the cache (a traced one cannot be checked).
        """
        if isinstance(position, int) and not 0 <= position < cache.max_length:
            raise ValueError(
                f"position must lie in 0..{cache.max_length - 1} (max_length of the cache); got {position}"
            )
        position = jnp.asarray(position, jnp.int32)
        place = cache.place(position)
        x = self.embed(token_ids[:, None])
        state = None if self.policy is None else self.policy.start(x[:, 0])
        memories, ran = [], []
        for layer, (block, memory) in enumerate(zip(self.block, cache.memories, strict=True)):
            runs = True
            if self.policy is not None:
                runs, state = self.policy.runs(layer, position, x[:, 0], state, self)
            x, memory, own = self._advance(block, x, memory, place, runs)
            memories.append(memory)
            ran.append(own)
        ran = jnp.stack(ran)
        tokens, steps = cache.tokens + ran, cache.steps + jnp.any(ran, axis=1)
        return self.logits(x)[:, 0], cache.replace(memories=tuple(memories), tokens=tokens, steps=steps)

    def _advance(
        self, block: Any, x: Array, memory: Any, place: Place, runs: Array | bool
    ) -> tuple[Array, Any, Bool[Array, " B"]]:
        """One layer of a step, in a branch unless it is known to run: features, memory, and the rows that it ran for."""

        def run(block: Any, x: Array, memory: Any, place: Place) -> tuple[Array, Any, Array]:
            return block.step(x, memory, place)

        def leave(block: Any, x: Array, memory: Any, place: Place) -> tuple[Array, Any, Array]:
            return x, memory, jnp.zeros(x.shape[0], bool)

        if isinstance(runs, bool):
            return (run if runs else leave)(block, x, memory, place)
        if runs.ndim:
            return block.step_rows(x, memory, place, runs)
        return nn.cond(runs, run, leave, block, x, memory, place)
