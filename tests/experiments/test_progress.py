# SPDX-License-Identifier: Apache-2.0
"""Rates leave out compilation and pauses; lines are plain where no one watches live."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(total: int, **options: Any) -> tuple[Progress, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    defaults = {"examples_per_step": 8, "tokens_per_step": 1000, "label": "vit", "clock": clock, "stream": stream}
    return Progress(total, **(defaults | options)), clock, stream


def test_compile_and_pauses_are_left_out_of_rates_and_remaining_time() -> None:
    progress, clock, _ = make(100)
    assert progress.remaining_seconds() is None
    clock.now += 60  # compiles
    progress.update(1, {"loss": 3.0})
    assert progress.step_seconds() is None
    for step in range(2, 12):
        clock.now += 0.5
        progress.update(step, {"loss": 2.0})
        if step % 3 == 0:
            with progress.pause():
                clock.now += 7
                with progress.pause():  # a save inside an evaluation
                    clock.now += 2
    assert progress.step_seconds() == pytest.approx(0.5)
    assert progress.remaining_seconds() == pytest.approx(89 * 0.5)
    clock.now += 4
    progress.close()
    assert progress.summary() == {
        "steps": 11,
        "seconds": pytest.approx(60 + 5 + 27 + 4),
        "compile_seconds": pytest.approx(60),
        "paused_seconds": pytest.approx(27),
        "step_seconds": pytest.approx(0.5),
        "examples_per_second": pytest.approx(16),
        "tokens_per_second": pytest.approx(2000),
    }


def test_time_in_a_pause_counts_as_paused_when_it_ends_with_an_error() -> None:
    progress, clock, _ = make(10)
    with pytest.raises(RuntimeError), progress.pause():
        clock.now += 3
        raise RuntimeError
    clock.now += 1
    progress.update(1)
    clock.now += 2
    progress.update(2)
    summary = progress.summary()
    assert (summary["paused_seconds"], summary["compile_seconds"], summary["step_seconds"]) == (3, 1, 2)


def test_updates_may_skip_steps_and_resume_from_a_checkpoint() -> None:
    progress, clock, stream = make(1000, start=500)
    for step in (510, 520, 540):
        clock.now += (step - progress.step) * 0.1
        progress.update(step)
    assert progress.step_seconds() == pytest.approx(0.1)
    assert progress.remaining_seconds() == pytest.approx(46)
    assert progress.summary()["steps"] == 40
    assert "510/1000 (51 %)" in stream.getvalue()


def test_shown_rate_follows_a_change_of_speed_while_the_summary_is_of_the_whole_run() -> None:
    progress, clock, _ = make(1000)
    progress.update(0)
    for step in range(1, 201):
        clock.now += 1.0 if step <= 100 else 0.25
        progress.update(step)
    assert progress.step_seconds() == pytest.approx(0.25)
    assert progress.summary()["step_seconds"] == pytest.approx(0.625)


def test_plain_lines_show_everything_and_keep_their_distance() -> None:
    progress, clock, stream = make(100, log_every=5)
    for step in range(1, 101):
        clock.now += 1.0
        progress.update(step, {"loss": jnp.float32(10 / step)})
    progress.close()
    lines = stream.getvalue().splitlines()
    steps = [int(line.split("step ")[1].split("/")[0]) for line in lines]
    assert steps[0] == 1
    assert steps[1:] == [15, 25, 35, 45, 55, 65, 75, 85, 95, 100]
    assert lines[0] == "[vit] step 1/100 (1 %) | loss 10.0000 | compiled in 1.00 s | ETA - | elapsed 0:00:01"
    assert lines[-1] == (
        "[vit] step 100/100 (100 %) | loss 0.1000 | 1.00 s/step | 8.0 examples/s | 1.0k tokens/s | ETA 0:00:00"
        " | elapsed 0:01:40"
    )
    assert "\x1b" not in stream.getvalue()


def test_a_run_that_stops_early_shows_its_last_step_once() -> None:
    progress, clock, stream = make(100)
    for step in (1, 2, 3):
        clock.now += 1
        progress.update(step)
    progress.close()
    progress.close()
    assert [line.split(" (")[0] for line in stream.getvalue().splitlines()] == ["[vit] step 1/100", "[vit] step 3/100"]


def test_disabled_draws_nothing_and_fetches_nothing_but_measures() -> None:
    class Explosive:
        def __array__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("fetched")

    progress, clock, stream = make(3, enabled=False)
    for step in (1, 2, 3):
        clock.now += 2
        progress.update(step, {"loss": Explosive()})
    progress.close()
    assert stream.getvalue() == ""
    assert progress.summary()["step_seconds"] == 2


def test_device_values_are_fetched_only_for_lines_that_are_drawn() -> None:
    fetched = []

    class Loss:
        def __init__(self, step: int) -> None:
            self.step = step

        def __array__(self, *_: Any, **__: Any) -> Any:
            fetched.append(self.step)
            return np.asarray(1.0)

    progress, clock, _ = make(50)
    for step in range(1, 51):
        clock.now += 1
        progress.update(step, {"loss": Loss(step)})
    assert fetched[0] == 1
    assert fetched[-1] == 50
    assert len(fetched) <= 7


def test_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pseudo-terminal: the bar is redrawn in place and gives the cursor back."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    leader, follower = os.openpty()
    parts: list[bytes] = []

    def listen() -> None:
        with contextlib.suppress(OSError):  # raised when the other end is closed
            while part := os.read(leader, 4096):
                parts.append(part)

    listener = threading.Thread(target=listen)
    listener.start()
    clock = Clock()
    with (
        os.fdopen(follower, "w") as stream,
        Progress(20, examples_per_step=4, tokens_per_step=64, label="vit", stream=stream, clock=clock) as progress,
    ):
        for step in range(1, 21):
            clock.now += 0.5
            progress.update(step, {"loss": 1.5})
    listener.join()
    os.close(leader)
    text = b"".join(parts).decode()
    assert "20/20" in text
    assert "loss 1.5000" in text
    assert "ETA 0:00:00" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden once, shown again once
    assert "\x1b[2K" in text  # lines are redrawn, not added


def test_bad_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start must lie in \[0, total_steps = 5\]; got 6"):
        Progress(5, start=6)
    with pytest.raises(ValueError, match="log_every must be at least 1; got 0"):
        Progress(5, log_every=0)
    progress, _, _ = make(5)
    progress.update(3)
    with pytest.raises(ValueError, match="step 2 after step 3"):
        progress.update(2)
