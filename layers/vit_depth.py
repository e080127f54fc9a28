# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of adaptive depth: tokens that halt (A-ViT), and predictions after every block (early exits).

Shapes: B batch, N tokens, D features, L layers, C classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive.depth import exits, halting
from adaptive.tokens import TokenSet
from layers.linear import Linear
from layers.mlp import activation
from layers.norms import LayerNorm
from layers.vit import ViT


class HaltingViT(ViT):
    """A ViT whose tokens halt by accumulated scores, which the first channel of the stream carries; no new parameters.

    A halted token is masked from then on, and what a token ends with is the mean of its states weighted by the scores. Its aux
    counts the tokens that run on after each layer, and has the losses "ponder" and "depth".

    Attributes:
      halt_scale, halt_center: the score is `sigmoid(scale x - center)` of the first channel.
      target_depth: mean of the prior over layers.

    Source: Yin et al. 2022 (A-ViT); see `adaptive.depth.halting`.
    """

    halt_scale: float = 10.0
    halt_center: float = 30.0
    target_depth: float = 4.0

    def _unroll(
        self, tokens: TokenSet, weighted: bool, labels: Array | None, deterministic: bool
    ) -> tuple[TokenSet, None, Array, dict[str, Any]]:
        del weighted, labels
        state, valid = halting.Halting.create(tokens), tokens.valid
        out, counts, scores = jnp.zeros_like(tokens.features), [], []
        for layer in range(self.depth):
            running = state.running
            # Where all have halted slot 0 stays a key, so that softmax has one; what it gives is masked.
            seen = running.at[:, 0].max(~jnp.any(running, axis=-1))
            inputs = tokens.replace(
                features=jnp.where(running[..., None], tokens.features, 0), mass=jnp.where(seen, 1.0, 0.0)
            )
            block = self._block(layer=layer, weighted=True, deterministic=deterministic, name=f"block_{layer}")
            features = jnp.where(running[..., None], block(inputs)[0].features, 0)
            score = halting.halting_score(features[..., 0], scale=self.halt_scale, center=self.halt_center)
            scores.append(jnp.where(running, score, 0.0))
            state, weight = state.advance(scores[-1], last=layer == self.depth - 1)
            out += weight[..., None].astype(out.dtype) * features
            tokens = tokens.replace(features=features)
            counts.append(jnp.sum(state.running, axis=-1))
        examples = jnp.float32(valid.shape[0])
        prior = halting.depth_prior_loss(jnp.stack(scores, axis=-1), valid.astype(jnp.float32), self.target_depth)
        ponder = jnp.sum(jnp.where(valid, state.ponder, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        losses = {"ponder": (ponder * examples, examples), "depth": (prior * examples, examples)}
        return tokens.replace(features=out), None, jnp.stack(counts), {"losses": losses}


class ExitHead(nn.Module):
    """Logits `[B, C]` from a block's class token, and in a cascade from the head before: two hidden layers and a linear one.

    Attributes:
      classes: C; hidden: width of both hidden layers.

    Source: Wolczyk et al. 2021 (ZTW), with the heads of Wojcik et al. 2025's comparison.
    """

    classes: int
    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], before: Float[Array, "B C"] | None) -> Float[Array, "B C"]:
        """`before` holds the logits of the head before, None without a cascade; no gradient flows into them."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = LayerNorm(name="norm", **common)(x)
        for index in range(2):
            axes = ("embed", "mlp") if index == 0 else ("mlp", "gate")
            x = activation("gelu")(Linear((self.hidden,), axes, name=f"hidden_{index}", **common)(x))
        if before is not None:
            x = jnp.concatenate([x, LayerNorm(name="before", **common)(jax.lax.stop_gradient(before))], axis=-1)
        return Linear((self.classes,), ("gate", "classes"), name="logits", **common)(x).astype(jnp.float32)


class ExitViT(ViT):
    """A ViT with a head after every block but the last, whose own head is the last exit; needs a class token.

    Aux has "exit_logits" `[B, L - 1, C]`; `ensemble` makes predictions of exits up to each of L.

    Attributes:
      exit_hidden: width of the heads' hidden layers.
      cascade: each head also sees the logits of the one before (ZTW).
      freeze: heads send no gradient into the blocks.
    """

    exit_hidden: int = 64
    cascade: bool = False
    freeze: bool = False

    def _unroll(
        self, tokens: TokenSet, weighted: bool, labels: Array | None, deterministic: bool
    ) -> tuple[TokenSet, None, Array, dict[str, Any]]:
        del labels
        logits, counts = [], []
        for layer in range(self.depth):
            block = self._block(layer=layer, weighted=weighted, deterministic=deterministic, name=f"block_{layer}")
            tokens = block(tokens)[0]
            counts.append(tokens.count)
            if layer == self.depth - 1:
                break
            x = tokens.features[:, 0]
            head = ExitHead(self.num_classes, self.exit_hidden, self.dtype, self.param_dtype, name=f"exit_{layer}")
            before = logits[-1] if self.cascade and logits else None
            logits.append(head(jax.lax.stop_gradient(x) if self.freeze else x, before))
        # Of the ensembles, which see fixed predictions.
        self.param("ensemble_weights", nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None)),
                   (self.depth, self.depth), jnp.float32)  # fmt: skip
        self.param("ensemble_bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None)),
                   (self.depth, self.num_classes), jnp.float32)  # fmt: skip
        return tokens, None, jnp.stack(counts), {"exit_logits": jnp.stack(logits, axis=1)}

    @staticmethod
    def ensemble(params: Any, logits: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        """Logits of the geometric ensemble of the exits up to each layer, from the model's parameters and all exits' logits."""
        return exits.geometric_ensemble(logits, params["ensemble_weights"], params["ensemble_bias"])

    def exit_macs(self) -> tuple[float, ...]:
        """MACs of an image that leaves at each exit, every head on the way counted."""
        blocks = self.spec().macs()
        layer = (blocks["attention"] + blocks["mlp"]) / self.depth
        cascaded = self.num_classes if self.cascade else 0
        heads = [
            self.width * self.exit_hidden
            + self.exit_hidden**2
            + (self.exit_hidden + (cascaded if index else 0)) * self.num_classes
            for index in range(self.depth - 1)
        ]
        done = [blocks["embed"] + (index + 1) * layer + sum(heads[: index + 1]) for index in range(self.depth - 1)]
        return (*done, blocks["embed"] + self.depth * layer + sum(heads) + blocks["head"])
