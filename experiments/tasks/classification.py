# SPDX-License-Identifier: Apache-2.0
"""Image classification with a ViT. Shapes: B batch, N tokens, L layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops
from experiments import data
from experiments.tasks.models import build_vit
from layers.vit import ViT


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross-entropy of one label an image; the model's reduction, if any, acts in training too.

    Attributes:
      model: a ViT with classes.
    """

    model: ViT

    @classmethod
    def from_config(cls, config: ConfigDict) -> Classification:
        """Reads `config.model` (see `experiments.tasks.models`) and the image size of `config.data`.

        Raises:
          ValueError: the data are no images, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        if "image_size" not in settings or settings.source == "moving_digits":
            raise ValueError(f"the task classification needs images; config.data.source is {settings.source!r}")
        return cls(
            build_vit(config.model, image_size=settings.image_size, channels=settings.channels, dtype=config.dtype)
        )

    @property
    def tokens_per_example(self) -> int:
        """Tokens that enter the first layer."""
        return self.model.num_tokens

    def dense(self) -> Classification:
        """The same task without a reduction; the parameters fit."""
        return Classification(self.model.clone(hooks=()))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one image, from the static schedule of the model's reduction."""
        del metrics
        hooks = self.model.hooks
        place = hooks[0].place if hooks else "between"
        return flops.count(self.model, counts=hooks[0].counts if hooks else None, place=place)

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables."""
        return self.model.init({"params": rng, "reduction": rng}, batch["image"])

    def init_extra(self) -> dict[str, Any]:
        """Nothing to carry."""
        return {}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """The number of images."""
        return {"examples": jnp.float32(batch["label"].shape[0])}

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Mean cross-entropy plus the losses of the model's hooks, and metrics."""
        del step, extra
        dropout, reduction = jax.random.split(rng)
        rngs = {"dropout": dropout, "reduction": reduction}
        labels = batch["label"] if train else None
        logits, aux = self.model.apply(
            {"params": params}, batch["image"], labels=labels, deterministic=not train, rngs=rngs
        )
        losses = cross_entropy(logits, batch["label"])
        own = sum(total for total, _ in aux["losses"].values())
        loss = (jnp.sum(losses) + own) / normalizers["examples"]
        return loss, self._metrics(logits, batch, jnp.ones_like(losses)) | aux["losses"]

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing to carry."""
        del metrics, step
        return extra

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Accuracy, cross-entropy and the tokens left after the last layer."""
        del extra
        # Random pruning draws the same for every batch: an evaluation must not depend on how often it ran.
        logits, aux = self.model.apply({"params": params}, batch["image"], rngs={"reduction": jax.random.key(0)})
        weight = batch["weight"]
        left = jnp.sum(aux["tokens"][-1] * weight)
        return self._metrics(logits, batch, weight) | {"tokens_left": (left, jnp.sum(weight))}

    @staticmethod
    def _metrics(logits: Any, batch: Any, weight: Any) -> dict[str, Any]:
        total = jnp.sum(weight)
        right = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return {
            "accuracy": (jnp.sum(right * weight), total),
            "cross_entropy": (jnp.sum(cross_entropy(logits, batch["label"]) * weight), total),
        }


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Cross-entropy in nats of logits `[..., C]` and labels `[...]`, which broadcast."""
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
