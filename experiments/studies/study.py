# SPDX-License-Identifier: Apache-2.0
"""What all studies share: rows that are written once, and the place where runs and results lie."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments import measure
from experiments.config import load
from experiments.rundir import config_hash, git_revision, plain, versions
from experiments.studies import tables
from experiments.train import TrainResult, train

# Packages whose versions stand in every row; the run directories hold the whole list.
# Overrides of byte-level runs that are too long for two novels. The standard library of the running Python is more text, but
# another one with each version and build.
LONG_TEXT = {"data.text": "stdlib"}
_PACKAGES = ("python", "jax", "jaxlib", "flax", "optax")


class Rows:
    """Rows in a JSON lines file, each under a unique id; a row that is there for the same config is not made again.

    A torn last line, left by a kill, is dropped.

    Attributes:
      path: of the file that is read and written; copy: of another one with the same rows, which is never read, or None.
    """

    def __init__(self, path: epath.Path, copy: epath.Path | None = None):
        self.path, self.copy = path, copy
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self._rows[row["id"]] = row

    def make(self, identifier: str, config: ConfigDict, build: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row `identifier`: the one on disk if it came from the same config, else a new one from `build`."""
        digest = config_hash(config)
        old = self._rows.get(identifier)
        if old is not None and old["config_hash"] == digest:
            return old
        started = time.time()
        row = {"id": identifier, **build()}
        row |= {
            "config_hash": digest,
            "seed": config.seed,
            "device": measure.device_name(),
            "versions": {name: value for name, value in versions().items() if name in _PACKAGES},
            "revision": git_revision(),
            "seconds": round(time.time() - started, 2),
        }
        self._rows[identifier] = plain(row)
        self._write()
        return self._rows[identifier]

    def keep(self, identifiers: Iterable[str]) -> list[dict[str, Any]]:
        """The rows of these ids, in this order; others, left by earlier settings, are removed from the file."""
        self._rows = {name: self._rows[name] for name in identifiers}
        self._write()
        return list(self._rows.values())

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._rows.values())
        for path in filter(None, (self.path, self.copy)):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.parent / (path.name + ".tmp")
            temporary.write_text(text)
            # A rename is atomic, so a kill leaves the old file or the new one.
            temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how a study runs.

    Attributes:
      name, suite: of the study and the suite.
      settings: of the suite, from the study's `SUITES`.
      results: directory of this study's tables, plots and rows; runs: directory of its training runs.
      say: prints a line of progress.
      data: folders of data sets that are not embedded, by name.
    """

    name: str
    suite: str
    settings: Mapping[str, Any]
    results: epath.Path
    runs: epath.Path
    say: Callable[[str], None]
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> Rows:
        """The study's rows: those whose runs are here. Results of others, as a clone brings them, are made again."""
        return Rows(self.runs / "rows.jsonl", self.results / "rows.jsonl")

    @staticmethod
    def config(name: str, arg: str = "") -> ConfigDict:
        """The config `configs/NAME:ARG`."""
        path = Context.config_path(name)
        return load(f"{path}:{arg}" if arg else str(path))

    @staticmethod
    def config_path(name: str) -> epath.Path:
        """Where the config `configs/NAME` lies."""
        return epath.Path(__file__).parents[2] / "configs" / name

    @property
    def receipts(self) -> tuple[tables.Column, ...]:
        """Columns of where rows come from, for rows that only the study itself makes again."""
        command = f"python -m experiments.reproduce --suite={self.suite} --only={self.name}"
        return (*tables.RECEIPTS[:2], tables.Column("command", lambda _: command, receipt=True))

    def train(self, name: str, config: ConfigDict, **options: Any) -> TrainResult:
        """Trains the run `name`, or continues or returns it when it is there."""
        self.say(f"training {name}: {config.steps} steps of {config.batch_size} ({self.runs / name})")
        return train(config, self.runs / name, **options)

    def evaluate_command(self, run: str, split: str, overrides: Mapping[str, Any], batches: int | None = None) -> str:
        """The command that evaluates a run of this study again, on the suite's number of batches unless given (0: all)."""
        batches = self.settings["batches"] if batches is None else batches
        changes = "".join(f" --set {key}={json.dumps(value)}" for key, value in overrides.items())
        # As many batches as the study looked at, else the command would print another number.
        limit = f" --batches={batches}" if batches else ""
        return f"python -m experiments.evaluate --workdir={self.runs / run} --split={split}{limit}{changes}"
