# SPDX-License-Identifier: Apache-2.0
"""Configs: the defaults that every training config starts from, their checks, and how one is named on a command line.

A config file is Python, `configs/<paper>/<name>.py`, with a function `get_config(arg=None)` that starts from
`base_config()` and returns a `ConfigDict` of plain values. It is named as `--config=path.py` or `--config=path.py:arg`,
where `arg` reads like `variant=B/16,runlocal` and is read by `parse_arg`; single values are then overridden by
`--config.optimizer.peak=1e-4`.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from experiments.rundir import ConfigKeyError, apply_overrides

# Sections whose keys belong to the task, the model and the data set, which check them themselves.
OPEN_SECTIONS = ("model", "data")
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A config, a config file or a command line that cannot be used; the message says what to change."""


def base_config() -> ConfigDict:
    """Every key that `experiments.train` reads, with its default; `model` and `data` are filled by each config."""
    return ConfigDict(
        {
            "seed": 0,
            "task": "",  # a name that experiments.tasks.build knows
            "model": {},
            "data": {},
            "dtype": "float32",  # of activations; parameters are float32
            "steps": 1000,  # optimiser updates in the whole run
            "batch_size": 32,  # examples in one update, over all devices and processes
            "accumulate": 1,  # microbatches that one update is split into
            "ema": 0.0,  # decay of the moving average of the parameters; 0: none
            "optimizer": {
                "name": "adamw",
                "schedule": "cosine",
                "peak": 1e-3,
                "warmup": 0,
                "end": 0.0,
                "timescale": 0,
                "cooldown": 0,
                "weight_decay": 0.0,
                "clip": 1.0,  # global norm of the gradient; 0: off
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "momentum": 0.9,  # sgd only
            },
            "eval": {
                "split": "valid",  # as experiments.data names it
                "every": 500,  # steps; 0: never. The last step is evaluated as well
                "batches": 0,  # 0: the whole evaluation split
            },
            "log_every": 50,
            "checkpoint": {
                "every": 500,
                "keep": 3,
                "best": "",  # an evaluation metric; its best checkpoint is kept as well
                "best_mode": "min",
            },
            "parallel": {"preset": "dp"},
        }
    )


def validate(config: ConfigDict) -> None:
    """Checks a whole config before anything is built.

    Raises:
      ConfigError: an unknown or missing key, a wrong type, or a value out of range, with what is right.
    """
    _check_keys(config, base_config(), "")
    for key in ("steps", "batch_size", "accumulate", "log_every", "checkpoint.every", "checkpoint.keep"):
        _require(config, key, _get(config, key) >= 1, "must be at least 1")
    for key in ("seed", "eval.every", "eval.batches"):
        _require(config, key, _get(config, key) >= 0, "must be 0 or above")
    _require(config, "batch_size", config.batch_size % config.accumulate == 0, f"must divide by {config.accumulate=}")
    _require(config, "ema", 0.0 <= config.ema < 1.0, "must lie in [0, 1); 0 turns the moving average off")
    _require(config, "dtype", config.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}")
    _require(config, "checkpoint.best_mode", config.checkpoint.best_mode in ("min", "max"), "must be min or max")
    best_without_eval = bool(config.checkpoint.best) and not config.eval.every
    _require(config, "checkpoint.best", not best_without_eval, "needs evaluations; set eval.every above 0")


def _check_keys(config: ConfigDict, base: ConfigDict, prefix: str) -> None:
    """Compares keys and types with the base config, section by section."""
    for key in config:
        if key not in base:
            raise ConfigError(_unknown_key(prefix + key, [prefix + k for k in base]))
    for key, default in base.items():
        name = prefix + key
        if key not in config:
            raise ConfigError(f"config.{name} is missing; start the config from experiments.config.base_config().")
        value = config[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"config.{name} is {value!r}; it must be a section with keys.")
            if key not in OPEN_SECTIONS:
                _check_keys(value, default, name + ".")
            continue
        allowed = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ConfigError(f"config.{name} is {value!r}; it must be a value of type {type(default).__name__}.")


