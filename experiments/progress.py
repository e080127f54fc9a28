# SPDX-License-Identifier: Apache-2.0
"""Progress of a run for people: a live bar on a terminal, plain lines elsewhere.

Rates and the remaining time leave out compilation (everything before the first update) and pauses (evaluation,
checkpoints). Device values are fetched only when something is drawn, so that watching does not slow the run.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

_WINDOW = 50  # updates that the shown rate is averaged over: adaptive models change speed while they train
_LIVE_SECONDS = 0.25


class Progress:
    """Shows step, loss, step time, examples and tokens a second, remaining and elapsed time.

    Args:
      total_steps: the step at which the run ends.
      start: the step that the run starts after (0, or the step of the checkpoint).
      examples_per_step, tokens_per_step: of the global batch.
      label: what is running, at the head of each line.
      enabled: False draws nothing but still measures (processes other than the first).
      log_every: plain lines come at multiples of this many steps,
      min_seconds: and at least this many seconds apart; the first and the last step are always shown.
      stream: where to draw; default standard error, so that output can be piped.
      clock: seconds; for tests.

    Raises:
      ValueError: when the steps or rates make no sense.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start: int = 0,
        examples_per_step: float = 0,
        tokens_per_step: float = 0,
        label: str = "train",
        enabled: bool = True,
        log_every: int = 1,
        min_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not 0 <= start <= total_steps:
            raise ValueError(f"start must lie in [0, total_steps = {total_steps}]; got {start}")
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1; got {log_every}")
        self.total_steps, self.start, self.label = total_steps, start, label
        self.examples_per_step, self.tokens_per_step = examples_per_step, tokens_per_step
        self.log_every, self.min_seconds = log_every, min_seconds
        self.step = start
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._began = self._ended = clock()
        self._paused = 0.0
        self._pause_depth = 0
        self._pause_began = 0.0
        self._first: tuple[int, float] | None = None  # step and active seconds at the first update
        self._window: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW + 1)
        self._scalars: Mapping[str, Any] = {}
        self._drawn_at = float("-inf")
        self._drawn_step = start
        self._closed = False
        self._enabled = enabled
        self._live: Live | None = None
        if enabled and self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), auto_refresh=False, transient=False)
            self._live.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, step: int, scalars: Mapping[str, Any] | None = None) -> None:
        """Tells that `step` steps are done; `scalars` may hold device values ("loss" is shown).

        Raises:
          ValueError: when `step` goes backwards.
        """
        if step < self.step:
            raise ValueError(f"progress went backwards: step {step} after step {self.step}")
        crossed = step // self.log_every > self.step // self.log_every
        self.step = step
        self._scalars = scalars or self._scalars
        self._ended = self._clock()
        point = (step, self._active())
        if self._first is None:
            self._first = point
        self._window.append(point)
        if self._enabled and not self._closed:
            self._draw(crossed)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside out of the rates: evaluation, saving. May be nested."""
        if self._pause_depth == 0:
            self._pause_began = self._clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused += self._clock() - self._pause_began

    def step_seconds(self) -> float | None:
        """Seconds a step over the last updates, without compilation and pauses; None before the second update."""
        return _slope(self._window)

    def remaining_seconds(self) -> float | None:
        """Expected seconds to the last step; None while the rate is unknown."""
        rate = self.step_seconds()
        return None if rate is None else rate * (self.total_steps - self.step)

    def summary(self) -> dict[str, float | int | None]:
        """Steps, seconds and rates of the whole run so far; rates are None before the second update."""
        rate = _slope((self._first, self._window[-1])) if self._first else None
        return {
            "steps": self.step - self.start,
            "seconds": self._ended - self._began,
            "compile_seconds": self._first[1] if self._first else None,
            "paused_seconds": self._paused,
            "step_seconds": rate,
            "examples_per_second": self.examples_per_step / rate if rate else None,
            "tokens_per_second": self.tokens_per_step / rate if rate else None,
        }

    def close(self) -> None:
        """Draws the last state and gives the terminal back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._ended = self._clock()
        if self._live is not None:
            self._live.update(self._bar(), refresh=True)
            self._live.stop()
        elif self._enabled and self.step > self._drawn_step:
            self._print()

    def _active(self) -> float:
        """Seconds since the start without pauses."""
        running = self._clock() - self._pause_began if self._pause_depth else 0.0
        return self._ended - self._began - self._paused - running

    def _draw(self, crossed: bool) -> None:
        """Draws when it is time; `crossed`: a multiple of `log_every` was reached."""
        now = self._ended
        if self._live is not None:
            if now - self._drawn_at >= _LIVE_SECONDS or self.step >= self.total_steps:
                self._drawn_at, self._drawn_step = now, self.step
                self._live.update(self._bar(), refresh=True)
            return
        due = crossed and now - self._drawn_at >= self.min_seconds
        if due or self.step >= self.total_steps or len(self._window) == 1:
            self._print()

    def _print(self) -> None:
        self._drawn_at, self._drawn_step = self._ended, self.step
        percent = 100.0 * self.step / max(self.total_steps, 1)
        head = f"[{self.label}] step {self.step}/{self.total_steps} ({percent:.0f} %)"
        print(" | ".join([head, *self._parts()]), file=self._stream, flush=True)

    def _bar(self) -> Table:
        table = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self.step, width=24)
        table.add_row(self.label, bar, f"{self.step}/{self.total_steps}", " | ".join(self._parts()))
        return table

    def _parts(self) -> list[str]:
        parts = []
        if "loss" in self._scalars:
            parts.append(f"loss {float(np.asarray(self._scalars['loss'])):.4f}")
        rate = self.step_seconds()
        if rate:
            parts.append(f"{_duration(rate)}/step")
            for amount, unit in ((self.examples_per_step, "examples"), (self.tokens_per_step, "tokens")):
                if amount:
                    parts.append(f"{_quantity(amount / rate)} {unit}/s")
        elif self._first:
            parts.append(f"compiled in {_duration(self._first[1])}")
        left = self.remaining_seconds()
        parts.append(f"ETA {_clock_time(left) if left is not None else '-'}")
        parts.append(f"elapsed {_clock_time(self._ended - self._began)}")
        return parts


def _slope(points: Any) -> float | None:
    """Seconds a step between the first and the last point; None without two different steps."""
    if not points:
        return None
    (step0, time0), (step1, time1) = points[0], points[-1]
    return (time1 - time0) / (step1 - step0) if step1 > step0 else None


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _clock_time(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _quantity(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.1f}"
