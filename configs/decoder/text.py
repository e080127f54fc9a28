# SPDX-License-Identifier: Apache-2.0
"""A small decoder language model of bytes, Llama-style: the backbone on which depth methods and routers are compared.

    python -m experiments.train --config=configs/decoder/text.py --workdir=runs/decoder
    python -m experiments.train --config=configs/decoder/text.py:path=BOOKS --workdir=runs/books
    python -m experiments.train --config=configs/decoder/text.py:share=0.125 --workdir=runs/mixture_of_depths
    python -m experiments.train --config=configs/decoder/text.py:skip=2 --workdir=runs/skip_decode
    python -m experiments.train --config=configs/decoder/text.py:exit_losses=rising --workdir=runs/calm
    python -m experiments.train --config=configs/decoder/text.py:window=64 --workdir=runs/sink_window
    python -m experiments.train --config=configs/decoder/text.py:tokenizer=tokenizer.json --workdir=runs/subwords
    python -m experiments.train --config=configs/decoder/text.py:runlocal --workdir=runs/try
    python -m experiments.generate --workdir=runs/decoder --text="It was "

The text is two embedded novels unless `path` names text files. No paper has this model: it is what
learns to spell within minutes on two CPU cores. With `share` every other block is a routed one of Mixture-of-Depths, that runs
for this share of the tokens; with `skip` later tokens run in fewer layers, `depth / skip` on average (SkipDecode);
`exit_losses` trains every layer to predict ("rising"), or also a classifier that says where a token may stop ("classifier"),
as confidence exits need. With `window` a decode step reads the first tokens and the latest ones alone, at least as many as
named, in whole pages of the cache (training and prompts attend to everything). Tokens are bytes, or with `tokenizer` the ids of
such a file (`python -m experiments.data.subword` makes one).
"""

from ml_collections import ConfigDict

from adaptive.depth.skip_decode import counts_for_speedup
from experiments.config import base_config, parse_arg
from experiments.data import resolve, vocabulary
from experiments.tasks.models import routing_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, share=0.0, skip=0.0, exit_losses="", window=0, path="", tokenizer="", runlocal=False)
    config = base_config()
    config.task = "language_modelling"
    config.model = ConfigDict(
        dict(
            vocab_size=384,
            width=128,
            depth=8,
            heads=4,
            kv_heads=2,
            mlp_dim=384,
            tie_embeddings=True,
            exit_losses=given.exit_losses,
            exit_classifier=given.exit_losses == "classifier",
            routing=routing_section(share=given.share),
            losses=dict(router=1.0) if given.share else {},
            skip=dict(counts=(), bottom=1),
            skip_training=bool(given.skip),
        )
    )
    if given.window:
        config.model.reads = dict(window=given.window, sinks=4, page=16)
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    if given.tokenizer:
        text |= dict(objective="next_subword", tokenizer=given.tokenizer)
    config.data = resolve(dict(source="text", length=128, **{"objective": "next_token", **text}))
    config.model.vocab_size = max(config.model.vocab_size, vocabulary(config.data).size)
    config.steps = 2_000
    config.batch_size = 32
    config.optimizer.peak = 3e-3
    config.optimizer.warmup = 100
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.95
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, kv_heads=1, mlp_dim=64))
        config.data.update(dict(length=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    if given.skip:
        counts = counts_for_speedup(config.model.depth, given.skip, horizon=config.data.length)
        config.model.skip.counts = counts
    return config
