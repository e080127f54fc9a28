# SPDX-License-Identifier: Apache-2.0
"""How a task trains and evaluates a deletion gate: the `deletion` section of a model config."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptive import registry
from adaptive.deletion import objective
from experiments.tasks.models import check_keys


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


def gate_hyper(gate: str, rate: float) -> dict[str, Any]:
    """Every hyper-parameter of a deletion method, so that a command line can set it, at a rate of its own where it has one."""
    if not gate:
        return {}
    hyper = registry.describe(gate).hyper
    return {**hyper, "rate": rate} if "rate" in hyper else dict(hyper)
