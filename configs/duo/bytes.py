# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM on bytes: a small and a big module in every layer, trained on random paths, then routers on the frozen model.

    python -m experiments.train --config=configs/duo/bytes.py --workdir=runs/duo
    python -m experiments.train --config=configs/duo/bytes.py:path=BOOKS --workdir=runs/duo_books
    python -m experiments.train --config=configs/duo/bytes.py:runlocal --workdir=runs/try

The text is two embedded novels unless `path` names text files. Routers go on from a trained model
(`stage=router,budget=0.5`), which `python -m experiments.reproduce --only=duo` does. The paper's ratio of 16 between the
widths of the modules at a small scale: 6 layers of width 64 on 128 bytes, some minutes on two CPU cores. The first stage also
skips a fifth of the modules, so that paths with skips are valid as well.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.duo import duo_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, stage="paths", budget=0.5, path="", runlocal=False)
    config = base_config()
    config.task = "duo"
    config.model = ConfigDict(
        dict(
            width=64,
            layers=6,
            heads=4,
            big=256,
            small=16,
            duo=duo_section(stage=given.stage, budget=given.budget, shares=(0.2, 0.4, 0.4)),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    config.data = resolve(dict(source="text", objective="next_byte", context=1, targets_length=128, **text))
    config.steps = 1_500
    config.batch_size = 16
    config.optimizer.peak = 3e-3
    config.optimizer.warmup = 50
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, layers=2, heads=2, big=64, small=8))
        config.data.update(dict(targets_length=32, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
