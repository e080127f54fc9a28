# SPDX-License-Identifier: Apache-2.0
"""Image classification with adaptive depth: early exits, and tokens that halt.

Shapes: B batch, L layers, C classes, E exits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.depth import exits
from experiments import data
from experiments.tasks.classification import Classification, cross_entropy
from experiments.tasks.models import build_vit
from layers.vit_depth import ExitViT, HaltingViT


def _vit(config: ConfigDict, module: type, own: tuple[str, ...]) -> Any:
    settings = data.resolve(config.data)
    section = {name: value for name, value in config.model.items() if name not in own}
    sizes = dict(image_size=settings.image_size, channels=settings.channels, dtype=config.dtype)
    return build_vit(section, module=module, **sizes)


@dataclasses.dataclass(frozen=True)
class EarlyExit(Classification):
    """Cross-entropy of all exits and of the ensembles, which learn from fixed predictions.

    Attributes:
      threshold: probability at which an image leaves, in evaluation; ensemble: of the ensembles, not of the exits alone.
      leave: in evaluation later blocks do not run for images that left, which takes longer to compile; else they run for all,
        and what is saved is counted only.
    """

    model: ExitViT
    threshold: float = 0.9
    ensemble: bool = False
    leave: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict) -> EarlyExit:
        """Reads `config.model`: the ViT's, `exit_hidden`, `cascade`, `freeze`; and `threshold`, `ensemble`, `leave` of this."""
        names = ("threshold", "ensemble", "leave")
        own = {name: config.model[name] for name in names if name in config.model}
        return cls(_vit(config, ExitViT, names), **own)

    def init_extra(self) -> dict[str, Any]:
        """The threshold: an argument of the compiled step."""
        return {"threshold": jnp.float32(self.threshold)}

    def dense(self) -> EarlyExit:
        """The same without leaving early."""
        return dataclasses.replace(self, threshold=2.0)

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """Mean MACs of an image, by the exits that an evaluation took."""
        macs = self.model.exit_macs()
        if self.threshold > 1:
            return flops.Count({"all": flops.count(self.model).macs})
        return flops.Count({"exits": sum(m * metrics[f"exit/{index}"] for index, m in enumerate(macs))})

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The mean over exits of their cross-entropy, plus that of the ensembles; metrics of the last exit."""
        del step, extra
        logits = self.logits(params, batch["image"], deterministic=not train, rng=rng)
        each = jnp.mean(cross_entropy(logits, batch["label"][:, None]), axis=1)
        mixed = ExitViT.ensemble(params, jax.lax.stop_gradient(logits))
        together = jnp.mean(cross_entropy(mixed, batch["label"][:, None]), axis=1)
        loss = jnp.sum(each + together) / normalizers["examples"]
        return loss, self._metrics(logits[:, -1], batch, jnp.ones_like(each))

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Metrics at the exit that each image takes, and how many take each."""
        weight, last = batch["weight"], self.model.depth - 1
        if self.threshold > 1:
            # The dense model, whose heads are not asked.
            taken = self.logits(params, batch["image"])[:, -1]
            chosen = jnp.full(weight.shape, last)
        elif self.leave:
            taken, chosen = self.model.leave_early(params, batch["image"], extra["threshold"], ensemble=self.ensemble)
        else:
            logits = self.logits(params, batch["image"])
            used = ExitViT.ensemble(params, logits) if self.ensemble else logits
            chosen = exits.first_confident(exits.max_probability(used), extra["threshold"])
            taken = jnp.take_along_axis(used, chosen[:, None, None], axis=1)[:, 0]
        shares = {f"exit/{index}": (jnp.sum((chosen == index) * weight), jnp.sum(weight)) for index in range(last + 1)}
        return self._metrics(taken, batch, weight) | shares

    def logits(self, params: Any, images: Any, *, deterministic: bool = True, rng: Any = None) -> Any:
        """`[B, E, C]` of all exits, the model's own head last."""
        rngs = {} if rng is None else {"dropout": rng}
        last, aux = self.model.apply({"params": params}, images, deterministic=deterministic, rngs=rngs)
        return jnp.concatenate([aux["exit_logits"], last[:, None]], axis=1)


@dataclasses.dataclass(frozen=True)
class Halting(Classification):
    """Cross-entropy plus the weighted ponder and depth losses of a ViT whose tokens halt.

    Attributes:
      ponder_weight, depth_weight: of the losses.

    Source: Yin et al. 2022; weights of the public code.
    """

    model: HaltingViT
    ponder_weight: float = 5e-4
    depth_weight: float = 1e-3

    @classmethod
    def from_config(cls, config: ConfigDict) -> Halting:
        """Reads `config.model`: the ViT's, `halt_scale`, `halt_center`, `target_depth`, and the weights of this task."""
        names = ("ponder_weight", "depth_weight")
        own = {name: config.model[name] for name in names if name in config.model}
        return cls(_vit(config, HaltingViT, names), **own)

    def dense(self) -> Halting:
        """Tokens that never halt by themselves."""
        return dataclasses.replace(self, model=self.model.clone(halt_scale=0.0, halt_center=1e4))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of an image from the mean number of tokens that run each layer."""
        if self.model.halt_scale == 0.0:
            return flops.count(self.model)
        counts = [metrics[f"running/{layer}"] for layer in range(self.model.depth)]
        return flops.count(self.model, counts=counts, place="after")

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The three losses, and metrics."""
        del step, extra
        logits, aux = self.model.apply(
            {"params": params}, batch["image"], deterministic=not train, rngs={"dropout": rng}
        )
        losses = cross_entropy(logits, batch["label"])
        total = jnp.sum(losses)
        for name, weight in (("ponder", self.ponder_weight), ("depth", self.depth_weight)):
            total += weight * aux["losses"][name][0]
        metrics = self._metrics(logits, batch, jnp.ones_like(losses))
        return total / normalizers["examples"], metrics | aux["losses"]

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Metrics, and the tokens that run on after each layer."""
        del extra
        logits, aux = self.model.apply({"params": params}, batch["image"])
        weight = batch["weight"]
        running = {
            f"running/{layer}": (jnp.sum(count * weight), jnp.sum(weight)) for layer, count in enumerate(aux["tokens"])
        }
        return self._metrics(logits, batch, weight) | running
