# SPDX-License-Identifier: Apache-2.0
"""A small decoder language model of bytes whose layers become Adaptive Computation Modules.

    python -m experiments.acm --config=configs/acm/text.py --workdir=runs/acm_text
    python -m experiments.acm --config=configs/acm/text.py:target=0.25,path=BOOKS --workdir=runs/acm_books
    python -m experiments.train --config=configs/acm/text.py:runlocal --workdir=runs/try

The text is two embedded novels unless `path` names text files. The paper's second domain is speech; bytes
are this project's own.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.acm import acm_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, target=0.5, learners=4, path="", runlocal=False)
    config = base_config()
    config.task = "acm"
    config.model = ConfigDict(
        dict(
            vocab_size=384,
            width=64,
            depth=4,
            heads=4,
            kv_heads=4,
            mlp_dim=192,
            tie_embeddings=True,
            acm=acm_section(
                task="language_modelling",
                learners=given.learners,
                gate_hidden=(4,),
                target=given.target,
                # Not the paper's, as training is short: a stronger budget, on the choices of inference, and learners that are
                # cut from the dense model.
                budget_weight=5.0,
                budget_on="argmax",
                start="dense",
                phases=dict(dense_steps=1_000, dense_peak=3e-3, distill_steps=300, gate_steps=60),
            ),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    config.data = resolve(dict(source="text", objective="next_token", length=64, **text))
    config.steps = 300
    config.batch_size = 16
    config.optimizer.peak = 3e-3
    config.optimizer.warmup = 20
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, kv_heads=2, mlp_dim=64))
        config.model.acm.phases.update(dict(dense_steps=2, distill_steps=2, gate_steps=2))
        config.data.update(dict(length=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