def _require(config: ConfigDict, key: str, good: bool, rule: str) -> None:
    """Raises ConfigError with the key, its value and the rule unless `good`."""
    if not good:
        raise ConfigError(f"config.{key} is {_get(config, key)!r}; it {rule}.")


def _get(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """A message for a key that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known keys: {', '.join(sorted(known))}."
    return f"config.{key} does not exist. {hint}"


# ---- Config files ----------------------------------------------------------------------------------------------------


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """Reads the text after ':' of `--config=file.py:arg`.

    `arg` is a list `name=value,name=value`; a bare `name` means True. Names and types come from the defaults in `spec`:
    `parse_arg("variant=B/16,runlocal", variant="S/16", runlocal=False)` gives `variant="B/16", runlocal=True`.

    Raises:
      ConfigError: an unknown name, a name given twice, or a value that its type cannot read.
    """
    result = ConfigDict(spec)
    seen = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, _, text = item.partition("=")
        if name not in spec:
            known = ", ".join(f"{k}={v!r}" for k, v in spec.items())
            raise ConfigError(f"unknown config argument {name!r} in {arg!r}; this config takes: {known}.")
        if name in seen:
            raise ConfigError(f"config argument {name!r} is given twice in {arg!r}.")
        seen.add(name)
        result[name] = _read(name, text if "=" in item else "true", spec[name])
    return result


def _read(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the type of `default`."""
    if not isinstance(default, (bool, int, float, str)):
        raise TypeError(
            f"the default of config argument {name!r} is {default!r}; it must be a bool, int, float or str."
        )
    if isinstance(default, bool):
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ConfigError(f"config argument {name}={text!r} must be true or false.")
        return values[text.lower()]
    try:
        return type(default)(text)
    except ValueError as error:
        raise ConfigError(f"config argument {name}={text!r} must be of type {type(default).__name__}.") from error


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config that `path.py` or `path.py:arg` names, locked, as `--config=` would give it.

    Args:
      spec: the file and its argument.
      overrides: values by dotted key, as in `{"optimizer.peak": 1e-4}`.

    Raises:
      ConfigError: no such file, no `get_config` in it, or an override of a key that does not exist or of another type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"there is no config file {path!r} (current directory: {Path.cwd()}).")
    module_spec = importlib.util.spec_from_file_location(f"config_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(arg=None).")
    config = module.get_config(arg or None).lock()
    try:
        return apply_overrides(config, overrides or {})
    except (ConfigKeyError, TypeError) as error:
        raise ConfigError(str(error)) from error


def load_config(workdir: os.PathLike[str]) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      FileNotFoundError: the workdir holds no run.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json); train first: python -m experiments.train")
    config = base_config()
    with config.unlocked():
        config.update(ConfigDict(json.loads(path.read_text())))
    return config


# ---- Command line ----------------------------------------------------------------------------------------------------


def define_flag() -> None:
    """Defines `--config`; called by a program's `main` guard, so that importing a program defines no flags."""
    config_flags.DEFINE_config_file("config", None, "Config file, with its argument: path.py[:name=value,name].")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """A flags parser for `absl.app.run` that turns a bad `--config...` into one clear line instead of a traceback."""
    try:
        rest = app.parse_flags_with_usage(list(argv))
        if flags.FLAGS.config is not None and not isinstance(flags.FLAGS.config, ConfigDict):
            load(config_flags.get_config_filename(flags.FLAGS["config"]))  # reports why the file could not be read
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags are written --name=value.")
        return rest
    except ConfigError as error:
        reason = str(error)
    except (AttributeError, KeyError, TypeError) as error:
        reason = _explain(argv, error)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Why absl could not read `argv`: usually an override of a key that does not exist."""
    spec = next((a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")), None)
    keys = [a.lstrip("-").split("=", 1)[0].removeprefix("config.") for a in argv if a.lstrip("-").startswith("config.")]
    if spec is None:
        return f"--config=path.py is missing ({error})"
    try:
        load(spec, dict.fromkeys(keys))  # None fits every type, so this complains about names only
    except ConfigError as reason:
        return str(reason)
    return f"{type(error).__name__}: {error}"
