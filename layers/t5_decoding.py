# SPDX-License-Identifier: Apache-2.0
"""T5's decoder: scoring whole sequences, and decoding token by token with a cache.

Shapes: B batch, N encoder tokens, M encoder tokens that the decoder sees, T decoder tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.relative_bias import by_kernels
from layers.sharding import along_batch
from layers.t5_layers import DecoderCache, Encoded


class Decoding(nn.Module):
    """The methods of `layers.t5.T5` that concern its decoder; that class makes the parts which they use."""

    def encode(
        self,
        input_ids: Int[Array, "B N"],
        attention_mask: Bool[Array, "B N"] | None = None,
        *,
        deletion: str | None = None,
    ) -> Encoded:
        """The encoder's output as a decoder takes it; arguments and errors are those of the call."""
        features, aux = self(input_ids, attention_mask, deletion=deletion)
        return Encoded(features, aux["key_bias"], aux["tokens"][-1], aux)

    @nn.nowrap
    def unrolled_decoder(self, variables: Any) -> tuple[Any, Any]:
        """A model whose decoder layers are not scanned, and the variables that it takes; for decoding alone.

        In a loop over tokens each step of a scanned stack would copy every layer's weights out of it.

        Raises:
          ValueError: the model has no decoder.
        """
        self._need_decoder()
        if not self.scan_layers:
            return self, variables
        params = dict(variables["params"])
        stack = params.pop("decoder_stack")["layer"]
        for index in range(self.decoder_layers):
            params[f"decoder_{index}"] = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
        return self.clone(scan_layers=False), {**variables, "params": params}

    def decode(self, encoded: Encoded, decoder_input_ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits `[B, T, V]` of whole sequences, each token scored by those before it.

        Raises:
          ValueError: the model has no decoder.
        """
        self._need_decoder()
        return self._score(encoded.features, encoded.key_bias, decoder_input_ids, True)[0]

    def start_decoding(self, encoded: Encoded, max_length: int) -> DecoderCache:
        """The cache for decoding up to `max_length` tokens: each layer's keys and values of `encoded`, none of its own yet.

        Raises:
          ValueError: the model has no decoder, or `max_length` is not positive.
        """
        self._need_decoder()
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token; got {max_length}")
        if self.scan_layers:
            _, cross = self.decoder.remember(encoded.features)
        else:
            cross = tuple(layer.remember(encoded.features) for layer in self.decoder)
        own = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], max_length, x.shape[-1]), x.dtype), cross)
        return DecoderCache(own, cross, encoded.key_bias)

    def decode_step(
        self, cache: DecoderCache, token_ids: Int[Array, " B"], position: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits `[B, V]` of the tokens after `token_ids [B]`, which stand at `position`, and the cache with them.

        The tokens before must have been decoded, in order from position 0 (T5 starts with id 0).

        Raises:
          ValueError: a Python position outside the cache (a traced one cannot be checked).
        """
        places = jnp.arange(cache.slots)
        bias = self.decoder_bias(jnp.reshape(position, (1, 1)), places[None])
        bias = jnp.where(places <= position, bias, -jnp.inf)
        x = along_batch(self.embedding(token_ids[:, None]))
        if self.scan_layers:
            x, own = self.decoder.step(x, cache.own, cache.cross, bias, cache.key_bias, position)
        else:
            own = []
            for layer, memory, cross in zip(self.decoder, cache.own, cache.cross, strict=True):
                x, memory = layer.step(x, memory, cross, bias, cache.key_bias, position)
                own.append(memory)
            own = tuple(own)
        return self._logits(x)[:, 0], cache.replace(own=own)

    def _need_decoder(self) -> None:
        if not self.decoder_layers:
            raise ValueError("this model has no decoder layers (decoder_layers=0), so it cannot decode")

    def _score(
        self, encoded: Float[Array, "B M D"], key_bias: Array, decoder_input_ids: Array, deterministic: bool
    ) -> tuple[Float[Array, "B T V"], Float[Array, " B"] | None]:
        """Logits `[B, T, V]`, and the score excess of cross-attention."""
        positions = jnp.arange(decoder_input_ids.shape[1], dtype=jnp.float32)[None]
        bias = self.decoder_bias(positions, positions, dense=not by_kernels())
        x, total = along_batch(self.embedding(decoder_input_ids)), None
        if self.scan_layers:
            x, excess = self.decoder(x, encoded, bias, key_bias, deterministic)
            total = None if excess is None else jnp.sum(excess, axis=0)
        else:
            for layer in self.decoder:
                x, excess = layer(x, encoded, bias, key_bias, deterministic)
                total = add(total, excess)
        return self._logits(x), total

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = self.decoder_norm(x)
        logits = self.embedding.attend(x * self.width**-0.5) if self.tie_embeddings else self.head(x)
        return logits.astype(jnp.float32)


def add(total: Array | None, value: Array | None) -> Array | None:
    """`total + value`, where None is nothing."""
    if total is None or value is None:
        return total if value is None else value
    return total + value
