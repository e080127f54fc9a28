# SPDX-License-Identifier: Apache-2.0
"""Adaptive Computation Modules around any other task: distillation of modules, pre-training of gates, end-to-end training.

The task that is wrapped runs as it is; what goes in and out of modules and what gates choose is captured on the way.

Shapes: B batch, N tokens, R rows, D features, K learners, C classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive import flops, relaxations
from adaptive.width import acm
from experiments import parallel
from experiments.tasks.models import check_keys
from layers.acm import AcmParts, Gate, Module, acmize, gate_logits, modules, weights
from layers.parts import captured

# Which modules of a model become learners, by the name of the task that it is trained with.
WHERE = {"classification": ".*", "language_modelling": ".*", "seq2seq": "encoder_.*"}
SECTION = {
    "task": "classification",
    "learners": 4,
    "gate_hidden": (16, 16),
    "temperature": 0.8,
    "projections": True,
    # "random", or "dense": learners cut from the dense modules; see `layers.acm.acmize`.
    "start": "random",
    "target": 0.5,
    "budget_weight": 0.1,
    # Whose cost the budget is: "drawn", of the choices drawn in training (the paper's), or "argmax", of those of inference.
    "budget_on": "drawn",
    "entropy_weight": 0.05,
    "diversity_weight": 0.05,
    # "task", or "distillation": Kullback-Leibler divergence from a teacher's predictions, which a caller gives.
    "loss": "task",
    # Not 0: every token gets so many learners, and gates are not used.
    "uniform": 0,
    "phases": {},
}
# Steps and learning rates of the phases before the last one, and the threshold of labels; see `experiments.acm`.
PHASES = {
    "dense_steps": 1_000,
    "dense_peak": 2e-3,
    "dense_warmup": 100,
    "dense_weight_decay": 0.05,
    "distill_steps": 300,
    "distill_peak": 1e-3,
    "gate_steps": 150,
    "gate_peak": 1e-2,
    "tau": 1 / 1.2,
}


def acm_section(**values: Any) -> dict[str, Any]:
    """The `acm` section of a model config, with `values` in place of the defaults."""
    check_keys("model.acm", values, SECTION)
    return {**SECTION, **values, "phases": phase_settings(values)}


def phase_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The `phases` of an `acm` section, with defaults.

    Raises:
      ValueError: an unknown key.
    """
    given = dict(section.get("phases", {}))
    check_keys("model.acm.phases", given, PHASES)
    return {**PHASES, **given}


