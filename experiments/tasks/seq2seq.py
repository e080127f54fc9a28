# SPDX-License-Identifier: Apache-2.0
"""Byte-level encoder-decoder language modelling, dense or with a deletion gate steered to a target rate.

Shapes: B batch, N encoder bytes, T decoder bytes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops, registry
from adaptive.deletion import gate as deletion_gate
from adaptive.deletion import objective
from adaptive.deletion.controller import Controller
from experiments import byte_classes, data, parallel
from experiments.data import span_corruption
from experiments.tasks.models import build_t5, check_keys
from layers.t5 import T5

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Deletion:
    """How a gate is trained and evaluated.

    Attributes:
      target: share of bytes that a learned gate is steered to delete.
      regularizer: a name of `adaptive.deletion.objective.REGULARIZERS`.
      entropy_each, entropy_mean: weights of the entropy terms, `entropy_each * each - entropy_mean * mean`; see
        `objective.entropies`.
      alpha: first weight of the gate regulariser; the fixed weight when `controller` is False.
      kp, ki: gains of the controller; windup_limit: the most its integral may be, 0 for no limit, as published; floor: the
        least alpha, 0 as published, or negative so that a gate that deletes too much is rewarded for keeping.
      per: "step" updates the controller once an optimiser step, "microbatch" as often as a step has microbatches, as the
        public code does.
      delay: optimiser steps before the regulariser starts.
      score_weight: of the mean excess of attention logits over 5, which keeps them small when training from scratch (the paper
        uses 0.5 there).
      hard_probability: of a soft training batch in which the keys are removed as in hard deletion.
      train, evaluate: "soft" or "hard", or "" for none.
      by_class: evaluation reports the share deleted of each class of bytes, see `experiments.byte_classes`.
    """

    target: float = 0.5
    controller: bool = True
    regularizer: str = "gate_mean"
    entropy_each: float = 0.0
    entropy_mean: float = 0.0
    alpha: float = 0.0
    kp: float = 0.5
    ki: float = 1e-5
    windup_limit: float = 0.0
    floor: float = 0.0
    per: str = "step"
    delay: int = 0
    score_weight: float = 0.0
    hard_probability: float = 0.0
    train: str = "soft"
    evaluate: str = "hard"
    by_class: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"config.model.deletion.target is {self.target}; a share must lie in (0, 1)")
        choices = {"train": ("soft", "hard", ""), "evaluate": ("soft", "hard", ""), "per": ("step", "microbatch")}
        choices["regularizer"] = tuple(objective.REGULARIZERS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config.model.deletion.{name} is {getattr(self, name)!r}; one of {', '.join(map(repr, allowed))}"
                )
        weights = ("entropy_each", "entropy_mean", "alpha", "kp", "ki", "windup_limit", "delay", "score_weight")
        for name in weights:
            if getattr(self, name) < 0:
                raise ValueError(f"config.model.deletion.{name} is {getattr(self, name)}; it must be 0 or above")
        if self.floor > 0:
            raise ValueError(f"config.model.deletion.floor is {self.floor}; the least alpha is 0 or below")
        if not 0.0 <= self.hard_probability <= 1.0:
            raise ValueError(
                f"config.model.deletion.hard_probability is {self.hard_probability}; a probability lies in [0, 1]"
            )
        if self.hard_probability and self.train != "soft":
            raise ValueError(
                f"config.model.deletion.hard_probability makes some soft batches hard; set train='soft' (got {self.train!r})"
            )


def deletion_section(**values: Any) -> dict[str, Any]:
    """The `deletion` section of a T5's model config, with `values` in place of the defaults.

    Raises:
      ValueError: an unknown key, or a value that cannot be.
    """
    check_keys("model.deletion", values, (field.name for field in dataclasses.fields(Deletion)))
    return dataclasses.asdict(Deletion(**values))


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """Cross-entropy of the decoder's bytes, plus the gate regulariser.

    Attributes:
      model: a T5; deletion: how its gate, if any, is used; inputs_length, targets_length: N and T.
      microbatches: in one optimiser step.
    """

    model: T5
    deletion: Deletion
    inputs_length: int
    targets_length: int
    microbatches: int = 1

    @classmethod
    def from_config(cls, config: ConfigDict) -> Seq2Seq:
        """Reads `config.model` (see `experiments.tasks.models`), its `deletion` section and the lengths of `config.data`.

        Raises:
          ValueError: the data are no text, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        if settings.source != "text":
            raise ValueError(f"the task seq2seq needs text; config.data.source is {settings.source!r}")
        section = dict(config.model.get("deletion", {}))
        deletion = Deletion(**deletion_section(**section))
        if settings.objective == "span_corruption":
            inputs = settings.inputs_length
            targets = span_corruption.lengths(inputs, settings.noise_density, settings.mean_span)[1]
        else:
            # Without a context the encoder sees a single end-of-sequence byte.
            inputs, targets = max(settings.context, 1), settings.targets_length
        model = build_t5(config.model, dtype=config.dtype)
        return cls(model, deletion, inputs, targets, microbatches=config.accumulate)

    @property
    def tokens_per_example(self) -> int:
        """Bytes that enter the encoder."""
        return self.inputs_length

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters that the regulariser steers."""
        return self.model.gate is not None and "gate_logits" in registry.describe(self.model.gate).signals

    def dense(self) -> Seq2Seq:
        """The same task with every byte kept; the parameters fit."""
        return dataclasses.replace(self, deletion=dataclasses.replace(self.deletion, train="", evaluate=""))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one example with full inputs, from the share of bytes that an evaluation kept."""
        spec = self.model.spec()
        kept = metrics["kept"] * self.inputs_length
        deletes = self.model.gate is not None and self.deletion.evaluate == "hard"
        counts = spec.gated_counts(self.inputs_length, kept, self.model.gate_layer) if deletes else None
        return flops.count(spec, inputs=self.inputs_length, targets=self.targets_length, counts=counts)

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables."""
        ids = batch["input_ids"]
        return self.model.init({"params": rng, "deletion": rng}, ids, None, batch["decoder_input_ids"])

    def init_extra(self) -> Any:
        """The controller of a learned gate."""
        return {"controller": Controller.create(self.deletion.alpha)} if self.learned else {}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """The numbers of examples, of decoder bytes that count and of real encoder bytes."""
        return {
            "examples": jnp.float32(batch["labels"].shape[0]),
            "targets": jnp.sum(batch["labels"] != 0, dtype=jnp.float32),
            "inputs": jnp.sum(batch["input_ids"] != 0, dtype=jnp.float32),
        }

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy in nats a byte plus the weighted gate regulariser and score excess, and metrics."""
        mode = (self.deletion.train or None) if self.model.gate else None
        trained = {"hard_probability": self.deletion.hard_probability, "score_excess": self.deletion.score_weight > 0}
        logits, aux = self._apply(params, batch, mode, rng, deterministic=not train, **trained)
        losses, mask = _byte_losses(logits, batch["labels"])
        loss = jnp.sum(losses) / normalizers["targets"]
        metrics = {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))}
        if self.deletion.score_weight > 0:
            metrics["score_excess"] = aux["losses"]["score_excess"]
            loss += self.deletion.score_weight * metrics["score_excess"][0] / normalizers["examples"]
        if mode is None:
            return loss, metrics
        tokens = aux["gate_tokens"]
        metrics["deleted"] = deletion_gate.deleted_share(aux["delete_gate"], tokens, scale=self._scale)
        if self.learned:
            weighted, found = self._regularize(aux, step >= self.deletion.delay, extra["controller"].alpha)
            loss += weighted / normalizers["inputs"]
            metrics |= found
        return loss, metrics

    def _regularize(self, aux: dict[str, Any], active: Any, alpha: Any) -> tuple[Any, dict[str, Any]]:
        """The sum over real bytes that the gate adds to the loss, and its metrics."""
        gate, tokens = aux["delete_gate"], aux["gate_tokens"]
        regularizer = objective.regularizer(self.deletion.regularizer)
        total, count = regularizer(gate, aux["gate_logits"], tokens, scale=self._scale)
        alpha = jnp.where(active, alpha, 0.0)
        metrics = {"gate": deletion_gate.gate_sum(gate, tokens), "gate_alpha": (alpha * count, count)}
        metrics |= {"regularizer": (total, count)} | deletion_gate.saturation(gate, tokens, scale=self._scale)
        weighted = alpha * total
        if self.deletion.entropy_each or self.deletion.entropy_mean:
            each, whole = objective.entropies(gate, tokens)
            entropy = self.deletion.entropy_each * each[0] - self.deletion.entropy_mean * whole[0]
            weighted += jnp.where(active, entropy, 0.0)
        return weighted, metrics

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """The controller after the step, once the delay is over."""
        if not self.learned or not self.deletion.controller:
            return extra
        deleted, count = metrics["deleted"]
        settings = dict(target=self.deletion.target, kp=self.deletion.kp, ki=self.deletion.ki)
        settings["repeats"] = self.microbatches if self.deletion.per == "microbatch" else 1
        settings |= {"windup_limit": self.deletion.windup_limit or None, "floor": self.deletion.floor}
        moved = extra["controller"].update(deleted / count, **settings)
        active = step >= self.deletion.delay
        return {"controller": jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, extra["controller"])}

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Cross-entropy, bits per byte, the share of bytes left, and how the gate decides.

        Each device picks its own rung of the ladder.
        """
        del extra
        mesh = jax.sharding.get_abstract_mesh()
        on_ladder = self.model.gate is not None and self.model.rungs is not None and self.deletion.evaluate == "hard"
        if not on_ladder or mesh.empty or mesh.size == 1:
            return self._evaluate(params, batch)
        if "rng" in registry.describe(self.model.gate).signals:
            # A draw must not depend on the number of devices, so it stays under automatic sharding; there the ladder, whose
            # results are the same with or without it, would wait for the slowest row of all devices.
            return dataclasses.replace(self, model=self.model.clone(rungs=None))._evaluate(params, batch)
        split = jax.sharding.PartitionSpec(parallel.AXES)
        whole = jax.sharding.PartitionSpec()

        @parallel.each_device_alone
        def local(params: Any, batch: Any) -> Any:
            return jax.lax.psum(self._evaluate(params, batch), parallel.AXES)

        return jax.shard_map(local, in_specs=(whole, split), out_specs=whole, check_vma=False)(params, batch)

    def _evaluate(self, params: Any, batch: Any) -> dict[str, Any]:
        mode = (self.deletion.evaluate or None) if self.model.gate else None
        logits, aux = self._apply(params, batch, mode, jax.random.key(0), deterministic=True)
        losses, mask = _byte_losses(logits, batch["labels"])
        weight = batch["weight"][:, None]
        total, count = jnp.sum(losses * weight), jnp.sum(mask * weight)
        inputs = jnp.sum((batch["input_ids"] != 0) * weight)
        left = jnp.sum(aux["tokens"][-1] * batch["weight"])
        return {
            "cross_entropy": (total, count),
            "bits_per_byte": (_LOG2E * total, count),
            "kept": (left.astype(jnp.float32), inputs),
            **self._gate_metrics(aux, batch),
        }

    def _gate_metrics(self, aux: dict[str, Any], batch: Any) -> dict[str, Any]:
        """How decided a learned gate is, and the share deleted of each class of bytes where that is asked for."""
        if aux["delete_gate"] is None:
            return {}
        tokens = aux["gate_tokens"]
        tokens = tokens.replace(mass=tokens.mass * batch["weight"][:, None])
        metrics = {}
        if self.learned:
            metrics = deletion_gate.saturation(aux["delete_gate"], tokens, scale=self._scale)
        if self.deletion.by_class:
            shares = byte_classes.deleted_by_class(aux["kept"], batch["input_ids"], tokens.valid)
            metrics |= {f"deleted/{name}": pair for name, pair in shares.items()}
        return metrics

    @property
    def _scale(self) -> float:
        return dict(self.model.gate_hyper).get("scale", deletion_gate.SCALE)

    def _apply(
        self, params: Any, batch: Any, mode: str | None, rng: Any, *, deterministic: bool, **attributes: Any
    ) -> Any:
        dropout, drawn = jax.random.split(rng)
        return self.model.clone(**attributes).apply(
            {"params": params},
            batch["input_ids"],
            None,
            batch["decoder_input_ids"],
            deletion=mode,
            deterministic=deterministic,
            rngs={"dropout": dropout, "deletion": drawn},
        )


def _byte_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """`(cross-entropy [B, T] in nats, 0 in padding; mask [B, T])`."""
    mask = (labels != 0).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return losses * mask, mask
