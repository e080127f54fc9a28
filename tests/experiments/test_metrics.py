# SPDX-License-Identifier: Apache-2.0
"""Means come from sums and counts; what is written is always valid JSON and never twice there."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import metrics
from experiments.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, read_rows


def rows_of(path: Path) -> list[dict]:
    """Rows by a strict parser that knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- sums and counts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_merged_metric_is_the_mean_over_all_examples(batches: list[list[float]]) -> None:
    total: dict = {}
    for batch in batches:
        total = metrics.merge(total, {"loss": (np.float64(sum(batch)), len(batch)), "n": (1.0, 1.0)})
    everything = [value for batch in batches for value in batch]
    assert metrics.compute(total) == {"loss": pytest.approx(np.mean(everything), abs=1e-9), "n": 1.0}


def test_merge_is_traceable_and_compute_fetches_device_values() -> None:
    a = {"loss": (jnp.float32(3), jnp.float32(2)), "acc": (jnp.bfloat16(1), jnp.int32(4))}
    merged = jax.jit(metrics.merge)(a, a)
    assert metrics.compute(merged) == {"loss": 1.5, "acc": 0.25}
    assert metrics.merge(a, {}) == a


def test_nothing_counted_is_nan() -> None:
    assert math.isnan(metrics.compute({"x": (0.0, 0.0)})["x"])


def test_different_names_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only in the first \['a'\], only in the second \['b'\]"):
        metrics.merge({"a": (1.0, 1.0), "c": (1.0, 1.0)}, {"b": (1.0, 1.0), "c": (1.0, 1.0)})
    with pytest.raises(ValueError, match="'a' must be"):
        metrics.compute({"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match="'a' must be"):
        metrics.compute({"a": (jnp.zeros(2), 1.0)})


# --- JSON lines


def test_rows_are_on_disk_after_each_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": jnp.float32(0.5), "tokens": np.int64(3), "half": jnp.bfloat16(0.25), "ok": True})
    assert rows_of(path) == [{"step": 1, "loss": 0.5, "tokens": 3, "half": 0.25, "ok": True}]
    writer.write(1, {"loss": jnp.ones((1,))}, prefix="eval")
    assert rows_of(path)[1] == {"step": 1, "eval/loss": 1.0}
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(2, {})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.floats(width=32), max_size=5), st.integers(0, 10**9))
def test_any_float_gives_strict_json_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, scalars: dict, step: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    scalars = {f"x{name}": value for name, value in scalars.items()}
    writer = JsonlWriter(path)
    writer.write(step, scalars)
    writer.close()
    (row,) = rows_of(path)
    assert sorted(row.get("nan", [])) == sorted(name for name, value in scalars.items() if math.isnan(value))
    np.testing.assert_equal(read_rows(path), [{"step": step, **scalars}])


def test_nan_is_null_and_named(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(3, {"loss": float("nan"), "norm": float("inf"), "low": -np.inf, "good": 1})
    assert rows_of(tmp_path / "m.jsonl") == [
        {
            "step": 3,
            "loss": None,
            "norm": None,
            "low": None,
            "good": 1,
            "nan": ["loss"],
            "inf": ["norm"],
            "-inf": ["low"],
        }
    ]
    writer.close()


def test_resume_drops_rows_after_the_step_and_the_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 7):
        writer.write(step, {"loss": step / 2})
    writer.write(4, {"loss": 9}, prefix="eval")
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # killed here
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 6, 4]

    with caplog.at_level(logging.WARNING):
        writer = JsonlWriter(path, resume_step=4)
    assert "line 8" in caplog.text
    writer.write(5, {"loss": 0.0})
    assert [(row["step"], *sorted(row)) for row in rows_of(path)] == [
        *[(step, "loss", "step") for step in (1, 2, 3, 4)],
        (4, "eval/loss", "step"),
        (5, "loss", "step"),
    ]
    writer.truncate(2)
    writer.write(3, {})
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]
    writer.close()


def test_a_torn_line_never_merges_with_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    writer = JsonlWriter(path)
    writer.write(2, {"loss": 1})
    writer.close()
    assert rows_of(path) == [{"step": 1}, {"step": 2, "loss": 1}]


def test_a_complete_last_row_without_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = JsonlWriter(path)
    writer.write(3, {})
    writer.close()
    assert rows_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_what_is_not_one_number_is_named(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for bad in (np.zeros(2), "text", None, 1j):
        with pytest.raises(TypeError, match="'eval/x' must be one real number"):
            writer.write(1, {"x": bad}, prefix="eval")
    with pytest.raises(ValueError, match=r"\['step'\] are names of the row"):
        writer.write(1, {"step": 5})
    writer.close()
    assert rows_of(tmp_path / "m.jsonl") == []
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nbad\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 is not a metrics row: 'bad'"):
        read_rows(tmp_path / "m.jsonl")


# --- other writers


def tensorboard_scalars(directory: Path) -> list[tuple[str, int, float]]:
    """Scalars of the event files, read as TFRecords of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            position += 16 + length
    return found


def test_tensorboard_and_several_writers(tmp_path: Path) -> None:
    writer = MultiWriter([JsonlWriter(tmp_path / "m.jsonl"), TensorBoardWriter(tmp_path / "tb", resume_step=0)])
    writer.write(1, {"loss": jnp.float32(0.5)})
    writer.write(2, {"loss": jnp.float32(0.25)}, prefix="eval")
    writer.close()
    assert tensorboard_scalars(tmp_path / "tb") == [("loss", 1, 0.5), ("eval/loss", 2, 0.25)]
    assert rows_of(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "eval/loss": 0.25}]


def test_all_writers_are_closed_though_one_fails(tmp_path: Path) -> None:
    class Failing:
        def write(self, step: int, scalars: dict, *, prefix: str = "") -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    jsonl = JsonlWriter(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match="disk full"):
        MultiWriter([Failing(), jsonl]).close()
    with pytest.raises(ValueError, match="closed"):
        jsonl.write(1, {})
    MultiWriter().write(1, {"x": object()})
