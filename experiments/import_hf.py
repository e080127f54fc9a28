# SPDX-License-Identifier: Apache-2.0
"""Turns a Hugging Face safetensors directory into a run that training and evaluation start from.

Known are ByT5, T5 1.1, mT5 and MrT5 (task seq2seq), Llama and Qwen2 (task language_modelling).

    python -m experiments.import_hf --model=byt5-small --workdir=runs/byt5
    python -m experiments.train --workdir=runs/byt5
    python -m experiments.evaluate --workdir=runs/byt5

    python -m experiments.import_hf --model=mrt5-small --workdir=runs/mrt5 --dtype=bfloat16 --scan-layers
    python -m experiments.import_hf --model=byt5-small --workdir=runs/gated --config=configs/mrt5/spans.py \\
        --set model.gate=mrt5 --set model.softmax=off_by_one --set model.deletion.target=0.5 --set steps=5000

The run has a config and a checkpoint at step 0. The model comes from the directory, with what `--set model.KEY=VALUE` changes;
all else, such as data and optimiser, comes from `--config`, or is span corruption of 1,024 bytes (for a decoder-only model the
prediction of each of 256 bytes) of Python's own standard library. A gate that is set on a model without one starts anew, as
MrT5 was trained from ByT5. `experiments.export_hf` is the way back.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tabulate import tabulate

from experiments import config as config_lib
from experiments import data, tasks, train
from experiments.checkpoints import Checkpointer
from experiments.data import byte_vocab
from experiments.evaluate import parse_overrides
from experiments.rundir import RunDir, WorkdirMismatch
from experiments.tasks.deletion import Deletion
from experiments.tasks.models import NOT_OF_A_SECTION
from layers import hf
from layers.decoder_lm import DecoderLM
from layers.t5 import T5

_SECTION = "model."
# In the meta of a checkpoint, from one to the next: the config.json that the run came from.
HF_CONFIG = "hf_config"
_RUNGS = 8


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a run of one kind of model is.

    Attributes:
      task, objective, optimizer: of a run without a recipe; the task also of one with it.
      kept: of a recipe's model section: how the model runs, not what it is.
      sections: parts of a model section that are the task's, not attributes of the module.
    """

    task: str
    objective: str
    optimizer: str
    kept: tuple[str, ...]
    sections: tuple[str, ...]


_KINDS = {
    T5: _Kind("seq2seq", "span_corruption", "adafactor", ("rungs", "capacity", "remat", "scan_layers"), ("deletion",)),
    DecoderLM: _Kind(
        "language_modelling", "next_token", "adamw", ("remat",), ("losses", "exit_losses", "skip", "skip_training")
    ),
}


