# SPDX-License-Identifier: Apache-2.0
"""Byte-level continuation with a small T5: the encoder reads 48 bytes, the decoder predicts the next four.

    python -m experiments.train --config=configs/mrt5/continuation.py:gate=mrt5,rate=0.5 --workdir=runs/mrt5
    python -m experiments.train --config=configs/mrt5/continuation.py:gate=random_deletion,rate=0.5 --workdir=runs/random
    python -m experiments.train --config=configs/mrt5/continuation.py:gate=mrt5,runlocal --workdir=runs/try

The text is the running Python's own standard library unless `path` names text files. `gate` is a registered deletion method,
or empty for the dense model; `rate` is the share of bytes to delete. Nothing in the paper has this form: it is what a model of
half a million parameters learns from its encoder within two minutes on two CPU cores, where span corruption takes far longer.
Dense, 1,000 steps give about 3 bits per byte. The gains of the controller suit hundreds of steps, not thousands.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.seq2seq import deletion_section

# What a learned gate takes; the other methods take a rate.
LEARNED = {"scale": -30.0, "gumbel": False}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, gate="", rate=0.5, path="", runlocal=False)
    config = base_config()
    config.task = "seq2seq"
    config.model = ConfigDict(
        dict(
            width=96,
            mlp_dim=256,
            heads=3,
            head_dim=32,
            encoder_layers=4,
            decoder_layers=1,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=2,
            gate_hyper={"": {}, "no_deletion": {}, "mrt5": LEARNED}.get(given.gate, {"rate": given.rate}),
            rungs=(8, 16, 24, 32, 40, 48),
            deletion=deletion_section(target=given.rate, kp=0.05, ki=1e-4),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="stdlib")
    config.data = resolve(dict(source="text", objective="next_byte", context=48, targets_length=4, **text))
    config.steps = 1_000
    config.batch_size = 32
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (8, 16)
        config.data.update(dict(context=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
