# SPDX-License-Identifier: Apache-2.0
"""Compute accounting: multiply-accumulates of matrix products as a function of tokens, width and attended keys.

One multiply-accumulate (MAC) is 2 FLOPs. Counted are the projections, attention scores and averages (all N x K pairs, masked
or not), MLPs, patch embedding and head; not counted are norms, softmax, activations, biases, look-ups and a method's own
matching (`bipartite_macs` and `merge_macs` give that apart).

Letters: B batch, N tokens, K keys, D width, T decoder tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Count:
    """Multiply-accumulates by block.

    Attributes:
      blocks: name of a block to its MACs.
    """

    blocks: Mapping[str, float]

    @property
    def macs(self) -> float:
        """Sum of all blocks."""
        return sum(self.blocks.values())

    @property
    def flops(self) -> float:
        """Twice the MACs."""
        return 2 * self.macs


class Spec(Protocol):
    """What `count` takes: anything with a `macs` method, or with a `spec()` that returns one."""

    def macs(self, **sizes: Any) -> dict[str, float]:
        """MACs by block."""


def count(module_or_spec: Any, **sizes: Any) -> Count:
    """Multiply-accumulates of a module of `layers/` or of a spec, by block.

    Args:
      module_or_spec: a backbone (it describes itself by `spec()`), or one of the specs below.
      **sizes: as the spec's `macs` takes them, such as `batch=8, counts=(184, 171, ...)`.

    Raises:
      TypeError: the object cannot be counted.
    """
    spec = module_or_spec.spec() if hasattr(module_or_spec, "spec") else module_or_spec
    if not hasattr(spec, "macs"):
        raise TypeError(f"{type(module_or_spec).__name__} has neither spec() nor macs(): pass a backbone or a spec")
    return Count(spec.macs(**sizes))


def linear_macs(rows: float, inputs: int, outputs: int) -> float:
    """MACs of `[rows, inputs] @ [inputs, outputs]`."""
    return rows * inputs * outputs


def attention_macs(queries: float, keys: float, width: int, inner: int, kv_inner: int | None = None) -> float:
    """MACs of an attention layer: four projections and both products with the N x K map, for one sequence.

    Args:
      queries, keys: tokens that ask, tokens that are attended to.
      width: D of the residual stream; inner: heads times head width; kv_inner: the same for grouped keys and values.

    Source: with inner = D, `4 N D^2 + 2 N^2 D`.
    """
    kv_inner = inner if kv_inner is None else kv_inner
    return 2 * queries * width * inner + 2 * keys * width * kv_inner + 2 * queries * keys * inner


def mlp_macs(tokens: float, width: int, hidden: int, *, gated: bool = False) -> float:
    """MACs of an MLP: two matrices, three when gated."""
    return (3 if gated else 2) * tokens * width * hidden


def bipartite_macs(tokens: float, channels: int) -> float:
    """MACs of bipartite matching: every even token against every odd one."""
    return (tokens - tokens // 2) * (tokens // 2) * channels


def merge_macs(tokens: float, slots: float, width: int) -> float:
    """MACs of a merge done as one matrix product."""
    return tokens * slots * width


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """Sizes of a vision transformer; see `layers.vit.ViT` for the names.

    Attributes:
      stem: channels of 3 x 3 convolutions of stride 2 that make the tokens.
    """

    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_classes: int
    image_size: tuple[int, int]
    channels: int = 3
    cls_token: bool = True
    inner: int | None = None
    distillation_token: bool = False
    last_layer_fusion: bool = False
    stem: tuple[int, ...] = ()

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)

    @property
    def tokens(self) -> int:
        """Tokens that enter the first layer."""
        return self.patches + int(self.cls_token) + int(self.distillation_token)

    def macs(
        self, *, batch: int = 1, counts: Sequence[float] | None = None, place: str = "between"
    ) -> dict[str, float]:
        """MACs by block.

        Args:
          batch: B.
          counts: tokens after each layer's reduction; all tokens when None.
          place: "between" attention and MLP, or "after" the block.

        Raises:
          ValueError: one count a layer is needed.
        """
        counts = (self.tokens,) * self.depth if counts is None else tuple(counts)
        if len(counts) != self.depth:
            raise ValueError(f"counts needs one entry for each of {self.depth} layers; got {len(counts)}")
        if place not in ("between", "after"):
            raise ValueError(f"place={place!r}; one of 'between', 'after'")
        inner = self.inner or self.width
        before = (self.tokens, *counts[:-1])
        if self.last_layer_fusion:
            before, counts = (*before[:-1], self.tokens), (*counts[:-1], self.tokens)
        hidden = counts if place == "between" else before
        return {
            "embed": batch * self._embed_macs(),
            "attention": batch * sum(attention_macs(n, n, self.width, inner) for n in before),
            "mlp": batch * sum(mlp_macs(n, self.width, self.mlp_dim) for n in hidden),
            "head": batch * linear_macs(1 + self.distillation_token, self.width, self.num_classes),
        }

    def _embed_macs(self) -> float:
        if not self.stem:
            return linear_macs(self.patches, self.patch_size**2 * self.channels, self.width)
        places, inputs, total = self.image_size[0] * self.image_size[1], self.channels, 0.0
        for channels in self.stem:
            places //= 4
            total += linear_macs(places, 9 * inputs, channels)
            inputs = channels
        return total + linear_macs(self.patches, inputs, self.width)


@dataclasses.dataclass(frozen=True)
class T5Spec:
    """Sizes of an encoder-decoder T5; see `layers.t5.T5` for the names."""

    vocab_size: int
    width: int
    mlp_dim: int
    inner: int
    encoder_layers: int
    decoder_layers: int
    gated: bool = True

    def macs(
        self,
        *,
        batch: int = 1,
        inputs: int,
        targets: int = 0,
        counts: Sequence[float] | None = None,
        entering: float | None = None,
        attended: float | None = None,
        chunker: float = 0.0,
    ) -> dict[str, float]:
        """MACs by block for encoding and scoring one batch (teacher forcing).

        Args:
          batch: B.
          inputs: N encoder tokens; targets: T decoder tokens, 0 for the encoder alone.
          counts: encoder tokens after each layer; all tokens when None.
          entering: tokens that the first layer gets (chunks of the embeddings); N when None.
          attended: tokens that the decoder attends to; the last count when None.
          chunker: MACs of a chunker itself for one sequence.

        Raises:
          ValueError: one count a layer is needed.
        """
        counts = (inputs,) * self.encoder_layers if counts is None else tuple(counts)
        if len(counts) != self.encoder_layers:
            raise ValueError(f"counts needs one entry for each of {self.encoder_layers} layers; got {len(counts)}")
        before = (inputs if entering is None else entering, *counts[:-1])
        attended = counts[-1] if attended is None else attended
        blocks = {
            "encoder_attention": sum(attention_macs(n, n, self.width, self.inner) for n in before),
            "encoder_mlp": sum(mlp_macs(n, self.width, self.mlp_dim, gated=self.gated) for n in before),
        }
        if chunker:
            blocks["chunker"] = chunker
        if targets:
            own = attention_macs(targets, targets, self.width, self.inner)
            cross = attention_macs(targets, attended, self.width, self.inner)
            mlp = mlp_macs(targets, self.width, self.mlp_dim, gated=self.gated)
            blocks |= {
                "decoder_attention": self.decoder_layers * own,
                "cross_attention": self.decoder_layers * cross,
                "decoder_mlp": self.decoder_layers * mlp,
                "head": linear_macs(targets, self.width, self.vocab_size),
            }
        return {name: batch * macs for name, macs in blocks.items()}

    def gated_counts(self, inputs: int, kept: float, gate_layer: int) -> tuple[float, ...]:
        """Encoder tokens after each layer when a gate after `gate_layer` layers keeps `kept` of `inputs` tokens.

        Raises:
          ValueError: the gate layer is outside the encoder.
        """
        if not 1 <= gate_layer <= self.encoder_layers:
            raise ValueError(f"the gate layer must lie in 1..{self.encoder_layers}; got {gate_layer}")
        return (inputs,) * (gate_layer - 1) + (kept,) * (self.encoder_layers - gate_layer + 1)

    def decoding(self) -> T5DecodingSpec:
        """The spec of decoding token by token with a cache."""
        return T5DecodingSpec(self)


@dataclasses.dataclass(frozen=True)
class T5DecodingSpec:
    """Cached decoding of an encoder-decoder T5: keys and values of the encoder's output once, then one token a step."""

    model: T5Spec

    def macs(self, *, batch: int = 1, encoded: float, slots: int, steps: int | None = None) -> dict[str, float]:
        """MACs by block for decoding from an encoder's output; encoding is not part of it.

        Args:
          batch: B.
          encoded: M tokens of the encoder's output.
          slots: T tokens that the cache holds; every step attends to all of them, masked or not.
          steps: tokens decoded; T when None, 0 for the cross-attention's keys and values alone.

        Raises:
          ValueError: more steps than slots, or fewer than none.
        """
        steps = slots if steps is None else steps
        if not 0 <= steps <= slots:
            raise ValueError(f"steps must lie in 0..{slots} (the slots of the cache); got {steps}")
        model, layers = self.model, batch * self.model.decoder_layers
        projection = linear_macs(1, model.width, model.inner)
        return {
            "cross_memory": layers * 2 * encoded * projection,
            "decoder_attention": layers * steps * (4 * projection + 2 * slots * model.inner),
            "cross_attention": layers * steps * (2 * projection + 2 * encoded * model.inner),
            "decoder_mlp": layers * steps * mlp_macs(1, model.width, model.mlp_dim, gated=model.gated),
            "head": batch * steps * linear_macs(1, model.width, model.vocab_size),
        }


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Sizes of a decoder language model; see `layers.decoder_lm.DecoderLM` for the names."""

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    inner: int
    kv_inner: int

    def macs(self, *, batch: int = 1, tokens: int, counts: Sequence[float] | None = None) -> dict[str, float]:
        """MACs by block for scoring one batch.

        Args:
          batch: B.
          tokens: N.
          counts: tokens that each layer runs for, which attend to each other; all tokens when None.

        Raises:
          ValueError: one count a layer is needed.
        """
        counts = (tokens,) * self.depth if counts is None else tuple(counts)
        if len(counts) != self.depth:
            raise ValueError(f"counts needs one entry for each of {self.depth} layers; got {len(counts)}")
        return {
            "attention": batch * sum(attention_macs(n, n, self.width, self.inner, self.kv_inner) for n in counts),
            "mlp": batch * sum(mlp_macs(n, self.width, self.mlp_dim, gated=True) for n in counts),
            "head": batch * linear_macs(tokens, self.width, self.vocab_size),
        }

    def decoding(self) -> DecoderDecodingSpec:
        """The spec of decoding token by token with a cache."""
        return DecoderDecodingSpec(self)


@dataclasses.dataclass(frozen=True)
class DecoderDecodingSpec:
    """Cached decoding with a decoder language model, one token a step; reading the prompt is not part of it."""

    model: DecoderSpec

    def macs(
        self, *, batch: int = 1, slots: int, steps: int, layer_steps: Sequence[float] | None = None
    ) -> dict[str, float]:
        """MACs by block.

        Args:
          batch: B.
          slots: of the cache; every step attends to all of them, masked or not.
          steps: tokens decoded.
          layer_steps: at how many of them each layer runs; at all when None.

        Raises:
          ValueError: one number a layer is needed, in 0..`steps`.
        """
        model = self.model
        layer_steps = (steps,) * model.depth if layer_steps is None else tuple(layer_steps)
        if len(layer_steps) != model.depth or not all(0 <= own <= steps for own in layer_steps):
            raise ValueError(
                f"layer_steps needs one number in 0..{steps} for each of {model.depth} layers; got {layer_steps}"
            )
        ran = batch * sum(layer_steps)
        projections = 2 * linear_macs(1, model.width, model.inner) + 2 * linear_macs(1, model.width, model.kv_inner)
        return {
            "attention": ran * (projections + 2 * slots * model.inner),
            "mlp": ran * mlp_macs(1, model.width, model.mlp_dim, gated=True),
            "head": batch * steps * linear_macs(1, model.width, model.vocab_size),
        }
