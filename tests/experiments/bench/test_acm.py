# SPDX-License-Identifier: Apache-2.0
"""The benchmark of learners at a shape small enough for a test."""

import json
import os

import pytest

from experiments.bench import __main__ as bench
from experiments.bench import acm


def test_it_prints_rows_whose_gates_give_the_asked_share(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setitem(acm.SHAPES, "tiny", (32, 1, 2, 64))
    assert bench.main(["acm", "--variant=tiny", "--batch=2", "--tokens=16", "--repeats=1", "--share=0.5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == ["mlp", "projections", "mlp+projections"]
    for row in rows:
        assert {"name", "shape", "device", "dtype", "implied", "realised", "realised_share", "milliseconds"} <= set(row)
        assert row["realised"] > 0 and row["threads"] == 3
        for used in row["learners_used"].values():
            assert used == pytest.approx(2.0, abs=0.15)
    gate, learner = 32 * 16 + 16 * 16 + 16 * 5, 2 * 32 * 16
    want = 2 * 32 * 64 / (gate + learner * rows[0]["learners_used"]["mlp"])
    assert rows[0]["implied"] == pytest.approx(want, rel=1e-3)
