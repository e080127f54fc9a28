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

from adaptive import flops
from adaptive.width import acm
from experiments.tasks.models import check_keys
from layers.acm import AcmParts, Gate, Learners, Module, acmize, gate_logits, modules, weights
from layers.parts import Parts, captured

# Which modules of a model become learners, by the name of the task that it is trained with.
WHERE = {"classification": ".*", "seq2seq": "encoder_.*"}
SECTION = {
    "task": "classification",
    "learners": 4,
    "gate_hidden": (16, 16),
    "temperature": 0.8,
    "projections": True,
    "target": 0.5,
    "budget_weight": 0.1,
    "entropy_weight": 0.05,
    "diversity_weight": 0.05,
    # "task", or "distillation": Kullback-Leibler divergence from a teacher's predictions, which a caller gives.
    "loss": "task",
    # Not 0: every token gets so many learners, and gates are not used.
    "uniform": 0,
}


def acm_section(**values: Any) -> dict[str, Any]:
    """The `acm` section of a model config, with `values` in place of the defaults."""
    check_keys("model.acm", values, SECTION)
    return {**SECTION, **values}


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
        return self._with("skip").model

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
        return self._with("masked").init(rng, batch)

    def init_extra(self) -> dict[str, Any]:
        """The teacher's parameters, where there is one: an argument of the compiled step, and part of its checkpoints."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """Those of the wrapped task."""
        return self.inner.normalizers(batch)

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing moves."""
        del metrics, step
        return extra

    def dense(self) -> Acm:
        """The same with all learners on and no gates, which costs what the dense model costs."""
        return dataclasses.replace(self, settings={**self.settings, "uniform": self.parts.learners})

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one example: those of the dense model, with gates and the learners that an evaluation used in place of modules."""
        whole = self.inner.count({**metrics, "kept": 1.0}).blocks
        if self.settings["uniform"] == self.parts.learners:
            return flops.Count(whole)
        tokens = self.tokens_per_example
        used = {name.removeprefix("learners/"): n for name, n in metrics.items() if name.startswith("learners/")}
        found = self.modules_of_model()
        spent = {
            "gates": 0 if self.settings["uniform"] else sum(tokens * module.gate for module in found),
            "learners": sum(tokens * module.learner * used[module.path] for module in found),
        }
        replaced = sum(tokens * module.dense for module in found)
        return flops.Count({"dense": sum(whole.values()) - replaced, **spent})

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The loss of phase 3 and metrics. With microbatches the budget is that of each, as the others are means over them."""
        task = self._with("sample" if train else "masked")
        with captured(_gates_and_model) as calls:
            options = {"rng": rng, "step": step, "normalizers": normalizers, "train": train}
            loss, metrics = task.loss(params, batch, extra={}, **options)
        if self.settings["loss"] == "distillation":
            loss = self._distance(calls[""].result[0], batch, extra, options)
        if self.settings["uniform"]:
            return loss, metrics
        chosen, found = _chosen(calls), self.modules_of_model()
        weight = _real(batch, chosen[0])
        share = acm.spent(chosen, [module.learner for module in found], weight)
        terms = {
            "budget": acm.budget_loss(share, self.settings["target"]),
            "entropy": acm.entropy_loss(chosen, weight, least=[module.least for module in found]),
            "diversity": acm.diversity_loss(chosen, weight),
        }
        examples = jnp.float32(share.shape[0])
        part = examples / normalizers["examples"]
        loss += part * sum(self.settings[f"{name}_weight"] * value for name, value in terms.items())
        measured = {f"acm/{name}": (value * examples, examples) for name, value in terms.items()}
        return loss, metrics | measured | {"share": (jnp.sum(share), examples)}

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """The wrapped task's metrics, the share of learners' cost, learners used by module, and the load of each choice."""
        del extra
        with captured(_gates_and_model) as calls:
            metrics = self._with("skip").eval_step(params, batch, extra={})
        found = self.modules_of_model()
        if self.settings["uniform"]:
            one = (jnp.float32(self.settings["uniform"]), jnp.float32(1))
            return metrics | {f"learners/{module.path}": one for module in found}
        chosen = _chosen(calls)
        weight = _real(batch, chosen[0]) * batch["weight"][:, None]
        total = jnp.sum(weight)
        for module, units in zip(found, chosen, strict=True):
            used = jnp.sum(units, axis=-1)
            metrics[f"learners/{module.path}"] = (jnp.sum(used * weight), total)
            for number in range(module.least, units.shape[-1] + 1):
                metrics[f"load/{module.path}/{number}"] = (jnp.sum((used == number) * weight), total)
        share = acm.spent(chosen, [module.learner for module in found], _real(batch, chosen[0]))
        return metrics | {"share": (jnp.sum(share * batch["weight"]), jnp.sum(batch["weight"]))}

    # ---- Phases.

    def start(self, params: Any, key: Any) -> Any:
        """The parameters with fresh learners and gates, from those of the dense model."""
        return acmize(params, self.parts, key, where=self.where)

    def distillation(self, teacher: Any) -> Distillation:
        """Phase 1 from this dense model."""
        return Distillation(self.inner, self.parts, self.settings, teacher)

    def gate_training(self, teacher: Any, tau: float) -> GateTraining:
        """Phase 2 with labels by `tau`."""
        return GateTraining(self.inner, self.parts, self.settings, teacher, tau)

    def modules_of_model(self) -> tuple[Module, ...]:
        """The modules that become learners, in the order in which the model's layers come."""
        return _modules(self.inner, self.parts, self.where)

    def teacher_calls(self, batch: Any, extra: Any, **options: Any) -> dict[str, tuple[Any, Any]]:
        """Inputs `[R, D]` and outputs `[R, E]` of each module of the teacher, by path."""
        found = {module.path: module for module in self.modules_of_model()}
        with captured(lambda module: "/".join(module.path) in found) as calls:
            self.inner.loss(extra["teacher"], batch, extra={}, **{**options, "train": False})
        return {
            path: (calls[path].given.reshape(-1, m.inputs), calls[path].result.reshape(-1, m.outputs))
            for path, m in found.items()
        }

    def _with(self, mode: str) -> Any:
        """The wrapped task on the model with learners."""
        if self.settings["uniform"]:
            parts = dataclasses.replace(self.parts, mode="uniform", number=self.settings["uniform"])
        else:
            parts = dataclasses.replace(self.parts, mode=mode)
        return dataclasses.replace(self.inner, model=self.inner.model.clone(parts=parts))

    def _distance(self, logits: Any, batch: Any, extra: Any, options: Mapping[str, Any]) -> Any:
        """Mean divergence of the predictions from the teacher's, over examples and targets."""
        with captured(lambda module: not module.path) as calls:
            self.inner.loss(extra["teacher"], batch, extra={}, **{**options, "train": False})
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(calls[""].result[0]))
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)
        mask = jnp.ones_like(divergence) if divergence.ndim == 1 else (batch["labels"] != 0).astype(jnp.float32)
        total = options["normalizers"]["examples" if divergence.ndim == 1 else "targets"]
        return jnp.sum(divergence * mask) / total


