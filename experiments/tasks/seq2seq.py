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
from adaptive.deletion import objective
from adaptive.deletion.controller import Controller
from experiments import byte_classes, data, parallel
from experiments.tasks import chunking as chunk_tools
from experiments.tasks.deletion import Deletion, deletion_section
from experiments.tasks.models import build_t5, check_keys
from layers.t5 import T5

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """Cross-entropy of the decoder's bytes, plus the gate regulariser, or a chunker's losses.

    Attributes:
      model: a T5; deletion: how its gate, if any, is used; inputs_length, targets_length: N and T.
      groups: of examples whose evaluation metrics are also reported apart, as `bits_per_byte/de`.
      microbatches: in one optimiser step; chunking: weights of the losses of the model's chunker, if any.
    """

    model: T5
    deletion: Deletion
    inputs_length: int
    targets_length: int
    groups: tuple[data.Group, ...] = ()
    microbatches: int = 1
    chunking: chunk_tools.Chunking = dataclasses.field(default_factory=chunk_tools.Chunking)

    @classmethod
    def from_config(cls, config: ConfigDict) -> Seq2Seq:
        """Reads `config.model` (see `experiments.tasks.models`), its sections `deletion` and `chunking`, and `config.data`.

        Raises:
          ValueError: the data are no pairs of byte sequences, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        inputs, targets = data.lengths(settings)
        section = dict(config.model.get("deletion", {}))
        weights = dict(config.model.get("chunking", {}))
        check_keys("model.chunking", weights, (field.name for field in dataclasses.fields(chunk_tools.Chunking)))
        return cls(
            build_t5(config.model, dtype=config.dtype),
            Deletion(**deletion_section(**section)),
            inputs,
            targets,
            data.groups(settings),
            microbatches=config.accumulate,
            chunking=chunk_tools.Chunking(**weights),
        )

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
        deletion = dataclasses.replace(self.deletion, train="", evaluate="", hard_probability=0.0)
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
        """The numbers of examples, of decoder bytes that count, of real encoder bytes, and of rows with any."""
        return {
            "examples": jnp.float32(batch["labels"].shape[0]),
            "targets": jnp.sum(batch["labels"] != 0, dtype=jnp.float32),
            "inputs": jnp.sum(batch["input_ids"] != 0, dtype=jnp.float32),
            "rows": chunk_tools.rows(batch),
        }

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy in nats a byte plus the weighted losses of gate, score excess or chunker, and metrics."""
        mode = (self.deletion.train or None) if self.model.gate else None
        trained = {"hard_probability": self.deletion.hard_probability, "score_excess": self.deletion.score_weight > 0}
        logits, aux = self._apply(params, batch, mode, rng, deterministic=not train, **trained)
        losses, mask = _byte_losses(logits, batch["labels"])
        loss = jnp.sum(losses) / normalizers["targets"]
        metrics = {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))} | _accuracies(logits, batch["labels"])
        if self.deletion.score_weight > 0:
            metrics["score_excess"] = aux["losses"]["score_excess"]
            loss += self.deletion.score_weight * metrics["score_excess"][0] / normalizers["examples"]
        if self.model.chunker:
            own = {name: pair for name, pair in aux["losses"].items() if name != "score_excess"}
            loss += self.chunking.loss(own, normalizers["rows"])
            real_rows = jnp.ones_like(batch["input_ids"][:, 0])
            return loss, metrics | own | chunk_tools.figures(self.model, aux, real_rows)
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
        """Cross-entropy, bits per byte, accuracies and the share of bytes left, of all examples and of each group.

        Also how decided the gate is. Each device picks its own rung of the ladder.
        """
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
        inputs = jnp.sum(batch["input_ids"] != 0, axis=1)
        left = aux["tokens"][-1].astype(jnp.float32)

        def measured(weight: Any) -> dict[str, Any]:
            total, count = jnp.sum(losses * weight[:, None]), jnp.sum(mask * weight[:, None])
            return {
                "cross_entropy": (total, count),
                "bits_per_byte": (_LOG2E * total, count),
                "kept": (jnp.sum(left * weight), jnp.sum(inputs * weight)),
                **_accuracies(logits, batch["labels"], weight),
            }

        metrics = measured(batch["weight"]) | self._gate_metrics(aux, batch)
        if self.model.chunker:
            metrics |= chunk_tools.figures(self.model, aux, batch["weight"])
        for group in self.groups:
            own = measured(batch["weight"] * (batch[group.key] == group.value))
            metrics |= {f"{name}/{group.name}": pair for name, pair in own.items()}
        return metrics

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
            rngs={"dropout": dropout, "deletion": drawn, "chunking": drawn},
        )


def _byte_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """`(cross-entropy [B, T] in nats, 0 in padding; mask [B, T])`."""
    mask = (labels != 0).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return losses * mask, mask


def _accuracies(logits: Any, labels: Any, weight: Any = 1.0) -> dict[str, Any]:
    """Teacher-forced: the share of target bytes that are right, and of examples that are right in all of theirs.

    Examples without a target byte, which fill up a batch, do not count. `weight [B]` is of the examples.
    """
    mask = labels != 0
    right = jnp.sum((jnp.argmax(logits, axis=-1) == labels) & mask, axis=1)
    count = jnp.sum(mask, axis=1)
    counted = (count > 0) * jnp.asarray(weight, jnp.float32)
    return {
        "token_accuracy": (jnp.sum(right * counted), jnp.sum(count * counted)),
        "sequence_accuracy": (jnp.sum((right == count) * counted), jnp.sum(counted)),
    }
