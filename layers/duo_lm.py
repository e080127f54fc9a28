# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM: a decoder language model whose feed-forward layers have a small and a big module, with a linear router each.

Shapes: B batch, N tokens, D features, L layers, V vocabulary, K = 3 choices (skip, small, big), S slots of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops
from adaptive.width import duo
from layers.attention import Attention, Memory
from layers.decoder_decoding import Decoding
from layers.decoder_layers import Place, Stream
from layers.linear import Linear
from layers.mlp import GatedMlp
from layers.norms import RMSNorm
from layers.rows import update_rows
from layers.sharding import along_batch


class DuoBlock(nn.Module):
    """`x + Attn(norm x)`, then `x + FFN(norm x)` with the small or the big FFN, or none.

    Attributes:
      big, small: inner widths of the two modules; other attributes are those of `DuoLM`.
    """

    heads: int
    kv_heads: int | None
    big: int
    small: int
    threshold: float = 0.0
    allow_skip: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self) -> None:
        """Creates the parts."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention_norm = RMSNorm(**common)
        self.attention = Attention(
            self.heads,
            kv_heads=self.kv_heads,
            use_bias=False,
            rotary=True,
            implementation=self.implementation,
            **common,
        )
        self.mlp_norm = RMSNorm(**common)
        self.small_mlp = GatedMlp(self.small, activation="silu", **common)
        self.big_mlp = GatedMlp(self.big, activation="silu", **common)
        # Decided in float32, as everything that is compared with a threshold.
        # From zero, so that no layer or token is favoured before training.
        self.router = Linear(
            (len(duo.CHOICES),),
            ("embed", "gate"),
            use_bias=False,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.zeros_init(),
        )

    def attend(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """The shared part."""
        return x + self.attention(self.attention_norm(x), causal=True)[0]

    def remember(self, x: Float[Array, "B N D"]) -> Memory:
        """Keys and values of the tokens of a run, for others to attend to."""
        return self.attention.project(self.attention_norm(x))

    def attend_in(self, x: Float[Array, "B N D"], context: Memory) -> Float[Array, "B N D"]:
        """As `attend`, but each token meets the earlier ones as they are in `context`, and itself as it is in `x`."""
        normed, length = self.attention_norm(x), x.shape[1]
        own = self.attention.project(normed)
        memory = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), context, own)
        place = jnp.arange(length)
        seen = jnp.concatenate([place[:, None] > place, place[:, None] == place], axis=1)
        bias = jnp.broadcast_to(jnp.where(seen, 0.0, -jnp.inf), (1, self.heads, *seen.shape))
        return x + self.attention.attend(normed, memory, bias=bias)

    def feed(self, x: Float[Array, "B N D"], choice: int) -> Float[Array, "B N D"]:
        """One module for all tokens; `choice` is static."""
        if choice == duo.SKIP:
            return x
        module = self.big_mlp if choice == duo.BIG else self.small_mlp
        return x + module(self.mlp_norm(x))

    def feed_each(self, x: Float[Array, "B N D"], choice: Int[Array, "B N"], *, compact: bool) -> Float[Array, "B N D"]:
        """Each token's own choice: run on its rows alone where `compact`, else both modules for all rows."""
        normed = self.mlp_norm(x)
        if not compact:
            return x + duo.masked((self.small_mlp(normed), self.big_mlp(normed)), choice)
        rows, units = normed.reshape(-1, x.shape[-1]), [self._unit(self.small_mlp), self._unit(self.big_mlp)]
        return x + duo.compacted(*units, rows, choice.reshape(-1)).reshape(x.shape)

    def mix(self, x: Float[Array, "B N D"], shares: Float[Array, "B N K"]) -> Float[Array, "B N D"]:
        """The mixture of all choices by a router's shares."""
        normed = self.mlp_norm(x)
        return x + duo.mixture((self.small_mlp(normed), self.big_mlp(normed)), shares)

    def route(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        """The router's logits, from the input of the FFN."""
        return self.router(self.mlp_norm(x).astype(jnp.float32))

    def prefill(self, x: Float[Array, "B N D"], stream: Stream, slots: int) -> tuple[Float[Array, "B N D"], Memory]:
        """Features after the block by its router, and a memory of `slots` slots whose first N hold the tokens."""
        normed = self.attention_norm(x)
        memory = self.attention.project(normed, stream.positions)
        x = x + self.attention.attend(normed, memory, key_bias=stream.key_bias, causal=True, positions=stream.positions)
        choice = self._decide(x)
        choice = choice if stream.valid is None else jnp.where(stream.valid, choice, duo.SKIP)
        shape = (*memory.keys.shape[:2], slots, memory.keys.shape[-1])
        empty = Memory(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        return self.feed_each(x, choice, compact=True), empty.write(memory, 0)

    def step(
        self, x: Float[Array, "B 1 D"], memory: Memory, place: Place
    ) -> tuple[Float[Array, "B 1 D"], Memory, Bool[Array, " B"]]:
        """One token a row by the router, each module on the rows that take it; the rows that took the big one."""
        normed = self.attention_norm(x)
        memory = memory.write(self.attention.project(normed, place.positions), place.slot)
        x = x + self.attention.attend(normed, memory, key_bias=place.key_bias, positions=place.positions)
        choice = self._decide(x)[:, 0]
        fed = x
        for module in (duo.SMALL, duo.BIG):
            fed = update_rows(self, lambda block, rows, own=module: block.feed(rows, own), choice == module, fed)
        return fed, memory, choice == duo.BIG

    def _decide(self, x: Float[Array, "B N D"]) -> Int[Array, "B N"]:
        return duo.decide(self.route(x), self.threshold, allow_skip=self.allow_skip)

    @staticmethod
    def _unit(module: GatedMlp) -> duo.Unit:
        detached = module.clone(parent=None)
        return lambda params, rows: detached.apply({"params": params}, rows), module.variables["params"]


class DuoLM(Decoding):
    """A causal transformer over tokens with rotary positions, RMSNorm and gated (SwiGLU) small and big FFNs.

    Decoding with a cache (`prefill`, `decode_step`, `layers.generation.generate_lm`) goes by the routers; of a layer it counts
    the tokens that took the big module.

    Attributes:
      vocab_size, width, layers, heads, kv_heads: V, D, L, heads, key heads (as many as heads when None).
      big, small: inner widths; the paper's ratio is 16.
      threshold, allow_skip: of the routers in decoding; an infinite threshold is one module for all tokens.

    Source: Alizadeh et al. 2024: Llama-2-like, 12 layers, D 2560, big 10240, small 640.
    """

    vocab_size: int = 384
    width: int = 64
    layers: int = 6
    heads: int = 4
    kv_heads: int | None = None
    big: int = 256
    small: int = 16
    threshold: float = 0.0
    allow_skip: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    # Every layer attends to every token: what is left out is chosen within a layer.
    policy = None
    reads = None

    def setup(self) -> None:
        """Creates the parts."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedding_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=embedding_init, **common)
        self.block = [
            DuoBlock(
                self.heads,
                self.kv_heads,
                self.big,
                self.small,
                self.threshold,
                self.allow_skip,
                implementation=self.implementation,
                **common,
            )
            for _ in range(self.layers)
        ]
        self.norm = RMSNorm(**common)
        self.head = Linear((self.vocab_size,), ("embed", "vocab"), use_bias=False, **common)

    def __call__(
        self,
        ids: Int[Array, "B N"],
        paths: Int[Array, "... L"],
        *,
        compact: bool = False,
        context: Sequence[Memory] | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits `[B, N, V]` when tokens take `paths [B, N, L]`, or what broadcasts to it, such as one pattern `[L]`.

        Args:
          compact: each module runs on its own rows only; else both run for all rows, for training.
          context: of `memories`: each token meets the earlier ones as they were in that run, whatever paths they take here.

        Raises:
          ValueError: the paths do not have one choice for each layer, or do not fit the ids.
        """
        paths = self._check(ids, paths)
        x = self.embed(ids)
        for layer, block in enumerate(self.block):
            x = self.attend(x, layer, None if context is None else context[layer])
            x = block.feed_each(x, paths[..., layer], compact=compact)
        return self.readout(x)

    def soft(
        self,
        ids: Int[Array, "B N"],
        sharpness: float | Array = 1.0,
        *,
        prior: Sequence[float] = (0.0, 0.5, 0.5),
    ) -> tuple[Float[Array, "B N V"], Float[Array, "B N L K"]]:
        """`(logits, shares)` with every layer the mixture of its modules by its router: how routers are trained.

        Arguments and errors are those of `duo.router_shares`.
        """
        x, found = self.embed(ids), []
        for block in self.block:
            x = block.attend(x)
            found.append(duo.router_shares(block.route(x), sharpness, prior=prior))
            x = block.mix(x, found[-1])
        return self.readout(x), jnp.stack(found, axis=2)

    def routed(
        self,
        ids: Int[Array, "B N"],
        threshold: float | Array = 0.0,
        *,
        allow_skip: bool = False,
        compact: bool = True,
    ) -> tuple[Float[Array, "B N V"], Int[Array, "B N L"], Float[Array, "B N L"]]:
        """`(logits, paths, scores)` with the routers' hard choices: big where `duo.big_score` is above `threshold`."""
        x, paths, scores = self.embed(ids), [], []
        for block in self.block:
            x = block.attend(x)
            logits = block.route(x)
            paths.append(duo.decide(logits, threshold, allow_skip=allow_skip))
            scores.append(duo.big_score(logits, allow_skip=allow_skip))
            x = block.feed_each(x, paths[-1], compact=compact)
        return self.readout(x), jnp.stack(paths, axis=-1), jnp.stack(scores, axis=-1)

    def all_big(self, ids: Int[Array, "B N"]) -> Float[Array, "B N V"]:
        """Logits of the dense model: the big module everywhere, and no other is run."""
        x = self.embed(ids)
        for block in self.block:
            x = block.feed(block.attend(x), duo.BIG)
        return self.readout(x)

    def embed(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """The residual stream before the first layer."""
        return along_batch(self.embedding(ids))

    def attend(self, x: Float[Array, "B N D"], layer: int, context: Memory | None = None) -> Float[Array, "B N D"]:
        """The shared part of a layer, among the tokens of `x`, or each by itself in the context of another run."""
        block = self.block[layer]
        return block.attend(x) if context is None else block.attend_in(x, context)

    def memories(self, ids: Int[Array, "B N"], paths: Int[Array, "... L"]) -> tuple[Memory, ...]:
        """Keys and values of each layer when tokens take `paths`: a context for others.

        Raises:
          ValueError: as the call.
        """
        paths = self._check(ids, paths)
        x, found = self.embed(ids), []
        for layer, block in enumerate(self.block):
            found.append(block.remember(x))
            x = block.feed_each(block.attend(x), paths[..., layer], compact=False)
        return tuple(found)

    def feed(self, x: Float[Array, "B N D"], layer: int, choice: int) -> Float[Array, "B N D"]:
        """One module of a layer for all tokens."""
        return self.block[layer].feed(x, choice)

    def readout(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Logits from the residual stream after the last layer."""
        return self.head(self.norm(x))

    @property
    def depth(self) -> int:
        """L, by the name that decoding has for it."""
        return self.layers

    def logits(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """`readout` in float32, by the name that decoding has for it."""
        return self.readout(x).astype(jnp.float32)

    def macs(
        self, *, batch: int = 1, tokens: int, keys: int | None = None, big: float | None = None, small: float = 0.0
    ) -> dict[str, float]:
        """Multiply-accumulates by block.

        Args:
          batch: B; tokens: N; keys: that a token attends to, N when None.
          big, small: mean number of layers in which a token takes that module; big in all layers when None.
        """
        big = self.layers if big is None else big
        inner = self.width if self.kv_heads is None else self.width // self.heads * self.kv_heads
        attention = flops.attention_macs(tokens, tokens, self.width, self.width, inner)
        # Keys of a cache are scored and weighted, not made.
        attention += 0 if keys is None else 2 * tokens * (keys - tokens) * self.width
        macs = {
            "attention": self.layers * attention,
            "big": big * flops.mlp_macs(tokens, self.width, self.big, gated=True),
            "small": small * flops.mlp_macs(tokens, self.width, self.small, gated=True),
            "head": flops.linear_macs(tokens, self.width, self.vocab_size),
        }
        return {name: batch * value for name, value in macs.items()}

    def _check(self, ids: Array, paths: Array) -> Array:
        if paths.shape[-1] != self.layers:
            raise ValueError(
                f"a path has one choice for each of {self.layers} layers; got {paths.shape[-1]} {paths.shape}"
            )
        return jnp.broadcast_to(paths, (*ids.shape, self.layers))
