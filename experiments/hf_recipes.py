# SPDX-License-Identifier: Apache-2.0
"""What the import of a Hugging Face directory depends on by its kind of model: the run that it becomes, and what may be set.

A recipe is the config that a run starts from, without the model: of `--config`, or one that needs no data of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from experiments import config as config_lib
from experiments import data, tasks
from experiments.data import byte_vocab
from experiments.tasks.deletion import Deletion
from experiments.tasks.models import NOT_OF_A_SECTION, reduction_section
from layers import hf
from layers.decoder_lm import DecoderLM
from layers.t5 import T5
from layers.vit import ViT

_RUNGS = 8


def say(text: str) -> None:
    """A line of progress on standard error."""
    print(f"[import] {text}", file=sys.stderr, flush=True)


class Seq2SeqRecipe:
    """T5 and its kin become runs of the task seq2seq.

    Attributes:
      task: that a recipe must be for.
      kept: entries of a recipe's model section that say how the model runs, not what it is.
      subsections: of the model section, which are no attributes of the module.
    """

    task = "seq2seq"
    kept = ("rungs", "capacity", "remat", "scan_layers")
    subsections = ("deletion",)

    def default(self) -> ConfigDict:
        """Span corruption of 1,024 bytes of two novels."""
        config = config_lib.base_config()
        config.task = self.task
        config.data = data.resolve(dict(source="text", text="books", objective="span_corruption"))
        config.optimizer.name = "adafactor"
        config.eval.batches = 20
        return config

    def attribute(self, key: str, value: Any) -> Any:
        """A value of a config as an attribute of the module."""
        if key == "gate_hyper":
            return tuple(sorted(dict(value).items()))
        if key in ("gate", "rungs", "capacity"):
            return (tuple(value) if isinstance(value, list | tuple) else value) or None
        return value

    def check(self, module: T5) -> None:
        """Raises ValueError for a model that cannot be trained on bytes here."""
        if not module.decoder_layers:
            raise ValueError(
                "this checkpoint is an encoder alone; a run needs a decoder. layers.hf.load reads encoders"
            )
        _check_vocabulary(module.vocab_size)

    def section(self, module: T5, model: ConfigDict) -> ConfigDict:
        """The model section that `experiments.tasks.models.build_t5` makes the module from."""
        section = _fields(module)
        section |= {name: section[name] or "" for name in ("gate", "chunker")} | {"rungs": module.rungs or ()}
        section |= {name: dict(section[name]) for name in ("gate_hyper", "chunk_hyper")}
        deletion = dataclasses.asdict(Deletion()) | dict(model.get("deletion", {}))
        return ConfigDict({**section, "deletion": deletion})

    def fit_data(self, settings: ConfigDict, module: T5, directory: str | os.PathLike[str]) -> None:
        """Bytes need no fitting."""
        del settings, module, directory

    def complete(self, config: ConfigDict) -> None:
        """Sets a ladder where none is and a gate deletes: eight even steps up to the length of the data."""
        model = config.model
        if model.rungs or model.capacity or not model.gate:
            return
        length = tasks.build(config).inputs_length
        model.rungs = tuple(sorted({math.ceil(length * step / _RUNGS) for step in range(1, _RUNGS + 1)}))


class LanguageModellingRecipe:
    """Llama and Qwen2 become runs of the task language_modelling; attributes as in `Seq2SeqRecipe`."""

    task = "language_modelling"
    kept = ("remat",)
    subsections = ("losses", "exit_losses", "skip", "skip_training")

    def default(self) -> ConfigDict:
        """Prediction of each of 256 bytes of two novels."""
        config = config_lib.base_config()
        config.task = self.task
        config.data = data.resolve(dict(source="text", text="books", objective="next_token"))
        config.optimizer.name = "adamw"
        config.eval.batches = 20
        return config

    def attribute(self, key: str, value: Any) -> Any:
        """A value of a config as an attribute of the module."""
        del key
        return value

    def check(self, module: DecoderLM) -> None:
        """Any vocabulary will do: that of the data is chosen by `fit_data`."""
        del module

    def section(self, module: DecoderLM, model: ConfigDict) -> ConfigDict:
        """The model section that `experiments.tasks.models.build_decoder` makes the module from."""
        section = {name: value for name, value in _fields(module).items() if value is not None}
        section["rotary_scaling"] = dataclasses.asdict(module.rotary_scaling) if module.rotary_scaling else {}
        tasks_own = {"losses": {}, "exit_losses": "", "skip": {"counts": (), "bottom": 1}, "skip_training": False}
        return ConfigDict({**section, **{name: model.get(name, value) for name, value in tasks_own.items()}})

    def fit_data(self, settings: ConfigDict, module: DecoderLM, directory: str | os.PathLike[str]) -> None:
        """Takes the directory's own `tokenizer.json`, where there is one; else the model is fed bytes."""
        tokenizer = pathlib.Path(directory).expanduser().resolve() / "tokenizer.json"
        if not tokenizer.is_file() or settings.get("objective") != "next_token":
            if not settings.get("tokenizer"):
                _check_vocabulary(module.vocab_size)
            return
        say(f"data.objective: next_subword, in the ids of {tokenizer}")
        settings.update(data.resolve({**settings, "objective": "next_subword", "tokenizer": str(tokenizer)}))

    def complete(self, config: ConfigDict) -> None:
        """Nothing follows from what has been set."""
        del config


