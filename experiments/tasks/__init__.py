# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is trained and measured. A task joins a model of `layers/` with a loss and metrics.

A task has

- `init(rng, batch)`: boxed variables; `init_extra()`: what the train state carries beside them (a controller);
- `normalizers(batch)`: denominators from the whole batch, so that gradient accumulation is exact;
- `loss(params, batch, *, rng, step, extra, normalizers, train)`: `(loss, metrics)`, both already divided by those;
- `update_extra(extra, metrics, step)`: once an optimiser step; `eval_step(params, batch, *, extra)`: metrics;
- `tokens_per_example`: for throughput; `model`: the module.

Metrics are `(sum, count)` pairs.
"""

from __future__ import annotations

import difflib
from typing import Any

from ml_collections import ConfigDict

from experiments.tasks.acm import Acm
from experiments.tasks.classification import Classification
from experiments.tasks.depth import EarlyExit, Halting
from experiments.tasks.duo import Duo
from experiments.tasks.language_modelling import LanguageModelling
from experiments.tasks.rates import LearnRates
from experiments.tasks.seq2seq import Seq2Seq
from experiments.tasks.token_exits import TokenExit

TASKS = {
    "acm": Acm,
    "classification": Classification,
    "duo": Duo,
    "early_exit": EarlyExit,
    "halting": Halting,
    "language_modelling": LanguageModelling,
    "rates": LearnRates,
    "seq2seq": Seq2Seq,
    "token_exit": TokenExit,
}


def build(config: ConfigDict) -> Any:
    """The task that `config.task` names, with its model.

    Raises:
      ValueError: no such task, or a model section that its task cannot use.
    """
    if config.task not in TASKS:
        near = difflib.get_close_matches(config.task, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config.task is {config.task!r}{hint} Tasks: {', '.join(TASKS)}.")
    return TASKS[config.task].from_config(config)


__all__ = [
    "TASKS",
    "Acm",
    "Classification",
    "Duo",
    "EarlyExit",
    "Halting",
    "LanguageModelling",
    "LearnRates",
    "Seq2Seq",
    "TokenExit",
    "build",
]
