# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of adaptive depth: tokens that halt (A-ViT), and predictions after every block (early exits).

Shapes: B batch, N tokens, D features, L layers, C classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.depth import exits, halting
from adaptive.tokens import TokenSet
from layers.linear import Linear
from layers.mlp import activation
from layers.norms import LayerNorm
from layers.rows import update_rows
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


@flax.struct.dataclass
class _Leaving:
    """Which images are left, and what the others ended with.

    Attributes:
      threshold: probability at which an image leaves; ensemble: of the ensemble so far, not of the exit alone.
      running: `[B]`; exit: `[B]` where each left, L - 1 until then; taken: `[B, C]` logits there.
    """

    threshold: Float[Array, ""]
    ensemble: Array
    running: Bool[Array, " B"]
    exit: Int[Array, " B"]
    taken: Float[Array, "B C"]

    @classmethod
    def create(cls, model: ExitViT, tokens: TokenSet) -> _Leaving:
        """All images, with what the collection "exits" of the model says.

        Raises:
          ValueError: the model has hooks, which change the number of tokens.
        """
        if model.hooks:
            raise ValueError(f"images leave models without hooks; this one has {len(model.hooks)}")
        rows = tokens.features.shape[0]
        settings = [model.get_variable("exits", name) for name in ("threshold", "ensemble")]
        last = jnp.full(rows, model.depth - 1)
        return cls(*settings, jnp.ones(rows, bool), last, jnp.zeros((rows, model.num_classes), jnp.float32))

    def run(self, block: nn.Module, tokens: TokenSet) -> TokenSet:
        """The tokens after the block in images that are left."""

        def part(block: nn.Module, features: Array, tokens: TokenSet) -> Array:
            return block(tokens.replace(features=features))[0].features

        return tokens.replace(features=update_rows(block, part, self.running, tokens.features, tokens))

    def test(self, logits: Float[Array, "B l C"], weights: Array, bias: Array) -> _Leaving:
        """After the latest of the exits so far."""
        known = logits.shape[1]
        mixed = exits.geometric_ensemble(logits, weights[:known, :known], bias[:known])
        used = jnp.where(self.ensemble, mixed[:, -1], logits[:, -1])
        leaves = self.running & (exits.max_probability(used) >= self.threshold)
        return self.replace(
            running=self.running & ~leaves,
            exit=jnp.where(leaves, known - 1, self.exit),
            taken=jnp.where(leaves[:, None], used, self.taken),
        )


class ExitViT(ViT):
    """A ViT with a head after every block but the last, whose own head is the last exit; needs a class token.

    Aux has "exit_logits" `[B, L - 1, C]`; `ensemble` makes predictions of exits up to each of L. With the collection "exits",
    `{"threshold": (), "ensemble": ()}`, images leave for real: each block runs on those that are left, packed
    (`layers.rows`). Aux then has "exit" `[B]`, where each left, and "taken" `[B, C]`, what was predicted there; "exit_logits"
    and the logits of images that left earlier mean nothing.

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
        # Of the ensembles, which see fixed predictions.
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None))
        weights = self.param("ensemble_weights", zeros, (self.depth, self.depth), jnp.float32)
        bias = self.param("ensemble_bias", zeros, (self.depth, self.num_classes), jnp.float32)
        leaving = _Leaving.create(self, tokens) if self.has_variable("exits", "threshold") else None
        logits, counts = [], []
        for layer in range(self.depth):
            block = self._block(layer=layer, weighted=weighted, deterministic=deterministic, name=f"block_{layer}")
            running = None if leaving is None else leaving.running
            tokens = block(tokens)[0] if leaving is None else leaving.run(block, tokens)
            counts.append(tokens.count if running is None else jnp.where(running, tokens.count, 0))
            if layer == self.depth - 1:
                break
            x = tokens.features[:, 0]
            head = ExitHead(self.num_classes, self.exit_hidden, self.dtype, self.param_dtype, name=f"exit_{layer}")
            before = logits[-1] if self.cascade and logits else None
            logits.append(head(jax.lax.stop_gradient(x) if self.freeze else x, before))
            if leaving is not None:
                leaving = leaving.test(jnp.stack(logits, axis=1), weights, bias)
        handed = {} if leaving is None else {"exit": leaving.exit, "taken": leaving.taken}
        return tokens, None, jnp.stack(counts), {"exit_logits": jnp.stack(logits, axis=1), **handed}

    def leave_early(
        self, params: Any, images: Float[Array, "B y x c"], threshold: float | Array, *, ensemble: bool = False
    ) -> tuple[Float[Array, "B C"], Int[Array, " B"]]:
        """`(logits [B, C], exit [B])` at the first exit whose probability reaches the threshold; later blocks do not run.

        Args:
          params: of the model; threshold: above 1 no image leaves before the last exit.
          ensemble: asks the ensembles of the exits so far, not each exit alone.
        """
        settings = {"threshold": jnp.float32(threshold), "ensemble": jnp.asarray(ensemble)}
        last, aux = self.apply({"params": params, "exits": settings}, images)
        if ensemble:
            last = self.ensemble(params, jnp.concatenate([aux["exit_logits"], last[:, None]], axis=1))[:, -1]
        stayed = aux["exit"] == self.depth - 1
        return jnp.where(stayed[:, None], last, aux["taken"]), aux["exit"]

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