@dataclasses.dataclass(frozen=True)
class Acm:
    """End-to-end training (phase 3): the wrapped task's loss, plus budget, entropy and diversity of the choices.

    Attributes:
      inner: the task with the dense model.
      parts: the learners; settings: the `acm` section.
      teacher: parameters of the dense model, for loss="distillation" and the other phases.

    Source: Wojcik et al. 2025.
    """

    inner: Any
    parts: AcmParts
    settings: Mapping[str, Any]
    teacher: Any = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_config(cls, config: ConfigDict, **options: Any) -> Acm:
        """Reads `config.model.acm` (see `SECTION`); all else of `config.model` is the dense model's.

        Raises:
          ValueError: the wrapped task is unknown, or a setting is out of range.
        """
        # The package builds every task, this one included.
        from experiments import tasks

        settings = acm_section(**dict(config.model.get("acm", {})))
        if settings["task"] not in WHERE:
            raise ValueError(f"model.acm.task is {settings['task']!r}; one of {', '.join(WHERE)}")
        if settings["loss"] not in ("task", "distillation"):
            raise ValueError(f"model.acm.loss is {settings['loss']!r}; one of task, distillation")
        if settings["budget_on"] not in ("drawn", "argmax"):
            raise ValueError(f"model.acm.budget_on is {settings['budget_on']!r}; one of drawn, argmax")
        acm.check_target(settings["target"])
        inner = config.copy_and_resolve_references()
        with inner.unlocked():
            inner.task = settings["task"]
            del inner.model["acm"]
        names = ("learners", "gate_hidden", "temperature", "projections")
        own = {name: settings[name] for name in names} | {"gate_hidden": tuple(settings["gate_hidden"])}
        return cls(tasks.build(inner), AcmParts(**own), settings, **options)

    # ---- What every task has.

    @property
    def model(self) -> Any:
        """The model with learners, as it is evaluated."""
        return self.within("skip").model

    @property
    def tokens_per_example(self) -> int:
        """That of the wrapped task."""
        return self.inner.tokens_per_example

    @property
    def where(self) -> str:
        """Pattern for the modules that become learners."""
        return WHERE[self.settings["task"]]

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables of the model with learners, all drawn anew."""
        return self.within("masked").init(rng, batch)

    def init_extra(self) -> dict[str, Any]:
        """The target, and the teacher's parameters where there is one: arguments of the compiled step, kept in checkpoints."""
        target = {"target": jnp.float32(self.settings["target"])}
        return target if self.teacher is None else target | {"teacher": self.teacher}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """Those of the wrapped task, and the number of examples."""
        return self.inner.normalizers(batch) | {"acm_examples": _examples(batch)}

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing moves."""
        del metrics, step
        return extra

    def dense(self) -> Acm:
        """The same with all learners on and no gates, which costs what the dense model costs."""
        return dataclasses.replace(self, settings={**self.settings, "uniform": self.parts.learners})

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one example: the dense model's, with gates and the learners that an evaluation used in place of modules."""
        whole = self.inner.count({**metrics, "kept": 1.0})
        if self.settings["uniform"] == self.parts.learners:
            return whole
        spent = {name: metrics[f"macs/{name}"] for name in ("gates", "learners")}
        return flops.Count({"dense": whole.macs - metrics["macs/replaced"], **spent})

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The loss of phase 3 and metrics. With microbatches the budget is that of each, as the others are means over them."""
        task = self.within("sample" if train else "masked")
        with captured(_gates_and_model) as calls:
            options = {"rng": rng, "step": step, "normalizers": normalizers, "train": train}
            loss, metrics = task.loss(params, batch, extra={}, **options)
        if self.settings["loss"] == "distillation":
            loss = self._distance(calls[""].result[0], batch, extra, options)
        if self.settings["uniform"]:
            return loss, metrics
        found = self.modules(batch)
        chosen = _chosen(calls, found)
        weight = _real(batch, chosen[0])
        costs = [module.learner for module in found]
        counted = chosen if self.settings["budget_on"] == "drawn" else self._argmax(params, calls, found)
        share = acm.spent(counted, costs, weight)
        terms = {
            "budget": acm.budget_loss(share, extra["target"]),
            "entropy": acm.entropy_loss(chosen, weight, least=[module.least for module in found]),
            "diversity": acm.diversity_loss(chosen, weight),
        }
        examples = _examples(batch)
        part = examples / normalizers["acm_examples"]
        loss += part * sum(self.settings[f"{name}_weight"] * value for name, value in terms.items())
        measured = {f"acm/{name}": (value * examples, examples) for name, value in terms.items()}
        return loss, metrics | measured | {"share": (jnp.sum(share), examples)}

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """The wrapped task's metrics, the share of learners' cost, learners used by module, and the load of each choice."""
        del extra
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._evaluate(params, batch)
        # Rows are sorted among those of one device.
        split, whole = jax.sharding.PartitionSpec(parallel.AXES), jax.sharding.PartitionSpec()

        @parallel.each_device_alone
        def local(params: Any, batch: Any) -> Any:
            return jax.lax.psum(self._evaluate(params, batch), parallel.AXES)

        return jax.shard_map(local, in_specs=(whole, split), out_specs=whole, check_vma=False)(params, batch)

    def _evaluate(self, params: Any, batch: Any) -> dict[str, Any]:
        with captured(_gates_and_model) as calls:
            metrics = self.within("skip").eval_step(params, batch, extra={})
        found, examples = self.modules(batch), jnp.sum(batch["weight"])
        if self.settings["uniform"]:
            used = {module.path: max(self.settings["uniform"], module.least) for module in found}
            return metrics | self._spent(found, used, examples, gates=0)
        chosen, used = _chosen(calls, found), {}
        real = _real(batch, chosen[0])
        weight = real * batch["weight"][:, None]
        total = jnp.sum(weight)
        for module, units in zip(found, chosen, strict=True):
            numbers = jnp.sum(units, axis=-1)
            used[module.path] = jnp.sum(numbers * weight) / jnp.maximum(total, 1.0)
            for number in range(module.least, units.shape[-1] + 1):
                metrics[f"load/{module.path}/{number}"] = (jnp.sum((numbers == number) * weight), total)
        share = acm.spent(chosen, [module.learner for module in found], real)
        metrics["share"] = (jnp.sum(share * batch["weight"]), examples)
        return metrics | self._spent(found, used, examples, gates=1)

    def _spent(self, found: Any, used: Mapping[str, Any], examples: Any, *, gates: int) -> dict[str, Any]:
        """Learners used by module, and the MACs of an example that `count` needs; means weighed by examples."""
        tokens = self.tokens_per_example
        macs = {
            "replaced": sum(tokens * module.dense for module in found),
            "gates": gates * sum(tokens * module.gate for module in found),
            "learners": sum(tokens * module.learner * used[module.path] for module in found),
        }
        return {f"learners/{path}": (number * examples, examples) for path, number in used.items()} | {
            f"macs/{name}": (value * examples, examples) for name, value in macs.items()
        }

    # ---- Phases.

    def start(self, params: Any, key: Any) -> Any:
        """The parameters with fresh learners and gates, from those of the dense model."""
        options = {"where": self.where, "start": self.settings["start"]}
        return jax.jit(lambda params, key: acmize(params, self.parts, key, **options))(params, key)

    def distillation(self, teacher: Any) -> Distillation:
        """Phase 1 from this dense model."""
        return Distillation(self.inner, self.parts, self.settings, teacher)

    def gate_training(self, teacher: Any, tau: float) -> GateTraining:
        """Phase 2 with labels by `tau`."""
        return GateTraining(self.inner, self.parts, self.settings, teacher, tau)

    def modules(self, batch: Any) -> tuple[Module, ...]:
        """The modules that become learners, found in the shapes of the dense model's parameters."""
        abstract = jax.eval_shape(lambda batch: self.inner.init(jax.random.key(0), batch)["params"], batch)
        return modules(abstract, self.parts, where=self.where)

    def teacher_calls(self, batch: Any, extra: Any, **options: Any) -> dict[str, tuple[Any, Any]]:
        """Inputs `[R, D]` and outputs `[R, E]` of each module of the teacher, by path."""
        found = {module.path: module for module in self.modules(batch)}
        with captured(lambda module: "/".join(module.path) in found) as calls:
            self.inner.loss(extra["teacher"], batch, extra={}, **{**options, "train": False})
        return {
            path: (calls[path].given.reshape(-1, m.inputs), calls[path].result.reshape(-1, m.outputs))
            for path, m in found.items()
        }

    def within(self, mode: str) -> Any:
        """The wrapped task on the model with learners, in a mode of `layers.acm.MODES`."""
        if self.settings["uniform"]:
            parts = dataclasses.replace(self.parts, mode="uniform", number=self.settings["uniform"])
        else:
            parts = dataclasses.replace(self.parts, mode=mode)
        return dataclasses.replace(self.inner, model=self.inner.model.clone(parts=parts))

    def _argmax(self, params: Any, calls: Mapping[str, Any], found: Any) -> list[Any]:
        """Units `[B, N, K]` that inference would run, with the gradient of the soft choice."""
        chosen = []
        for module in found:
            given = calls[f"{module.path}/learners/gate"].given
            logits = gate_logits(params, module, self.parts, given)
            soft = jax.nn.softmax(logits / self.parts.temperature)
            chosen.append(acm.units(relaxations.straight_through(acm.choose(logits), soft), self.parts.learners))
        return chosen

    def _distance(self, logits: Any, batch: Any, extra: Any, options: Mapping[str, Any]) -> Any:
        """Mean divergence of the predictions from the teacher's, over examples and targets."""
        with captured(lambda module: not module.path) as calls:
            self.inner.loss(extra["teacher"], batch, extra={}, **{**options, "train": False})
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(calls[""].result[0]))
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)
        mask = jnp.ones_like(divergence) if divergence.ndim == 1 else (batch["labels"] != 0).astype(jnp.float32)
        normalizers = options["normalizers"]
        names = ("examples",) if divergence.ndim == 1 else ("targets", "tokens")
        return jnp.sum(divergence * mask) / next(normalizers[name] for name in names if name in normalizers)


