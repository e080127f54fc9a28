# SPDX-License-Identifier: Apache-2.0
"""Byte-level encoder-decoder language modelling, dense, with a deletion gate steered to a target rate, or with a chunker.

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
from adaptive.deletion.controller import Controller
from experiments import data, parallel
from experiments.data import span_corruption
from experiments.tasks import chunking as chunk_tools
from experiments.tasks.models import build_t5, check_keys
from layers.t5 import T5

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Deletion:
    """How a gate is trained and evaluated.

    Attributes:
      target: share of bytes that a learned gate is steered to delete.
      alpha: first weight of the gate regulariser; the fixed weight when `controller` is False.
      kp, ki: gains of the controller; delay: optimiser steps before the regulariser starts.
      train, evaluate: "soft" or "hard", or "" for none.
    """

    target: float = 0.5
    controller: bool = True
    alpha: float = 0.0
    kp: float = 0.5
    ki: float = 1e-5
    delay: int = 0
    train: str = "soft"
    evaluate: str = "hard"

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"config.model.deletion.target is {self.target}; a share must lie in (0, 1)")
        for name in ("train", "evaluate"):
            if getattr(self, name) not in ("", "soft", "hard"):
                raise ValueError(f"config.model.deletion.{name} is {getattr(self, name)!r}; one of 'soft', 'hard', ''")


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """Cross-entropy of the decoder's bytes, plus the gate regulariser, or a chunker's losses.

    Attributes:
      model: a T5; deletion: how its gate, if any, is used; inputs_length, targets_length: N and T; chunking: weights of the
        losses of its chunker, if any.
    """

    model: T5
    deletion: Deletion
    inputs_length: int
    targets_length: int
    chunking: chunk_tools.Chunking = dataclasses.field(default_factory=chunk_tools.Chunking)

    @classmethod
    def from_config(cls, config: ConfigDict) -> Seq2Seq:
        """Reads `config.model` (see `experiments.tasks.models`), its sections `deletion` and `chunking`, and `config.data`.

        Raises:
          ValueError: the data are no text, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        if settings.source != "text":
            raise ValueError(f"the task seq2seq needs text; config.data.source is {settings.source!r}")
        section = dict(config.model.get("deletion", {}))
        check_keys("model.deletion", section, (field.name for field in dataclasses.fields(Deletion)))
        weights = dict(config.model.get("chunking", {}))
        check_keys("model.chunking", weights, (field.name for field in dataclasses.fields(chunk_tools.Chunking)))
        if settings.objective == "span_corruption":
            inputs = settings.inputs_length
            targets = span_corruption.lengths(inputs, settings.noise_density, settings.mean_span)[1]
        else:
            # Without a context the encoder sees a single end-of-sequence byte.
            inputs, targets = max(settings.context, 1), settings.targets_length
        model = build_t5(config.model, dtype=config.dtype)
        return cls(model, Deletion(**section), inputs, targets, chunk_tools.Chunking(**weights))

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
        deletion = dataclasses.replace(self.deletion, train="", evaluate="")
        return dataclasses.replace(self, deletion=deletion, model=self.model.clone(chunker=None))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one example with full inputs, from the share of bytes that an evaluation kept."""
        spec = self.model.spec()
        kept = metrics["kept"] * self.inputs_length
        if self.model.chunker:
            return flops.count(spec, targets=self.targets_length, **self.model.chunk_sizes(self.inputs_length, kept))
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
        """The numbers of decoder bytes that count, of real encoder bytes, and of rows with any."""
        return {
            "targets": jnp.sum(batch["labels"] != 0, dtype=jnp.float32),
            "inputs": jnp.sum(batch["input_ids"] != 0, dtype=jnp.float32),
            "rows": chunk_tools.rows(batch),
        }

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy in nats a byte plus `alpha` times the mean gate value or a chunker's losses, and metrics."""
        mode = (self.deletion.train or None) if self.model.gate else None
        logits, aux = self._apply(params, batch, mode, rng, deterministic=not train)
        losses, mask = _byte_losses(logits, batch["labels"])
        loss = jnp.sum(losses) / normalizers["targets"]
        metrics = {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))}
        if self.model.chunker:
            loss += self.chunking.loss(aux["losses"], normalizers["rows"])
            return loss, metrics | aux["losses"] | chunk_tools.figures(
                self.model, aux, jnp.ones_like(batch["input_ids"][:, 0])
            )
        if mode is None:
            return loss, metrics
        tokens = aux["gate_tokens"]
        metrics["deleted"] = deletion_gate.deleted_share(aux["delete_gate"], tokens, scale=self._scale)
        if self.learned:
            total, count = deletion_gate.gate_sum(aux["delete_gate"], tokens)
            alpha = jnp.where(step >= self.deletion.delay, extra["controller"].alpha, 0.0)
            loss += alpha * total / normalizers["inputs"]
            metrics |= {"gate": (total, count), "gate_alpha": (alpha * count, count)}
            metrics |= deletion_gate.saturation(aux["delete_gate"], tokens, scale=self._scale)
        return loss, metrics

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """The controller after the step, once the delay is over."""
        if not self.learned or not self.deletion.controller:
            return extra
        deleted, count = metrics["deleted"]
        settings = dict(target=self.deletion.target, kp=self.deletion.kp, ki=self.deletion.ki)
        moved = extra["controller"].update(deleted / count, **settings)
        active = step >= self.deletion.delay
        return {"controller": jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, extra["controller"])}

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Cross-entropy, bits per byte and the share of bytes left; each device picks its own rung of the ladder."""
        del extra
        mesh = jax.sharding.get_abstract_mesh()
        deletes = self.model.gate is not None and self.deletion.evaluate == "hard"
        on_ladder = self.model.rungs is not None and (deletes or self.model.chunker is not None)
        if not on_ladder or mesh.empty or mesh.size == 1:
            return self._evaluate(params, batch)
        if self.model.draws_chunks or (deletes and "rng" in registry.describe(self.model.gate).signals):
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
        found = {
            "cross_entropy": (total, count),
            "bits_per_byte": (_LOG2E * total, count),
            "kept": (left.astype(jnp.float32), inputs),
        }
        return found | (chunk_tools.figures(self.model, aux, batch["weight"]) if self.model.chunker else {})

    @property
    def _scale(self) -> float:
        return dict(self.model.gate_hyper).get("scale", deletion_gate.SCALE)

    def _apply(self, params: Any, batch: Any, mode: str | None, rng: Any, *, deterministic: bool) -> Any:
        dropout, drawn = jax.random.split(rng)
        return self.model.apply(
            {"params": params},
            batch["input_ids"],
            None,
            batch["decoder_input_ids"],
            deletion=mode,
            deterministic=deterministic,
            rngs={"dropout": dropout, "deletion": drawn, "chunking": drawn},
        )


def _byte_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """`(cross-entropy [B, T] in nats, 0 in padding; mask [B, T])`."""
    mask = (labels != 0).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return losses * mask, mask
