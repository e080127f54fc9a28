# SPDX-License-Identifier: Apache-2.0
"""Metrics as sums and counts, and the writers that put scalars on disk.

A metric is a pair `(sum, count)` of float32 scalars, so micro-batches, devices and evaluation batches are merged by
addition and divided once at the end: right under padding, sharding and gradient accumulation. JSON lines are the source
of all tables and plots; TensorBoard is an optional copy.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

Metrics = Mapping[str, tuple[Any, Any]]

_RESERVED = ("step", "nan", "inf", "-inf")
_log = logging.getLogger(__name__)


def merge(a: Metrics, b: Metrics) -> dict[str, tuple[Any, Any]]:
    """Adds two metric dicts, sums to sums and counts to counts; `{}` is the neutral element. Traceable.

    Raises:
      ValueError: when both are non-empty and their names differ (a metric that one batch lacks would be averaged over
        fewer examples than the others without a trace).
    """
    if not a or not b:
        return dict(a or b)
    if set(a) != set(b):
        raise ValueError(
            f"cannot merge metrics with different names: only in the first {sorted(set(a) - set(b))}, only in the "
            f"second {sorted(set(b) - set(a))}; report an absent metric as (0.0, 0.0)"
        )
    return {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a}


def compute(metrics: Metrics) -> dict[str, float]:
    """Divides every sum by its count on the host, in float64; a count of 0 gives NaN ("nothing was measured").

    Raises:
      ValueError: when a metric is not a pair of scalars.
    """
    result = {}
    for name, pair in jax.device_get(dict(metrics)).items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or any(np.ndim(part) for part in pair):
            shapes = [np.shape(part) for part in pair] if isinstance(pair, tuple | list) else type(pair).__name__
            raise ValueError(f"metric {name!r} must be (sum, count), two scalars; got {shapes}")
        total, count = float(pair[0]), float(pair[1])
        result[name] = total / count if count else math.nan
    return result


class Writer(Protocol):
    """Where scalars go. One call a step and group of scalars."""

    def write(self, step: int, scalars: Mapping[str, Any], *, prefix: str = "") -> None:
        """Writes `scalars` of `step`; a name becomes `prefix/name` when there is a prefix."""

    def close(self) -> None:
        """Flushes and releases the target."""


def _named(scalars: Mapping[str, Any], prefix: str) -> dict[str, int | float | bool]:
    """Python numbers under their full names; arrays must be scalars."""
    head = f"{prefix.rstrip('/')}/" if prefix else ""
    return {f"{head}{name}": _number(f"{head}{name}", value) for name, value in scalars.items()}


def _number(name: str, value: Any) -> int | float | bool:
    if isinstance(value, bool | int | float):
        return value
    array = np.asarray(value)
    number = (
        array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    )
    if array.size != 1 or not number:
        raise TypeError(f"{name!r} must be one real number; got shape {array.shape}, dtype {array.dtype}")
    return float(array.item()) if array.dtype.kind not in "biu" else array.item()


def encode_row(step: int, scalars: Mapping[str, int | float | bool]) -> str:
    """One line of strict JSON: NaN and infinities become null and are named in "nan", "inf" and "-inf"."""
    taken = sorted(set(scalars) & set(_RESERVED))
    if taken:
        raise ValueError(f"{taken} are names of the row itself; choose other names for these scalars")
    row: dict[str, Any] = {"step": int(step)}
    odd: dict[str, list[str]] = {}
    for name, value in scalars.items():
        finite = math.isfinite(value)
        row[name] = value if finite else None
        if not finite:
            odd.setdefault("nan" if math.isnan(value) else ("inf" if value > 0 else "-inf"), []).append(name)
    return json.dumps(row | odd, allow_nan=False)


def _decode_row(line: str) -> dict[str, Any] | None:
    """The row, or None where the line is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """All rows of a JSON lines file, NaN and infinities restored; a torn last line is left out.

    Raises:
      ValueError: when another line than the last is not a row.
    """
    lines = epath.Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _decode_row(line)
        if row is None and number == len(lines):  # no newline was written after it: the writer died in this line
            break
        if row is None:
            raise ValueError(f"{path}, line {number} is not a metrics row: {line[:80]!r}")
        for key, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
            row.update(dict.fromkeys(row.pop(key, ()), value))
        rows.append(row)
    return rows


class JsonlWriter:
    """Appends one JSON object a line, flushed at each write.

    Args:
      path: the file; it is made with its parent when absent.
      resume_step: the step that the run resumes from; rows of later steps are dropped, so that a run that was killed
        and resumed has each row once. None keeps all rows.
    A torn last line (the writer was killed in it) is always dropped.
    """

    def __init__(self, path: epath.PathLike, resume_step: int | None = None):
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None
        self._keep_rows(resume_step)
        self._file = self.path.open("a")

    def write(self, step: int, scalars: Mapping[str, Any], *, prefix: str = "") -> None:
        """Appends `{"step": step, "prefix/name": value, ...}`.

        Raises:
          TypeError: when a value is not one number.
          ValueError: after `close()`, or when a name is reserved.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        self._file.write(encode_row(step, _named(scalars, prefix)) + "\n")
        self._file.flush()

    def truncate(self, step: int) -> None:
        """Drops the rows of steps after `step`."""
        self.close()
        self._keep_rows(step)
        self._file = self.path.open("a")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep_rows(self, last_step: int | None) -> None:
        """Rewrites the file without later rows and unreadable lines; leaves it alone when there are none."""
        if not self.path.exists():
            return
        text = self.path.read_text()
        kept = []
        for number, line in enumerate(text.splitlines(), start=1):
            row = _decode_row(line)
            if row is None:
                _log.warning("%s: line %d is not a metrics row and is dropped: %r", self.path, number, line[:80])
            elif last_step is None or row["step"] <= last_step:
                kept.append(line + "\n")
        if (new := "".join(kept)) != text:
            scratch = self.path.with_name(self.path.name + ".tmp")
            scratch.write_text(new)
            scratch.replace(self.path)


class TensorBoardWriter:
    """Copies scalars to TensorBoard event files through tensorboardX (no TensorFlow needed).

    Args:
      directory: where event files go.
      resume_step: events of later steps are hidden by TensorBoard (they were written before the run was killed).

    Raises:
      ImportError: when tensorboardX is not installed.
    """

    def __init__(self, directory: epath.PathLike, resume_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoardWriter needs tensorboardX: pip install tensorboardX") from error
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge)

    def write(self, step: int, scalars: Mapping[str, Any], *, prefix: str = "") -> None:
        """Adds every scalar under its full name."""
        for name, value in _named(scalars, prefix).items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Writes what is queued and closes the event file."""
        self._writer.close()


class MultiWriter:
    """Hands every call to each of several writers; with none it is the no-op of processes other than the first."""

    def __init__(self, writers: Iterable[Writer] = ()):
        self.writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, Any], *, prefix: str = "") -> None:
        """Writes to each writer in turn; device arrays are fetched once."""
        if not self.writers:
            return
        scalars = jax.device_get(dict(scalars))
        for writer in self.writers:
            writer.write(step, scalars, prefix=prefix)

    def close(self) -> None:
        """Closes every writer, also when one of them fails; the first failure is raised at the end."""
        failures = []
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
