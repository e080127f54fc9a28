# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction with a decoder language model. Shapes: B batch, N tokens, L layers, V vocabulary."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops
from experiments import data
from experiments.tasks.models import build_decoder
from layers.decoder_lm import DecoderLM

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Cross-entropy of the next token, plus the weighted losses that parts of the model hand out.

    Attributes:
      model: a decoder.
      length: N.
      losses: `((name, weight), ...)` of `aux["losses"]`; those without a weight do not count.
    """

    model: DecoderLM
    length: int
    losses: tuple[tuple[str, float], ...] = ()

    @classmethod
    def from_config(cls, config: ConfigDict) -> LanguageModelling:
        """Reads `config.model` (see `experiments.tasks.models`), its section `losses`, and `config.data`.

        Raises:
          ValueError: the data are not of next-token prediction, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        if settings.get("objective") != "next_token":
            raise ValueError(
                "the task language_modelling needs config.data.objective='next_token'; got "
                f"source={settings.source!r}, objective={settings.get('objective')!r}"
            )
        losses = tuple(sorted(dict(config.model.get("losses", {})).items()))
        return cls(build_decoder(config.model, dtype=config.dtype), settings.length, losses)

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def dense(self) -> LanguageModelling:
        """The same task without adaptivity; the parameters fit."""
        return self

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one sequence."""
        del metrics
        return flops.count(self.model, tokens=self.length)

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables."""
        return self.model.init(rng, batch["input_ids"])

    def init_extra(self) -> dict[str, Any]:
        """Nothing to carry."""
        return {}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """The number of tokens that are predicted."""
        return {"tokens": jnp.sum(batch["labels"] != 0, dtype=jnp.float32)}

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy in nats a token plus the weighted losses of the model, and metrics."""
        del step, extra
        logits, aux = self.model.apply(
            {"params": params}, batch["input_ids"], deterministic=not train, rngs={"dropout": rng}
        )
        losses, mask = token_losses(logits, batch["labels"])
        loss = jnp.sum(losses) / normalizers["tokens"]
        metrics = {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))}
        for name, weight in self.losses:
            total, count = self._handed(aux, name)
            loss += weight * total / normalizers["tokens"]
            metrics[name] = (total, count)
        return loss, metrics

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing to carry."""
        del metrics, step
        return extra

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Cross-entropy, bits a token (bits per byte, where tokens are bytes), accuracy, and tokens that a layer runs for."""
        del extra
        logits, aux = self.model.apply({"params": params}, batch["input_ids"])
        losses, mask = token_losses(logits, batch["labels"])
        weight = batch["weight"][:, None]
        total, count = jnp.sum(losses * weight), jnp.sum(mask * weight)
        right = (jnp.argmax(logits, axis=-1) == batch["labels"]) * mask
        tokens = jnp.mean(aux["tokens"].astype(jnp.float32), axis=0)
        return {
            "cross_entropy": (total, count),
            "bits_per_byte": (_LOG2E * total, count),
            "token_accuracy": (jnp.sum(right * weight), count),
            "tokens_a_layer": (jnp.sum(tokens * batch["weight"]), jnp.sum(batch["weight"])),
        }

    @staticmethod
    def _handed(aux: dict[str, Any], name: str) -> tuple[Any, Any]:
        if name not in aux["losses"]:
            raise ValueError(f"config.model.losses.{name}: this model has the losses {sorted(aux['losses']) or 'none'}")
        return aux["losses"][name]


def token_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """`(cross-entropy [B, N] in nats, 0 in padding; mask [B, N])`; label 0 is padding."""
    mask = (labels != 0).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return losses * mask, mask