@dataclasses.dataclass(frozen=True)
class Distillation(Acm):
    """Phase 1: all modules at once learn to give what the dense ones give, with every number of learners."""

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The mean over modules of their distances, and the loss of each as a metric."""
        del train
        calls = self.teacher_calls(batch, extra, rng=rng, step=step, normalizers=normalizers)
        losses = {
            m.path: acm.distillation_loss(self.outputs(params, m, calls), calls[m.path][1]) for m in self.modules(batch)
        }
        examples = _examples(batch)
        part = examples / normalizers["acm_examples"]
        return part * sum(losses.values()) / len(losses), {
            f"distillation/{path}": (value * examples, examples) for path, value in losses.items()
        }

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """For each module the share of the teacher's output, in squares, that each number of learners misses."""
        options = dict(rng=jax.random.key(0), step=0, normalizers=self.normalizers(batch))
        calls = self.teacher_calls(batch, extra, **options)
        weight, metrics = batch["weight"], {}
        for module in self.modules(batch):
            target = calls[module.path][1]
            rows = jnp.repeat(weight, target.shape[0] // weight.shape[0])
            missed = jnp.square(acm.errors(self.outputs(params, module, calls), target))
            whole = jnp.sum(rows * missed[:, 0])
            for number in range(1, missed.shape[1]):
                metrics[f"missed/{module.path}/{number}"] = (jnp.sum(rows * missed[:, number]), whole)
        return metrics

    def outputs(self, params: Any, module: Module, calls: Mapping[str, Any]) -> Any:
        """`[R, K + 1, E]`, what the learners of a module make of the teacher's inputs."""
        up, bias, down = weights(params, module)
        return acm.prefixes(calls[module.path][0], up, bias, down, self.parts.learners, activation=module.activation)


@dataclasses.dataclass(frozen=True)
class GateTraining(Distillation):
    """Phase 2: gates learn labels made from the errors of each number of learners, which stay as they are.

    Attributes:
      tau: share of the error that a further learner has to leave to be left out.
    """

    tau: float = 1 / 1.2

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The mean over modules of the cross-entropy of their gates."""
        del train
        calls = self.teacher_calls(batch, extra, rng=rng, step=step, normalizers=normalizers)
        examples, losses = _examples(batch), {}
        for module in self.modules(batch):
            labels, logits = self._labels(params, module, calls)
            losses[module.path] = acm.gate_loss(logits, labels, self.parts.learners)
        part = examples / normalizers["acm_examples"]
        return part * sum(losses.values()) / len(losses), {
            f"gate/{path}": (value * examples, examples) for path, value in losses.items()
        }

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """How often gates agree with their labels, and how often each label stands, `label/PATH/NUMBER`."""
        calls = self.teacher_calls(batch, extra, rng=jax.random.key(0), step=0, normalizers=self.normalizers(batch))
        metrics = {}
        for module in self.modules(batch):
            labels, logits = self._labels(params, module, calls)
            weight = jnp.repeat(batch["weight"], labels.shape[0] // batch["weight"].shape[0])
            total = jnp.sum(weight)
            agreed = jnp.argmax(logits, axis=-1) + module.least == labels
            metrics[f"agreement/{module.path}"] = (jnp.sum(agreed * weight), total)
            for number in range(self.parts.learners + 1):
                metrics[f"label/{module.path}/{number}"] = (jnp.sum((labels == number) * weight), total)
        return metrics

    def _labels(self, params: Any, module: Module, calls: Mapping[str, Any]) -> tuple[Any, Any]:
        """`(labels [R], logits [R, choices])`."""
        given, target = calls[module.path]
        distances = acm.errors(jax.lax.stop_gradient(self.outputs(params, module, calls)), target)
        return acm.gate_labels(distances, self.tau), gate_logits(params, module, self.parts, given)


def _chosen(calls: Mapping[str, Any], found: Any) -> list[Any]:
    """Units `[B, N, K]` of each module."""
    return [calls[f"{module.path}/learners/gate"].result for module in found]


def label_histograms(metrics: Mapping[str, float]) -> dict[str, np.ndarray]:
    """`[K + 1]` shares of labels of each module, from the evaluation metrics of `GateTraining`."""
    found: dict[str, dict[int, float]] = {}
    for name, value in metrics.items():
        if match := re.fullmatch(r"label/(.+)/(\d+)", name):
            found.setdefault(match[1], {})[int(match[2])] = value
    return {path: np.array([shares[number] for number in sorted(shares)]) for path, shares in found.items()}


def loads(metrics: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Share of tokens that use each number of learners, by module, from the evaluation metrics of `Acm`."""
    found: dict[str, dict[int, float]] = {}
    for name, value in metrics.items():
        if match := re.fullmatch(r"load/(.+)/(\d+)", name):
            found.setdefault(match[1], {})[int(match[2])] = float(value)
    return found


def _gates_and_model(module: Any) -> bool:
    return isinstance(module, Gate) or not module.path


def _examples(batch: Any) -> Any:
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def _real(batch: Any, chosen: Any) -> Any:
    """`[B, N]` 1 for tokens that are no padding."""
    if "input_ids" not in batch:
        return jnp.ones(chosen.shape[:2], jnp.float32)
    return (batch["input_ids"] != 0).astype(jnp.float32)