class ClassificationRecipe:
    """ViT, DeiT and ViT-MAE become runs of the task classification; attributes as in `Seq2SeqRecipe`.

    The number of classes and the pooling are the recipe's: a classifier that the checkpoint does not have starts anew.
    """

    task = "classification"
    kept = ("num_classes", "pool", "remat", "scan_layers", "last_layer_fusion")
    subsections = ("reduction", "rates")

    def default(self) -> ConfigDict:
        """Handwritten digits at the size and in the colours of the checkpoint's images."""
        config = config_lib.base_config()
        config.task = self.task
        config.data = data.resolve(dict(source="digits"))
        config.model = ConfigDict(dict(num_classes=10))
        config.eval.batches = 20
        return config

    def attribute(self, key: str, value: Any) -> Any:
        """A value of a config as an attribute of the module."""
        del key
        return tuple(value) if isinstance(value, list | tuple) else value

    def check(self, module: ViT) -> None:
        """Raises ValueError for images that the data pipeline does not make, or a model without classes."""
        height, width = module.image_size
        if height != width:
            raise ValueError(f"the checkpoint takes images of {height} x {width}; runs are fed square ones")
        if not module.num_classes:
            raise ValueError("a run needs classes: set model.num_classes")

    def section(self, module: ViT, model: ConfigDict) -> ConfigDict:
        """The model section that `experiments.tasks.models.build_vit` makes the module from."""
        section = {name: value for name, value in _fields(module).items() if name not in ("image_size", "channels")}
        section["reduction"] = reduction_section(**model.get("reduction", {}))
        return ConfigDict({**section, **{name: model[name] for name in ("rates",) if name in model}})

    def fit_data(self, settings: ConfigDict, module: ViT, directory: str | os.PathLike[str]) -> None:
        """Sets size, channels and normalisation of images to those of the checkpoint."""
        facts = {"image_size": module.image_size[0], "channels": module.channels, **hf.preprocessing(directory)}
        for key in facts:
            if key in settings and settings[key] != facts[key]:
                say(f"data.{key}: {facts[key]} as the checkpoint has it, in place of {settings[key]}")
                settings[key] = facts[key]

    def complete(self, config: ConfigDict) -> None:
        """Nothing follows from what has been set."""
        del config


def _check_vocabulary(size: int) -> None:
    """Raises ValueError for a table that has no row for some byte; says so where the rows are not those of bytes."""
    highest = byte_vocab.FIRST_SENTINEL
    if size <= highest:
        raise ValueError(f"vocab_size is {size}; the bytes that runs are trained on have ids up to {highest}")
    if size != byte_vocab.TABLE_SIZE:
        say(f"note: vocab_size is {size}; runs are fed bytes (ids + {byte_vocab.OFFSET}), not this model's pieces")


def _fields(module: Any) -> dict[str, Any]:
    """Attributes of a module that a model section may hold."""
    names = {field.name for field in dataclasses.fields(module)} - NOT_OF_A_SECTION
    return {name: getattr(module, name) for name in sorted(names)}


RECIPES = {T5: Seq2SeqRecipe(), DecoderLM: LanguageModellingRecipe(), ViT: ClassificationRecipe()}
