# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of oracle and Duo-LLM print their rows, here at sizes for a test."""

import json

from experiments.bench import __main__ as bench

SIZES = ("--width=16", "--big=32", "--small=4", "--tokens=8")


def test_the_oracle_prints_its_ratio(capsys):
    assert bench.main(["oracle", "--layers=2", "--capacity=3", "--sample=5", *SIZES]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["sample"] == 5 and "9 patterns" in row["shape"]
    assert row["implied"] > 1 and row["realised"] > 0 and row["oracle_seconds"] >= 0


def test_duo_prints_a_row_for_each_mixture(capsys):
    assert bench.main(["duo", "--layers=1", "--batch=1", "--repeats=1", "--max-length=4", *SIZES]) == 0
    *rows, low, high = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["shares"]["big"] for row in rows] == [0.5, 0.3, 0.25, 0.5, 0.0]
    assert rows[0]["implied"] < rows[-1]["implied"] and all(row["realised"] > 0 for row in rows)
    # Decoding: attention and head are part of what is counted, so a share of the big modules is less than that of the whole.
    assert (low["share"], high["share"]) == (0.25, 0.5) and low["big"] <= high["big"] < 1
    assert 1 < high["implied"] <= low["implied"] < 3