@dataclasses.dataclass(frozen=True)
class Distillation(Acm):
    """Phase 1: all modules at once learn to give what the dense ones give, with every number of learners."""

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The mean over modules of their distances, and the loss of each as a metric."""
        del train
        calls = self.teacher_calls(batch, extra, rng=rng, step=step, normalizers=normalizers)
        losses = {m.path: acm.distillation_loss(self.outputs(params, m, calls), calls[m.path][1]) for m in self._found}
        examples = _examples(batch)
        part = examples / normalizers["examples"]
        return part * sum(losses.values()) / len(losses), {
            f"distillation/{path}": (value * examples, examples) for path, value in losses.items()
        }

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """For each module the share of the teacher's output, in squares, that each number of learners misses."""
        options = dict(rng=jax.random.key(0), step=0, normalizers=self.normalizers(batch))
        calls = self.teacher_calls(batch, extra, **options)
        weight, metrics = batch["weight"], {}
        for module in self._found:
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

    @property
    def _found(self) -> tuple[Module, ...]:
        return self.modules_of_model()


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
        for module in self._found:
            labels, logits = self._labels(params, module, calls)
            losses[module.path] = acm.gate_loss(logits, labels, self.parts.learners)
        part = examples / normalizers["examples"]
        return part * sum(losses.values()) / len(losses), {
            f"gate/{path}": (value * examples, examples) for path, value in losses.items()
        }

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """How often gates agree with their labels, and how often each label stands, `label/PATH/NUMBER`."""
        calls = self.teacher_calls(batch, extra, rng=jax.random.key(0), step=0, normalizers=self.normalizers(batch))
        metrics = {}
        for module in self._found:
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


def _modules(inner: Any, parts: AcmParts, where: str) -> tuple[Module, ...]:
    """The modules of the dense model, found in the shapes of its parameters, in the order in which their gates are called."""
    batch = _example_batch(inner)
    abstract = jax.eval_shape(lambda: inner.init(jax.random.key(0), batch)["params"])
    found = {module.path: module for module in modules(abstract, parts, where=where)}
    return tuple(found.values())


def _chosen(calls: Mapping[str, Any]) -> list[Any]:
    """Units `[B, N, K]` of each module, in the order of `modules`: by the path of the module that holds the gate."""
    return [call.result for path, call in sorted(calls.items(), key=lambda item: _order(item[0])) if path]
