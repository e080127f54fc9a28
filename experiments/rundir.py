# SPDX-License-Identifier: Apache-2.0
"""The run directory: what was run, with what, and the guard that keeps two experiments out of one directory.

workdir/config.json     the resolved config
workdir/run.json        seed, versions, git revision, command, one entry for each start
workdir/checkpoints/    see checkpoints.py
workdir/metrics.jsonl   see metrics.py
workdir/tb/             TensorBoard events
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

# Keys that do not change what is learned: how often something is written, and where the arrays lie. A run may be
# resumed with other values of these. A prefix covers everything below it.
IGNORED = (
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.best",
    "checkpoint.best_mode",
    "eval.every",
    "parallel.preset",
)
PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "numpy",
    "tensorflow-datasets",
    "adaptive-transformers",
)
_OWN_FILES = ("config.json", "run.json", "metrics.jsonl")
_OWN_FOLDERS = ("checkpoints", "tb")
_ABSENT = "<absent>"
_CHOICE = "pass --overwrite to start anew, or choose another --workdir"
_log = logging.getLogger(__name__)


class WorkdirMismatch(ValueError):
    """The directory holds another experiment, or something that is not a run."""


class ConfigKeyError(KeyError):
    """A config key that does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0])


def plain(value: Any, name: str = "config") -> Any:
    """The JSON form of a config value: dicts, lists, strings, numbers, None; NaN and infinities become strings.

    Raises:
      TypeError: when a value has no JSON form, naming its key.
    """
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{name} = {value!r} ({type(value).__name__}) cannot be written as JSON; use plain values")


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> JSON value. An empty section is kept as `{}`."""
    result: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and (value or not prefix):
            for key, item in value.items():
                visit(f"{prefix}.{key}" if prefix else key, item)
        else:
            result[prefix] = value

    visit("", plain(config))
    return result


def identity(config: Any) -> dict[str, Any]:
    """The dotted keys and values that decide the result of a run: all but those under `IGNORED`."""
    return {key: value for key, value in flatten(config).items() if not _ignored(key)}


def _ignored(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def config_hash(config: Any) -> str:
    """12 hexadecimal characters that name a config's identity; the same in every process and on every machine."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def apply_overrides(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Sets dotted keys in place and returns the config; all are checked before the first one is set.

    An int is taken where a float stands, a list where a tuple stands (and the other way round), None everywhere; a field
    that holds None takes anything, a placeholder what its type allows.

    Raises:
      ConfigKeyError: a key does not exist; the message names the nearest ones.
      TypeError: a value has another type than the field.
    """
    converted = {key: _converted(config, key, value) for key, value in overrides.items()}
    for key, value in converted.items():
        section, _, last = key.rpartition(".")
        target = _section(config, section)
        with target.ignore_type():  # checked above, with a message that names the whole key
            target[last] = value
    return config


def _section(config: ml_collections.ConfigDict, dotted: str) -> Any:
    for part in filter(None, dotted.split(".")):
        config = config[part]
    return config


def _dotted_keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + key)
        if isinstance(config[key], ml_collections.ConfigDict):
            keys += _dotted_keys(config[key], f"{prefix}{key}.")
    return keys


def _converted(config: ml_collections.ConfigDict, key: str, value: Any) -> Any:
    """The value as the type of the field `key`."""
    known = _dotted_keys(config)
    if key not in known:
        last = key.rpartition(".")[2]
        same_end = [name for name in known if name.rpartition(".")[2] == last]
        near = list(dict.fromkeys(same_end + difflib.get_close_matches(key, known, n=3, cutoff=0.6)))[:3]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"
        raise ConfigKeyError(f"config has no key {key!r}; {hint}")
    section, _, last = key.rpartition(".")
    kind = _section(config, section).get_type(last)
    if value is None or kind is type(None):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if (kind is float and type(value) is int) or (kind in (tuple, list) and isinstance(value, tuple | list)):
        return kind(value)
    # A section without keys is free (hyper-parameters by name); one with keys takes values for just those.
    free = kind is ml_collections.ConfigDict and isinstance(value, Mapping)
    if free and set(_section(config, key)) in (set(), set(value)):
        return ml_collections.ConfigDict(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"config.{key} is of type {kind.__name__}; {value!r} is of type {type(value).__name__}")
    return value


def git_revision(directory: epath.PathLike | None = None) -> str | None:
    """The commit of the repository that holds `directory` (default: this code), with "-dirty" after local changes.

    None outside a repository, before its first commit, or where git is not installed.
    """
    where = os.fspath(directory) if directory is not None else os.path.dirname(os.path.abspath(__file__))

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "--verify", "HEAD")
    if not revision:
        return None
    return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision


def versions() -> dict[str, str | None]:
    """Versions of python and of the packages that a result may depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@dataclasses.dataclass(frozen=True)