def import_checkpoint(
    model: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    recipe: str = "",
    overrides: Mapping[str, Any] | None = None,
    dtype: str = "",
    scan_layers: bool = False,
    overwrite: bool = False,
) -> str:
    """Makes the run and returns a table of what was mapped; see the module docstring.

    Args:
      model: the directory; workdir: of the new run.
      recipe: a config file with its argument, as in `--config`.
      overrides: values by dotted key of the run's config.
      dtype: of activations, "" for that of the recipe; parameters are float32.
      scan_layers: one compiled layer for each stack.
      overwrite: removes a run that is in `workdir`.

    Raises:
      ValueError: a directory, config or data that cannot be used, or a workdir that holds something else.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if (workdir / "config.json").exists() and not overwrite:
        raise WorkdirMismatch(f"{workdir} holds a run; pass --overwrite to replace it, or choose another --workdir")
    overrides = dict(overrides or {})
    kind = _KINDS[hf.module_class(model)]
    config = _recipe(recipe, kind)
    attributes = {key: config.model[key] for key in kind.kept if key in config.model}
    attributes |= {"scan_layers": True} if scan_layers else {}
    own = [key for key in overrides if _is_attribute(key, kind)]
    attributes |= {key.removeprefix(_SECTION): overrides.pop(key) for key in own}
    _say(f"reading {model}")
    module, variables, hf_config = hf.load(model, **{key: _value(key, value) for key, value in attributes.items()})
    _check(module)
    section = _t5_section if isinstance(module, T5) else _decoder_section
    with config.unlocked():
        config.model = section(module, config.model)
        config.dtype = dtype or config.dtype
    config_lib.apply_overrides(config, overrides)
    if isinstance(module, T5):
        with config.unlocked():
            config.model.rungs = _rungs(config)
    _write_run(config, workdir, variables["params"], hf_config, overwrite)
    return summary(module, variables["params"], hf_config)


def summary(module: Any, params: Mapping[str, Any], hf_config: Mapping[str, Any]) -> str:
    """A table of tensors and parameters by part of the model; "(new)" marks parts that the checkpoint does not have."""
    sizes = {path: leaf.size for path, leaf in flatten_dict(params, sep="/").items()}
    places = {leaf.path: len(leaf.tensors) for leaf in hf.leaves(module, hf_config)}
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for path, size in sizes.items():
        row = rows[_part(path) if path in places else f"{_part(path)} (new)"]
        row[0] += places.get(path, 0)
        row[1] += size
    total = [sum(row[index] for row in rows.values()) for index in (0, 1)]
    table = [[part, tensors, f"{size:,}"] for part, (tensors, size) in sorted(rows.items())]
    return tabulate(
        [*table, ["total", total[0], f"{total[1]:,}"]], headers=["part", "tensors", "parameters"], stralign="right"
    )


def _part(path: str) -> str:
    """embedding, encoder, decoder, delete_gate or head."""
    first = path.split("/")[0]
    if first in ("lower_stack", "upper_stack"):
        return "encoder"
    return first if first in ("embedding", "delete_gate", "head") else first.split("_")[0]


def _recipe(spec: str, kind: _Kind) -> ConfigDict:
    """The config that a run starts from; its model section is replaced."""
    if spec:
        config = config_lib.load(spec)
        if config.task != kind.task:
            raise config_lib.ConfigError(
                f"{spec} is for the task {config.task!r}; these models are trained on {kind.task}"
            )
        return config
    config = config_lib.base_config()
    config.task = kind.task
    config.data = data.resolve(dict(source="text", text="stdlib", objective=kind.objective))
    config.optimizer.name = kind.optimizer
    config.eval.batches = 20
    return config


def _is_attribute(key: str, kind: _Kind) -> bool:
    return key.startswith(_SECTION) and key.split(".")[1] not in kind.sections


def _value(key: str, value: Any) -> Any:
    """A value of a config as an attribute of the module."""
    if key == "gate_hyper":
        return tuple(sorted(dict(value).items()))
    if key in ("gate", "rungs", "capacity"):
        return (tuple(value) if isinstance(value, list | tuple) else value) or None
    return value


def _t5_section(module: T5, recipe: Mapping[str, Any]) -> ConfigDict:
    """The model section that `experiments.tasks.models.build_t5` makes the module from."""
    names = {field.name for field in dataclasses.fields(module)} - NOT_OF_A_SECTION
    section = {name: getattr(module, name) for name in sorted(names)}
    section |= {name: section[name] or "" for name in ("gate", "chunker")} | {"rungs": module.rungs or ()}
    section |= {name: dict(section[name]) for name in ("gate_hyper", "chunk_hyper")}
    deletion = dataclasses.asdict(Deletion()) | dict(recipe.get("deletion", {}))
    return ConfigDict({**section, "deletion": deletion})


def _decoder_section(module: DecoderLM, recipe: Mapping[str, Any]) -> ConfigDict:
    """The model section that `experiments.tasks.models.build_decoder` makes the module from."""
    names = {field.name for field in dataclasses.fields(module)} - NOT_OF_A_SECTION
    section = {name: value for name in sorted(names) if (value := getattr(module, name)) is not None}
    section["rotary_scaling"] = dataclasses.asdict(module.rotary_scaling) if module.rotary_scaling else {}
    tasks_own = {"losses": {}, "exit_losses": "", "skip": {"counts": (), "bottom": 1}, "skip_training": False}
    return ConfigDict({**section, **{name: recipe.get(name, value) for name, value in tasks_own.items()}})


def _check(module: Any) -> None:
    if isinstance(module, T5) and not module.decoder_layers:
        raise ValueError("this checkpoint is an encoder alone; a run needs a decoder. layers.hf.load reads encoders")
    highest = byte_vocab.FIRST_SENTINEL
    if module.vocab_size <= highest:
        raise ValueError(
            f"vocab_size is {module.vocab_size}; the bytes that runs are trained on have ids up to {highest}"
        )
    if module.vocab_size != byte_vocab.TABLE_SIZE:
        _say(
            f"note: vocab_size is {module.vocab_size}; runs are fed bytes (ids + {byte_vocab.OFFSET}), not this model's pieces"
        )


def _rungs(config: ConfigDict) -> tuple[int, ...]:
    """The ladder that is set; where none is and a gate deletes, eight even steps up to the length of the data."""
    model = config.model
    if model.rungs or model.capacity or not model.gate:
        return tuple(model.rungs)
    length = tasks.build(config).inputs_length
    return tuple(sorted({math.ceil(length * step / _RUNGS) for step in range(1, _RUNGS + 1)}))


def _write_run(
    config: ConfigDict, workdir: pathlib.Path, params: Any, hf_config: Mapping[str, Any], overwrite: bool
) -> None:
    """The run directory with its checkpoint at step 0."""
    config_lib.validate(config)
    task = tasks.build(config)
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    _say("tracing the model")
    program = train.build_program(config, task, dataset.spec)
    program.lower()
    _say(f"writing {workdir}")
    run = RunDir.open(workdir, config, overwrite=overwrite)
    state = program.create(params)
    settings = config.checkpoint
    best = dict(best_metric=settings.best or None, best_mode=settings.best_mode)
    with Checkpointer(
        run.checkpoints, every=settings.every, keep=settings.keep, config_hash=run.config_hash, **best
    ) as checkpointer:
        meta = {"seconds": 0.0, HF_CONFIG: dict(hf_config)}
        checkpointer.maybe_save(0, state, dataset.train_iterator(), meta, force=True)


def _say(text: str) -> None:
    print(f"[import] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, imports, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.import_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory with config.json and safetensors")
    parser.add_argument("--workdir", required=True, help="directory of the new run")
    parser.add_argument("--config", default="", metavar="FILE.py[:ARG]", help="where all but the model comes from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    parser.add_argument(
        "--dtype", default="", choices=config_lib.DTYPES, help="of activations (default: that of --config)"
    )
    parser.add_argument("--scan-layers", action="store_true", help="one compiled layer for each stack of layers")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that is in --workdir")
    options = parser.parse_args(argv)
    try:
        table = import_checkpoint(
            options.model,
            options.workdir,
            recipe=options.config,
            overrides=parse_overrides(options.set),
            dtype=options.dtype,
            scan_layers=options.scan_layers,
            overwrite=options.overwrite,
        )
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    print(table)
    print(f"To train on: python -m experiments.train --workdir={options.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
