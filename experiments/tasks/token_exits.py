# SPDX-License-Identifier: Apache-2.0
"""Language modelling in which each token stops at the first layer that is confident. Shapes: B batch, N tokens, L layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.depth import calm, exits
from experiments.tasks.language_modelling import LanguageModelling, real, token_losses


@dataclasses.dataclass(frozen=True)
class TokenExit(LanguageModelling):
    """Weighted cross-entropy of the head after every layer; in evaluation the prediction of the layer that a token stops at.

    Attributes:
      threshold: of the margin between the two likeliest tokens, above 1 for all layers.

    Source: Schuster et al. 2022 (CALM).

    Differs: tokens are scored in parallel, so those that stop still have keys and values of their own in deeper layers, which
      flatters early exits.
    """

    threshold: float = 0.9

    @classmethod
    def from_config(cls, config: ConfigDict) -> TokenExit:
        """Reads `config.model`: the language model's, and `threshold`."""
        inner = config.copy_and_resolve_references()
        own = {}
        if "threshold" in inner.model:
            own["threshold"] = inner.model.threshold
            with inner.unlocked():
                del inner.model["threshold"]
        plain = LanguageModelling.from_config(inner)
        return cls(plain.model, plain.length, plain.losses, **own)

    def init_extra(self) -> dict[str, Any]:
        """The threshold: an argument of the compiled step."""
        return {"threshold": jnp.float32(self.threshold)}

    def dense(self) -> TokenExit:
        """All layers for every token."""
        return dataclasses.replace(self, threshold=2.0)

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of a sequence: the layers that tokens ran, and a head after each of them."""
        whole = flops.count(self.model, tokens=self.length)
        if self.threshold > 1:
            return whole
        head = self.length * self.model.width * self.model.vocab_size
        layers = (whole.macs - head) / self.model.depth
        return flops.Count({"layers": layers * metrics["layers"], "heads": head * metrics["layers"]})

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The weighted mean of all layers' cross-entropies, and metrics of the last layer."""
        del step, extra
        shares, total, mask = calm.layer_weights(self.model.depth), 0.0, real(batch)
        for share, logits in zip(shares, self._logits(params, batch, not train, rng), strict=True):
            losses = token_losses(logits, batch["labels"], mask)
            total += share * jnp.sum(losses)
        return total / normalizers["tokens"], {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))}

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Cross-entropy, bits a token and layers a token."""
        logits = jnp.stack(self._logits(params, batch, True, None), axis=-2)
        chosen = exits.first_confident(calm.margin(logits), extra["threshold"])
        taken = jnp.take_along_axis(logits, chosen[..., None, None], axis=-2)[..., 0, :]
        mask = real(batch)
        losses, weight = token_losses(taken, batch["labels"], mask), batch["weight"][:, None] * mask
        total, count = jnp.sum(losses * weight), jnp.sum(weight)
        return {
            "cross_entropy": (total, count),
            "bits_per_byte": (total / jnp.log(2.0), jnp.sum(batch.get("bytes", 1) * weight)),
            "layers": (jnp.sum((chosen + 1) * weight), count),
        }

    def _logits(self, params: Any, batch: Any, deterministic: bool, rng: Any) -> list[Any]:
        rngs = {} if rng is None else {"dropout": rng}
        options = dict(deterministic=deterministic, rngs=rngs, output_hidden_states=True)
        last, aux = self.model.apply({"params": params}, batch["input_ids"], **options)
        head = jax.tree_util.Partial(self.model.apply, {"params": params}, method="logits")
        return [*(head(x) for x in aux["hidden_states"][1:-1]), last]
