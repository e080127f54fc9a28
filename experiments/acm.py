# SPDX-License-Identifier: Apache-2.0
r"""Trains a model with Adaptive Computation Modules through all phases, each a resumable run below the workdir.

    python -m experiments.acm --config=configs/acm/digits.py --workdir=runs/acm
    python -m experiments.acm --config=configs/acm/digits.py:target=0.25 --workdir=runs/acm25 --dense=runs/acm/dense

The runs: `dense` (the model itself, unless `--dense` names a run of it), `distilled` (all modules at once),
`gated` (gates learn labels), `tuned` (end to end, under the budget). The last one is an ordinary run, for
`experiments.evaluate`. Starting the same command again continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from adaptive.width import acm
from experiments import config as config_lib
from experiments import tasks, train
from experiments.evaluate import parse_overrides, restore
from experiments.memory import keep_freed_pages
from experiments.rundir import apply_overrides
from experiments.tasks.acm import Acm, label_histograms, phase_settings
from experiments.train import TrainResult

Train = Callable[..., TrainResult]


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of one config, each trained by `train(name, config, **options)`; a phase of 0 steps is left out.

    Attributes:
      config: of the last phase; `config.model.acm.phases` has what differs in the others.
      train: trains or continues the run of that name.
    """

    config: ConfigDict
    train: Train

    @property
    def task(self) -> Acm:
        """The task of the last phase."""
        return Acm.from_config(self.config)

    @property
    def _phases(self) -> Mapping[str, Any]:
        return phase_settings(self.config.model.acm)

    def dense_config(self) -> ConfigDict:
        """The config of the dense model."""
        config = self.config.copy_and_resolve_references()
        phases = self._phases
        with config.unlocked():
            config.task = config.model.acm.task
            del config.model["acm"]
            config.steps = phases["dense_steps"]
            config.optimizer.peak = phases["dense_peak"]
            config.optimizer.warmup = min(phases["dense_warmup"], phases["dense_steps"])
            config.optimizer.weight_decay = phases["dense_weight_decay"]
        return config

    def dense(self, name: str = "dense") -> Any:
        """Parameters of the dense model."""
        return self.train(name, self.dense_config()).state.average

    def distilled(self, teacher: Any, name: str = "distilled") -> Any:
        """Parameters with learners that imitate the teacher's modules."""
        params = self.task.start(teacher, jax.random.key(self.config.seed))
        return self._phase("distill", name, self.task.distillation(teacher), params)

    def gated(self, teacher: Any, params: Any, name: str = "gated") -> Any:
        """Parameters with gates that learned how many learners pay; warns where all labels are alike."""
        tau = self._phases["tau"]
        if not self._phases["gate_steps"]:
            return params
        result = self._run("gate", name, self.task.gate_training(teacher, tau), params)
        metrics = {key.removeprefix("eval/"): value for key, value in result.metrics.items()}
        acm.warn_if_degenerate(label_histograms(metrics), tau)
        return result.state.average

    def tuned(self, teacher: Any, params: Any, name: str = "tuned") -> TrainResult:
        """The run of the last phase."""
        task = self.task
        if task.settings["loss"] == "distillation":
            task = dataclasses.replace(task, teacher=teacher)
        return self.train(name, self.config, task=task, params=params)

    def _phase(self, phase: str, name: str, task: Any, params: Any) -> Any:
        if not self._phases[f"{phase}_steps"]:
            return params
        return self._run(phase, name, task, params).state.average

    def _run(self, phase: str, name: str, task: Any, params: Any) -> TrainResult:
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.steps = self._phases[f"{phase}_steps"]
            config.optimizer.peak = self._phases[f"{phase}_peak"]
            config.optimizer.warmup = 0
            # What a phase does not train must stay where it is.
            config.optimizer.weight_decay = 0.0
        return self.train(name, config, task=task, params=params)


def load_dense(workdir: str) -> Any:
    """The parameters of a run of the dense model.

    Raises:
      FileNotFoundError: the workdir holds no run.
    """
    config = config_lib.load_config(workdir)
    task = tasks.build(config)
    dataset = train.data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    return restore(epath.Path(workdir), config, train.build_program(config, task, dataset.spec), None)[0]


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments and trains; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.acm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file of the task acm, with its argument")
    parser.add_argument("--workdir", required=True, help="folder of the runs")
    parser.add_argument("--dense", default="", help="a run of the dense model, to start from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    options = parser.parse_args(argv)
    root = epath.Path(options.workdir)

    def run(name: str, config: ConfigDict, **given: Any) -> TrainResult:
        print(f"{name}: {config.steps} steps of {config.batch_size} in {root / name}", file=sys.stderr)
        return train.train(config, root / name, **given)

    try:
        config = apply_overrides(config_lib.load(options.config), parse_overrides(options.set))
        phases = Phases(config, run)
        teacher = load_dense(options.dense) if options.dense else phases.dense()
        result = phases.tuned(teacher, phases.gated(teacher, phases.distilled(teacher)))
    except train.Interrupted as reason:
        print(reason, file=sys.stderr)
        return reason.exit_code
    except (ValueError, KeyError, FileNotFoundError, train.NonFiniteError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    shown = [f"  {k}: {v:.6g}" for k, v in result.metrics.items() if isinstance(v, float) and "/load/" not in k]
    print("\n".join([f"Complete at step {result.step} in {result.workdir}", *shown]))
    return 0


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
