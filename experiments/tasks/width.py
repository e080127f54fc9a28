# SPDX-License-Identifier: Apache-2.0
"""Image classification with feed-forward layers in groups: experts of a trained layer, or switched channels.

Shapes: B batch, N tokens, R rows, D features, U hidden numbers, K groups.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from adaptive import flops
from adaptive.width import dynamic, moefication
from experiments.tasks.classification import Classification
from layers.experts import ExpertRouter, WidthRouter
from layers.parts import MLP, Parts, captured

_ROUTERS = (ExpertRouter, WidthRouter)


@dataclasses.dataclass(frozen=True)
class Grouped(Classification):
    """Cross-entropy, and the share of hidden units that run as a metric; the model's parts are grouped."""

    def dense(self) -> Classification:
        """The dense model over the same parameters."""
        return Classification(self.model.clone(parts=Parts()))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of an image: the dense model's, with the routers and the share of hidden units that run."""
        blocks = flops.count(self.model).blocks
        routers = self.model.depth * self.model.num_tokens * self.model.parts.router_macs(self.model.width)
        return flops.Count({**blocks, "mlp": blocks["mlp"] * metrics["share"], "routers": routers})

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Metrics, and the share of hidden units that run."""
        with captured(lambda module: isinstance(module, _ROUTERS)) as calls:
            metrics = super().eval_step(params, batch, extra=extra)
        share = sum(jnp.mean(call.result, axis=(1, 2)) for call in calls.values()) / len(calls)
        return metrics | {"share": (jnp.sum(share * batch["weight"]), jnp.sum(batch["weight"]))}


@dataclasses.dataclass(frozen=True)
class DynamicWidth(Grouped):
    """Training of switched channels: cross-entropy plus twice the squared distance of the share of compute from a target.

    Attributes:
      target: share of the feed-forward layers' compute; warmup: steps over which it falls from 1.

    Source: Zhao et al. 2025 (DyDiT), weight 2 as there.
    """

    target: float = 0.5
    warmup: int = 100

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Both losses, and metrics."""
        parts = dataclasses.replace(self.model.parts, sample=train)
        with captured(lambda module: isinstance(module, WidthRouter)) as calls:
            loss, metrics = Classification(self.model.clone(parts=parts)).loss(
                params, batch, rng=rng, step=step, extra=extra, normalizers=normalizers, train=train
            )
        share = sum(jnp.mean(call.result) for call in calls.values()) / len(calls)
        target = dynamic.ramp(step, self.target, self.warmup)
        examples = jnp.float32(batch["label"].shape[0])
        own = 2 * dynamic.compute_loss(share, target)
        return loss + own * examples / normalizers["examples"], metrics | {"share": (share * examples, examples)}


@dataclasses.dataclass(frozen=True)
class RouterTraining(Grouped):
    """Training of the experts' routers on the activations of the layers, which stay as they are."""

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The mean over layers of the routers' losses."""
        del rng, step, extra, train
        model = self.model.clone(parts=Parts())
        with captured(lambda module: module.path[-1:] == (MLP,)) as calls:
            model.apply({"params": params}, batch["image"])
        parts, losses = self.model.parts, []
        for path, call in calls.items():
            own = params
            for name in path.split("/"):
                own = own[name]
            x = jax.lax.stop_gradient(call.given)
            hidden = jax.nn.relu(jnp.tensordot(x, own["hidden"]["kernel"], 1) + own["hidden"]["bias"])
            target = moefication.routing_target(
                jax.lax.stop_gradient(hidden).reshape(-1, hidden.shape[-1]), parts.groups
            )
            logits = parts.router().apply({"params": own["router"]}, x, method="logits")
            losses.append(moefication.routing_loss(logits.reshape(target.shape), target))
        examples = jnp.float32(batch["label"].shape[0])
        loss = sum(losses) / len(losses) * examples
        return loss / normalizers["examples"], {"router": (loss, examples)}


def moefy(params: Any, task: Grouped, key: Any, batch: Any, *, seed: int = 0) -> Any:
    """Parameters of a trained ReLU model with its hidden neurons in clusters, and fresh routers, for the task's model."""
    parts = task.model.parts
    fresh = jax.tree.map(np.asarray, jax.jit(lambda: _unboxed(task, key, batch))())
    result = dict(params)
    for name in [name for name in params if name.startswith("block_")]:
        mlp = params[name][MLP]
        kernel = np.asarray(mlp["hidden"]["kernel"])
        order = moefication.balanced_clusters(kernel.T, parts.groups, seed=seed)
        hidden = {"kernel": mlp["hidden"]["kernel"][:, order], "bias": mlp["hidden"]["bias"][order]}
        out = {**mlp["out"], "kernel": mlp["out"]["kernel"][order]}
        result[name] = {**params[name], MLP: {"hidden": hidden, "out": out, "router": fresh[name][MLP]["router"]}}
    return result


def with_routers(params: Any, task: Grouped, key: Any, batch: Any) -> Any:
    """Parameters of a trained model with fresh routers, for the task's model."""
    fresh = jax.jit(lambda: _unboxed(task, key, batch))()
    return {
        name: {**value, MLP: {**value[MLP], "router": fresh[name][MLP]["router"]}}
        if name.startswith("block_")
        else value
        for name, value in params.items()
    }


def _unboxed(task: Any, key: Any, batch: Any) -> Any:
    return meta.unbox(task.init(key, batch))["params"]
