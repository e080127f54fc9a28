# SPDX-License-Identifier: Apache-2.0
"""Where learners go: how budgets are met, the load by layer, and learners by patch and by byte.

Shapes: B examples, N tokens, K learners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.byte_vocab import OFFSET
from experiments.studies import plots, tables
from experiments.studies.acm.runs import Runs
from experiments.studies.study import Context
from experiments.tasks.acm import Acm
from layers.acm import Gate
from layers.parts import captured

# A number of learners that fewer tokens have than this does not count as used.
USED = 0.01

COLUMNS = (
    tables.Column("target %", lambda row: 100 * float(row["setting"]), 0),
    tables.Column("share of learners' cost on held-out data %", lambda row: 100 * row["share"], 2),
    tables.Column("off the target by, points", lambda row: 100 * abs(row["share"] - float(row["setting"])), 2),
    tables.Column("modules", lambda row: len(row["load"]), 0),
    tables.Column("of them with two numbers of learners or more", lambda row: several(row["load"]), 0),
    tables.Column("distinct numbers of learners a module", lambda row: float(np.mean(counts(row["load"]))), 1),
)
TITLE = (
    "Whether budgets are met, and whether gates choose: a number of learners counts as used when at least 1 % of a module's "
    "tokens have it."
)


def counts(load: Mapping[str, Sequence[float]]) -> list[int]:
    """Numbers of learners that each module uses."""
    return [sum(share >= USED for share in shares) for shares in load.values()]


def several(load: Mapping[str, Sequence[float]]) -> int:
    """Modules that use at least two."""
    return sum(count >= 2 for count in counts(load))


def budgets(context: Context, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of budgets, and the mean number of learners by module for every target."""
    tables.write(context.results, f"{part}_budgets", TITLE, rows, COLUMNS, receipts=())
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    paths = list(first[0]["load"])
    groups = {
        path.replace("attention/", ""): {f"target {row['setting']}": row[f"learners/{path}"] for row in first}
        for path in paths
    }
    plots.save(plots.bars(groups, "learners a token", slanted=True), context.results, f"{part}_learners")


def learners_by_token(task: Acm, params: Any, batch: Mapping[str, Any]) -> np.ndarray:
    """`[B, N]` share of all learners' cost that each token spends."""

    @jax.jit
    def spent(params: Any, batch: Any) -> Any:
        with captured(lambda module: isinstance(module, Gate)) as calls:
            task.within("masked").eval_step(params, batch, extra={})
        found = task.modules(batch)
        units = {module.path: calls[f"{module.path}/learners/gate"].result for module in found}
        total = sum(module.learner * jnp.sum(units[module.path], axis=-1) for module in found)
        return total / sum(module.learner * units[module.path].shape[-1] for module in found)

    return np.asarray(spent(params, dict(batch)))


def _middle(runs: Runs, targets: Sequence[float]) -> tuple[Acm, Any]:
    target = targets[len(targets) // 2]
    config = runs.config(model__acm__target=target)
    result = runs.phases(config).tuned(runs.teacher(), runs.gated(), f"acm-{target:g}")
    return Acm.from_config(config), result.state.average


def images(runs: Runs, context: Context, targets: Sequence[float]) -> None:
    """A few test images beside the share of cost that each patch spends."""
    task, params = _middle(runs, targets)
    batch = next(iter(runs.dataset(batch_size=8).eval_batches(1)))
    model = task.inner.model
    spent = learners_by_token(task, params, batch)[:, int(model.has_class_token) :]
    maps = spent.reshape(-1, *model.grid[1:])
    plots.save(plots.maps_over_images(np.asarray(batch["image"]), maps), context.results, f"{runs.part}_tokens")


def text(runs: Runs, context: Context, targets: Sequence[float]) -> None:
    """A few test lines with the share of cost that each byte spends."""
    task, params = _middle(runs, targets)
    batch = next(iter(runs.dataset(batch_size=8).eval_batches(1)))
    spent = learners_by_token(task, params, batch)
    lines = [
        (f"example {row}", bytes(int(i) - OFFSET if OFFSET <= i < OFFSET + 256 else 32 for i in ids), spent[row])
        for row, ids in enumerate(np.asarray(batch["input_ids"])[:4])
    ]
    plots.save(plots.shaded_bytes(lines), context.results, "text_tokens")
