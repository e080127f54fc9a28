# SPDX-License-Identifier: Apache-2.0
"""Which layers of a decoder run for a token in decoding: by position, by confidence, or always the same.

Values for `DecoderLM.policy`. Shapes: B batch, D width, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.depth import calm, skip_decode


@dataclasses.dataclass(frozen=True)
class SkipSchedule:
    """SkipDecode: fewer layers for later tokens, all rows alike, so that a skipped layer is skipped by the whole batch.

    The layers of a token ran for all tokens before it, so their keys and values are in the cache: nothing is computed again
    or copied. Rows count their own generated tokens, so that prompts of any length share a schedule.

    Attributes:
      counts: layers of each generated token; the last one holds from there on. Prompts run the layers of the first.
      bottom: lowest layers that always run.

    Raises:
      ValueError: at construction, for counts that rise; in a model with fewer layers than that.

    Source: Del Corro et al. 2023; see `adaptive.depth.skip_decode`.
    """

    counts: tuple[int, ...]
    bottom: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        skip_decode.check_counts(self.counts, max((*self.counts, self.bottom)), bottom=self.bottom)

    def prompt_layers(self, depth: int) -> tuple[bool, ...]:
        """Those of the first generated token."""
        return tuple(skip_decode.active_layers(self.counts, depth, bottom=self.bottom)[0].tolist())

    def start(self, x: Float[Array, "B D"]) -> None:
        """Nothing to carry."""

    def runs(
        self, layer: int, position: Int[Array, ""], x: Float[Array, "B D"], state: None, model: Any
    ) -> tuple[Bool[Array, ""] | bool, None]:
        """Whether the schedule has the layer at this position."""
        table = skip_decode.active_layers(self.counts, model.depth, bottom=self.bottom)[:, layer]
        if table.all():
            return True, None
        return jnp.asarray(table)[jnp.minimum(position, len(table) - 1)], None


@dataclasses.dataclass(frozen=True)
class FixedLayers:
    """The same layers for every generated token; prompts run all of them (Unified Layer Skipping).

    Attributes:
      layers: indices from 0, see `skip_decode.evenly_spaced`.

    Raises:
      ValueError: an index that the model does not have.
    """

    layers: tuple[int, ...]

    def prompt_layers(self, depth: int) -> tuple[bool, ...]:
        """All."""
        return (True,) * depth

    def start(self, x: Float[Array, "B D"]) -> None:
        """Nothing to carry."""

    def runs(
        self, layer: int, position: Int[Array, ""], x: Float[Array, "B D"], state: None, model: Any
    ) -> tuple[bool, None]:
        """Whether the layer is one of them; static."""
        if not self.layers or not all(0 <= own < model.depth for own in self.layers):
            raise ValueError(f"layers must be some of 0..{model.depth - 1}; got {self.layers}")
        return layer in self.layers, None


@dataclasses.dataclass(frozen=True)
class ConfidenceExit:
    """CALM: a token stops at the first layer that is confident, each row for itself.

    Features of a token that stopped go up unchanged, and every layer above stores its own keys and values of them, so that
    later tokens find a complete cache. Of a layer runs what the rows that go on need: queries, attention and feed-forward layer
    are packed to about as many rows, and left out when all have stopped.

    Attributes:
      measure: "margin" (of the probabilities; the head runs after every tested layer), "saturation" (of the features), or
        "classifier" (learned, `DecoderLM.exit_classifier`).
      threshold: of the confidence; above 1 nothing stops.
      first: layers that every token runs; every: layers from one test to the next.
      length, decay: how the threshold falls with the position, see `calm.threshold_at`; an infinite decay for not at all.

    Raises:
      ValueError: at construction, for an unknown measure or a value outside its range.

    Source: Schuster et al. 2022; see `adaptive.depth.calm`.
    """

    measure: str = "margin"
    threshold: float = 0.9
    first: int = 1
    every: int = 1
    length: int = 256
    decay: float = 4.0

    def __post_init__(self) -> None:
        if self.measure not in calm.MEASURES:
            raise ValueError(f"measure={self.measure!r} is not one of {calm.MEASURES}")
        if self.first < 1 or self.every < 1:
            raise ValueError(f"first and every must be at least 1 layer; got {self.first} and {self.every}")
        calm.threshold_at(self.threshold, 0, length=self.length, decay=self.decay)

    def prompt_layers(self, depth: int) -> tuple[bool, ...]:
        """All."""
        return (True,) * depth

    def start(self, x: Float[Array, "B D"]) -> tuple[Array, Array]:
        """The rows that run on, and the features before."""
        return jnp.ones(x.shape[0], bool), x

    def runs(
        self, layer: int, position: Int[Array, ""], x: Float[Array, "B D"], state: tuple[Array, Array], model: Any
    ) -> tuple[Bool[Array, " B"] | bool, tuple[Array, Array]]:
        """The rows that were not confident after the layers before."""
        running, before = state
        if layer < self.first:
            return True, (running, x)
        if (layer - self.first) % self.every == 0:
            limit = calm.threshold_at(self.threshold, position, length=self.length, decay=self.decay)
            running &= self.confidence(x, before, model) < limit
        return running, (running, x)

    def confidence(self, x: Float[Array, "B D"], before: Float[Array, "B D"], model: Any) -> Float[Array, " B"]:
        """How sure the model is of stopping with `x`, one layer after `before`."""
        if self.measure == "saturation":
            return calm.saturation(x, before)
        if self.measure == "margin":
            return calm.margin(model.logits(x[:, None])[:, 0])
        return model.exit_confidence(x)