class RunDir:
    """An opened run directory; make one with `RunDir.open`."""

    path: epath.Path
    config_hash: str
    resumed: bool

    @property
    def checkpoints(self) -> epath.Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> epath.Path:
        """The JSON lines file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> epath.Path:
        """Directory of TensorBoard events."""
        return self.path / "tb"

    @classmethod
    def open(cls, workdir: epath.PathLike, config: ml_collections.ConfigDict, *, overwrite: bool = False) -> RunDir:
        """Makes or resumes a run directory; only the first process writes, all others wait for it.

        Args:
          workdir: local path or one that `epath` knows; `~` is expanded, relative paths are made absolute.
          config: the resolved config; its `seed`, where it has one, is recorded.
          overwrite: starts anew by removing the files of the run that is there, and no other file.

        Raises:
          WorkdirMismatch: the directory holds another experiment, an unreadable config, or files that are no run.
          TypeError: the config holds a value that cannot be written as JSON.
        """
        path = epath.Path(workdir).expanduser()
        path = path if path.is_absolute() else path.resolve()
        new = plain(config)
        resumed = False
        if jax.process_index() == 0:
            resumed = _prepare(path, new, overwrite)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            resumed = bool(multihost_utils.broadcast_one_to_all(np.asarray(resumed)))
        return cls(path, config_hash(new), resumed)


def _prepare(path: epath.Path, new: dict[str, Any], overwrite: bool) -> bool:
    """Checks and writes the directory; True when it resumes a run."""
    if path.exists() and not path.is_dir():
        raise WorkdirMismatch(f"{path} is a file; choose another --workdir")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    entries -= {f"{name}.tmp" for name in _OWN_FILES}
    is_run = "config.json" in entries
    if entries and not is_run:
        shown = ", ".join(sorted(entries)[:5])
        raise WorkdirMismatch(f"{path} is not empty and not a run ({shown}); choose another --workdir")
    old = None
    if is_run and overwrite:
        _wipe(path)
    elif is_run:
        old = _read_config(path / "config.json")
        _check_same(path, old, new)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", new)
    _write_json(path / "run.json", _run_record(path, old, new))
    return old is not None


def _wipe(path: epath.Path) -> None:
    """Removes the files of a run, and no other; config.json last, so that a killed wipe is still known as a run."""
    for name in _OWN_FOLDERS:
        if (path / name).exists():
            (path / name).rmtree()
    for name in reversed(_OWN_FILES):
        (path / name).unlink(missing_ok=True)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirMismatch(
            f"{path} cannot be read ({error}), so it is unknown which experiment this is; restore the file, {_CHOICE}"
        ) from error
    if not isinstance(config, dict):
        raise WorkdirMismatch(f"{path} is not a config; {_CHOICE}")
    return config


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) where two identities differ; "<absent>" where one has no such key."""
    before, after = identity(old), identity(new)
    keys = sorted(set(before) | set(after))
    pairs = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


def _check_same(path: epath.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    different = differences(old, new)
    if not different:
        return
    shown = [f"  {key}: {a!r} there, {b!r} now" for key, (a, b) in list(different.items())[:20]]
    more = [f"  and {len(different) - 20} more"] if len(different) > 20 else []
    head = f"{path} holds another experiment; these keys differ:"
    raise WorkdirMismatch("\n".join([head, *shown, *more, _CHOICE]))


def _run_record(path: epath.Path, old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The contents of run.json: the first start at the top, every start in `starts`."""
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_revision": git_revision(),
        "versions": versions(),
        "processes": jax.process_count(),
        "devices": [f"{jax.device_count()} x {jax.devices()[0].device_kind}"],
    }
    if old is not None and old != new:
        before, after = flatten(old), flatten(new)
        keys = sorted(set(before) | set(after))
        start["changed"] = {k: [before.get(k), after.get(k)] for k in keys if before.get(k) != after.get(k)}
    record = _old_record(path / "run.json") if old is not None else None
    if record is None:
        head = {"seed": new.get("seed"), "config_hash": config_hash(new)}
        head |= {key: start[key] for key in ("command", "git_revision", "versions")}
        record = head | {"starts": []}
    record["starts"].append(start)
    return record


def _old_record(path: epath.Path) -> dict[str, Any] | None:
    """The record of earlier starts; it is a log, so an unreadable one is put aside and does not stop the run."""
    try:
        record = json.loads(path.read_text())
        if isinstance(record["starts"], list):
            return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    aside = path.with_name("run.json.damaged")
    _log.warning("%s cannot be read; it is kept as %s and a new one begins", path, aside)
    path.rename(aside)
    return None


def _write_json(path: epath.Path, value: Any) -> None:
    """Writes all or nothing: a killed process leaves the old file."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
    scratch.replace(path)
