# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Depths in a decoder: blocks that run for a share of the tokens, packed together, and leave the others alone.

Shapes: B batch, N tokens, C tokens that run, K slots of a cache, D width, G key heads, d head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import registry
from adaptive.depth import mixture_of_depths as mod
from adaptive.tokens import Signals, TokenSet
from layers.attention import Memory
from layers.decoder_layers import Block, Place, Stream
from layers.linear import Linear
from layers.rows import on_rows


@dataclasses.dataclass(frozen=True)
class MixtureOfDepths:
    """Which blocks are routed, and how; a value for `DecoderLM.routing`.

    Attributes:
      share: of the tokens that a routed block runs, in (0, 1].
      every: one block in so many is routed, the last of them; 1 for all.
      weight: what the router's logit becomes before it scales a block's update: "linear" (itself) or "sigmoid".
      choice: "top_k" of the sequence, as in training, or "predictor", which sees no later token; decoding always asks that.
      predictor: "mlp" of the features, without a way back, or "router", whose logits are then trained to be positive where
        the top-k takes a token, at some cost to the language model.
      room: share of the tokens for which there is room where the predictor chooses; those behind it are left alone. With 1
        none is, and a cache is as long as in a dense block.

    Raises:
      ValueError: at construction, for a value outside its range.

    Source: Raposo et al. 2024; half the width in the predictor's hidden layer.
    """

    share: float = 0.125
    every: int = 2
    weight: str = "linear"
    choice: str = "top_k"
    predictor: str = "mlp"
    room: float = 1.0

    def __post_init__(self) -> None:
        mod.capacity(self.share, 1)
        mod.capacity(self.room, 1)
        if self.every < 1:
            raise ValueError(f"every must be at least 1 block; got {self.every}")
        allowed = {"weight": tuple(mod.WEIGHTS), "choice": ("top_k", "predictor"), "predictor": ("mlp", "router")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {values}")

    def acts(self, layer: int) -> bool:
        """Whether the block of that index, from 0, is routed."""
        return layer % self.every == self.every - 1


@flax.struct.dataclass
class RoutedMemory:
    """Keys and values of the tokens that ran, in the first slots of each row.

    Attributes:
      memory: `[B, G, K, d]`; count: `[B]` tokens in it.
    """

    memory: Memory
    count: Int[Array, " B"]


class RoutedBlock(Block):
    """A block that runs for some tokens, which attend to each other alone: `x + weight(r) update(x)` for them.

    Its parameters are those of the plain block, a router and a predictor. Tokens that are not taken come out bit for bit.

    Attributes:
      routing: see `MixtureOfDepths`.
    """

    routing: MixtureOfDepths = MixtureOfDepths()

    def setup(self) -> None:
        super().setup()
        common = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        self.router = Linear((1,), ("embed", "gate"), use_bias=False, **common)
        if self.routing.predictor == "mlp":
            self.predictor = _Predictor(**common)

    def __call__(
        self, x: Float[Array, "B N D"], stream: Stream, inputs: Any = None, deterministic: bool = True
    ) -> tuple[Float[Array, "B N D"], dict[str, Any]]:
        """Features after the block, and what its feed-forward part hands out for the tokens that ran, packed.

        With it come "ran" `[B, N]`, the tokens that ran; "losses" with the pair "router" of the predictor; and
        "predictor_accuracy", tokens of each row on which it agrees with the top-k, and tokens, both `[B]`.
        """
        x, _, _, aux = self._routed(x, stream, inputs, deterministic)
        return x, aux

    def prefill(
        self, x: Float[Array, "B N D"], stream: Stream, slots: int
    ) -> tuple[Float[Array, "B N D"], RoutedMemory]:
        """Features after the block, with the tokens that the predictor takes, and their memory."""
        x, memory, taken, _ = self._routed(x, stream, None, True, choice="predictor")
        empty = self.empty(x, slots)
        return x, empty.replace(memory=empty.memory.write(memory, 0), count=jnp.sum(taken, axis=1, dtype=jnp.int32))

    def empty(self, x: Float[Array, "B N D"], slots: int) -> RoutedMemory:
        """A memory without tokens; it has room for its share of `slots`, and for a step's own token."""
        own = mod.capacity(self.routing.room, slots)
        return RoutedMemory(super().empty(x, own), jnp.zeros(x.shape[0], jnp.int32))

    def step(
        self, x: Float[Array, "B 1 D"], memory: RoutedMemory, place: Place
    ) -> tuple[Float[Array, "B 1 D"], RoutedMemory, Bool[Array, " B"]]:
        """One token a row: the block runs on the rows whose token the predictor takes, packed, and not at all where there
        is none.
        """
        return self.step_rows(x, memory, place, jnp.ones(x.shape[0], bool))

    def step_rows(
        self, x: Float[Array, "B 1 D"], memory: RoutedMemory, place: Place, runs: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], RoutedMemory, Bool[Array, " B"]]:
        """As `step`, among the rows of `runs`. A token that does not run has no keys here."""
        logits, predicted = self._scores(x)
        slots = memory.memory.keys.shape[-2]
        takes = (predicted[:, 0] > 0) & (memory.count < slots) & runs
        weight = mod.WEIGHTS[self.routing.weight](logits[:, 0])
        x, memory = on_rows(self, _step_on, takes, x, memory, place.positions, weight)
        return x, memory, takes

    def _scores(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """Logits of the router, and of the predictor, in float32."""
        logits = self.router(x)[..., 0]
        if self.routing.predictor == "router":
            return logits, logits
        return logits, self.predictor(jax.lax.stop_gradient(x))

    def _routed(
        self, x: Array, stream: Stream, inputs: Any, deterministic: bool, choice: str | None = None
    ) -> tuple[Array, Memory, Bool[Array, "B C"], dict[str, Any]]:
        """Features, the memory of the packed tokens, which of them are real and taken, and aux."""
        length = x.shape[1]
        valid = jnp.ones(x.shape[:2], bool) if stream.valid is None else stream.valid
        logits, predicted = self._scores(x)
        signals = Signals(choice_logits=logits[..., None])
        best = registry.get("mixture_of_depths")(TokenSet.create(x, mask=valid), signals, share=self.routing.share)[
            ..., 0
        ]
        if (choice or self.routing.choice) == "top_k":
            chosen, count = best, mod.capacity(self.routing.share, length)
        else:
            chosen, count = (predicted > 0) & valid, mod.capacity(self.routing.room, length)
        places = jnp.argsort(~chosen, axis=1, stable=True)[:, :count]
        taken, positions = (jnp.take_along_axis(values, places, axis=1) for values in (chosen, stream.positions))
        packed = jnp.take_along_axis(x, places[..., None], axis=1)
        if inputs is not None:
            inputs = jax.tree.map(lambda leaf: _pack(leaf, places), inputs)
        y, memory, aux = self._run(packed, Stream(positions, taken), inputs, deterministic)
        weight = mod.WEIGHTS[self.routing.weight](jnp.take_along_axis(logits, places, axis=1))[..., None]
        y = packed + (weight * (y - packed)).astype(x.dtype)
        where = jnp.where(taken, places, length)
        # Row by row, so that devices with rows of their own exchange nothing.
        put = jax.vmap(lambda old, where, new: old.at[where].set(new, mode="drop"))
        x, ran = put(x, where, y), put(jnp.zeros_like(chosen), where, taken)
        losses = {"router": mod.router_loss(predicted, best, valid)}
        right = jnp.sum(((predicted > 0) == best) & valid, axis=1), jnp.sum(valid, axis=1)
        return x, memory, taken, aux | {"ran": ran, "losses": losses, "predictor_accuracy": right}

    def run_rows(
        self, x: Float[Array, "B 1 D"], memory: RoutedMemory, positions: Int[Array, "B 1"], where: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], Memory]:
        """The plain block's step for rows whose tokens go into slots of their own, `where`; a slot past the end is none.

        Returns the features and the keys and values of the tokens.
        """
        normed = self.attention_norm(x)
        new = self.attention.project(normed, positions)
        slots = jnp.arange(memory.memory.keys.shape[-2])
        held = memory.memory.write_each(new, where)
        key_bias = jnp.where(slots <= where[:, None], 0.0, -jnp.inf)
        x = x + self.attention.attend(normed, held, key_bias=key_bias, positions=positions)
        return self._finish(x, None, True)[0], new


