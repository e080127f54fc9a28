# SPDX-License-Identifier: Apache-2.0
"""Turns a Hugging Face safetensors directory into a run to start from.

Known are ByT5, T5 1.1, mT5 and MrT5 (task seq2seq), Llama and Qwen2 (language_modelling), ViT, DeiT, ViT-MAE (classification).

    python -m experiments.import_hf --model=byt5-small --workdir=runs/byt5
    python -m experiments.train --workdir=runs/byt5
    python -m experiments.evaluate --workdir=runs/byt5

    python -m experiments.import_hf --model=mrt5-small --workdir=runs/mrt5 --dtype=bfloat16 --scan-layers
    python -m experiments.import_hf --model=byt5-small --workdir=runs/gated --config=configs/mrt5/spans.py \\
        --set model.gate=mrt5 --set model.softmax=off_by_one --set model.deletion.target=0.5 --set steps=5000
    python -m experiments.import_hf --model=vit-base-patch16-224 --workdir=runs/vit \\
        --config=configs/vit/imagenet.py:data_dir=DIR --set model.reduction.method=tome --set model.reduction.r=13

The run has a config and a checkpoint at step 0. The model comes from the directory, with what `--set model.KEY=VALUE` changes;
all else, such as data and optimiser, comes from `--config`, or is a default that needs no data: span corruption of 1,024 bytes
of two novels (for a decoder alone the prediction of each of 256, or of so many ids of the directory's
tokenizer.json), or handwritten digits. What a directory
has no parameters for, such as a gate, a reduction that is learned or a classifier of other classes, starts anew. Images are
normalised as preprocessor_config.json says. `experiments.export_hf` is the way back.
"""

from __future__ import annotations

import argparse
import collections
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
from experiments.evaluate import parse_overrides
from experiments.hf_recipes import RECIPES, say
from experiments.rundir import RunDir, WorkdirMismatch
from layers import hf

_SECTION = "model."
# In the meta of a checkpoint, from one to the next: the config.json that the run came from.
HF_CONFIG = "hf_config"


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
    kind = RECIPES[hf.module_class(model)]
    config = _start(recipe, kind)
    attributes = {key: config.model[key] for key in kind.kept if key in config.model}
    attributes |= {"scan_layers": True} if scan_layers else {}
    own = [key for key in overrides if _is_attribute(key, kind)]
    attributes |= {key.removeprefix(_SECTION): overrides.pop(key) for key in own}
    attributes = {key: kind.attribute(key, value) for key, value in attributes.items()}
    say(f"reading {model}")
    module, variables, hf_config = hf.load(model, **attributes)
    kind.check(module)
    with config.unlocked():
        config.model = kind.section(module, config.model)
        config.dtype = dtype or config.dtype
        kind.fit_data(config.data, module, model)
    config_lib.apply_overrides(config, overrides)
    with config.unlocked():
        kind.complete(config)
    config_lib.validate(config)
    task = tasks.build(config)
    if getattr(task.model, "hooks", ()):
        # A learned reduction has parameters, which no checkpoint holds.
        _, variables, _ = hf.load(model, **attributes, hooks=task.model.hooks)
    _check_shapes(task.model, variables["params"])
    _write_run(config, task, workdir, variables["params"], hf_config, overwrite)
    return summary(task.model, variables["params"], hf_config)


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
    """embedding, encoder, decoder, delete_gate, head or reduction."""
    first = path.split("/")[0]
    if first in ("lower_stack", "upper_stack", "blocks", "final_norm") or first.startswith("block_"):
        return "encoder"
    if first in ("class_token", "distillation_token", "positions", "patch_embed"):
        return "embedding"
    if first in ("distillation_head", "representation"):
        return "head"
    if first.startswith("hooks_"):
        return "reduction"
    return first if first in ("embedding", "delete_gate", "head") else first.split("_")[0]


def _start(spec: str, kind: Any) -> ConfigDict:
    """The config that a run starts from; its model section is replaced."""
    if not spec:
        return kind.default()
    config = config_lib.load(spec)
    if config.task != kind.task:
        raise config_lib.ConfigError(f"{spec} is for the task {config.task!r}; these models are trained on {kind.task}")
    return config


def _is_attribute(key: str, kind: Any) -> bool:
    return key.startswith(_SECTION) and key.split(".")[1] not in kind.subsections


def _check_shapes(module: Any, params: Mapping[str, Any]) -> None:
    """Raises ValueError where what was set asks for a model of other parameters than those that were read."""
    found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(hf.abstract_params(module), sep="/").items()}
    wrong = [f"{path}: read {found.get(path)}, set {wanted.get(path)}" for path in sorted({*found, *wanted})]
    wrong = [
        line for line, path in zip(wrong, sorted({*found, *wanted}), strict=True) if found.get(path) != wanted.get(path)
    ]
    if wrong:
        raise ValueError("\n  ".join(["what is set does not fit the checkpoint:", *wrong[:8]]))


def _write_run(
    config: ConfigDict, task: Any, workdir: pathlib.Path, params: Any, hf_config: Mapping[str, Any], overwrite: bool
) -> None:
    """The run directory with its checkpoint at step 0."""
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    say("tracing the model")
    program = train.build_program(config, task, dataset.spec)
    program.lower()
    say(f"writing {workdir}")
    run = RunDir.open(workdir, config, overwrite=overwrite)
    state = program.create(params)
    settings = config.checkpoint
    best = dict(best_metric=settings.best or None, best_mode=settings.best_mode)
    with Checkpointer(
        run.checkpoints, every=settings.every, keep=settings.keep, config_hash=run.config_hash, **best
    ) as checkpointer:
        meta = {"seconds": 0.0, HF_CONFIG: dict(hf_config)}
        checkpointer.maybe_save(0, state, dataset.train_iterator(), meta, force=True)


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
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    print(table)
    print(f"To train on: python -m experiments.train --workdir={options.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