def _step_on(count: int) -> Any:
    """A branch of a step that runs `count` rows."""

    def work(
        block: RoutedBlock, takes: Array, x: Array, memory: RoutedMemory, positions: Array, weight: Array
    ) -> tuple[Array, RoutedMemory]:
        if not count:
            return x, memory
        rows = jnp.argsort(~takes, stable=True)[:count]
        runs = takes[rows]
        where = jnp.where(runs, memory.count[rows], memory.memory.keys.shape[-2])
        packed = x[rows]
        y, new = block.run_rows(packed, jax.tree.map(lambda leaf: leaf[rows], memory), positions[rows], where)
        y = packed + (weight[rows, None, None] * (y - packed)).astype(x.dtype)
        x = x.at[rows].set(jnp.where(runs[:, None, None], y, packed))
        return x, RoutedMemory(memory.memory.write_each(new, where, rows), memory.count + takes)

    return work


class _Predictor(nn.Module):
    """`[..., D]` to a logit `[...]`: whether the top-k would take a token."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Linear((x.shape[-1] // 2,), ("embed", "mlp"), name="hidden", **common)(x)
        return Linear((1,), ("mlp", "gate"), name="out", **common)(jax.nn.silu(y))[..., 0]


def _pack(leaf: Array, places: Int[Array, "B C"]) -> Array:
    """`[B, N, ...]` values of the tokens at `places`; what has no such axes is the same for all tokens."""
    if leaf.ndim < 2:
        return leaf
    return jnp.take_along_axis(leaf, places.reshape(*places.shape, *(1,) * (leaf.ndim - 2)), axis=1)
