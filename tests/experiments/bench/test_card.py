# SPDX-License-Identifier: Apache-2.0
"""The attention kernels beside their bars: every figure in its row, and the peer on the same blocks."""

import json

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import card
from pallas_kernels.biased_flash_attention import specs as biased_specs
from pallas_kernels.sparse_decode_attention import specs as decode_specs

# What a peer prints that takes a minute, so that ours is faster beyond doubt.
PEER = {"library": "torch", "device": "cpu", "milliseconds": {"dense": 6e4, "sparse": 6e4, "mask": 1.0}}


def _peer(folder):
    """A program that stands for an interpreter with PyTorch: it keeps the blocks that it is given."""
    path = folder / "python"
    keep = f'for flag in "$@"; do case $flag in --blocks=*) cat "${{flag#--blocks=}}" >> {folder}/blocks;; esac; done'
    path.write_text(f"#!/bin/sh\n{keep}\necho '{json.dumps(PEER)}'\n")
    path.chmod(0o755)
    return path


def test_one_command_prints_every_figure_beside_its_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(biased_specs, "NAMED", {"small": biased_specs.Spec(2, 24, 2, 2, 8, dtype="float32", buckets=8)})
    monkeypatch.setattr(decode_specs, "NAMED", {"small": decode_specs.Spec(2, 4, 2, 8, 6, 8, 3, "float32")})
    monkeypatch.setattr(card, "_ERROR", {"bfloat16": 2e-2})
    monkeypatch.setattr(card, "_LONG", 128)
    sizes = ["--length=128", "--density=0.125", "--heads=2", "--width=8", "--block=16", "--dtype=float32"]
    out = tmp_path / "rows.jsonl"
    flags = [*sizes, "--repeats=2", "--peer", f"--peer-python={_peer(tmp_path)}", f"--out={out}"]
    assert bench.main(["card", *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    values, sparse, even, biased, decoding = rows
    assert set(values["errors"]) == {"out", "statistics", "query", "key", "value", "table"}
    assert values["bars"]["error"] == [max(values["errors"].values()), 2e-2, True]
    assert max(values["errors"].values()) > 1e-4
    assert sparse["density"] == 0.125 and sparse["sparse_cost_best"] >= sparse["sparse_cost"] > 0
    assert sparse["bars"] == {
        "overhead": [sparse["overhead"], 0.05, sparse["overhead"] <= 0.05],
        "peer_ratio": [sparse["peer_ratio"], 1.0, True],
    }
    assert even["bench"] == "break_even" and even["bars"] == {"break_even": [None, 0.06, False]}
    assert biased["bars"]["statistics_share"][1] == 0.6 and decoding["bars"]["bandwidth_share"][1] == 0.8
    # One of eight blocks in each list of both heads.
    blocks = np.frombuffer((tmp_path / "blocks").read_bytes(), np.uint8).reshape(2, 8, 8)
    assert np.all(blocks.sum(-1) == 1)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({1.0: 1.0, 0.5: 1.1}, 0.0),
        # 1.1 times the dense time with all blocks, 0.9 with 0.8 of them: even with 0.9.
        ({1.0: 1.1, 0.8: 1.125}, 0.1),
        ({1.0: 1.5, 0.5: 3.0}, None),
        ({0.5: 1.0}, None),
        ({}, None),
    ],
)
def test_break_even_lies_between_the_densities_that_were_measured(costs, expected):
    rows = [{"density": density, "sparse_cost": cost} for density, cost in costs.items()]
    found = card.break_even(rows)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_figures_meet_their_bars_from_the_right_side():
    assert card._bar("cost", 1.2, 1.15) == {"cost": [1.2, 1.15, False]}
    assert card._bar("share", 0.85, 0.8, least=True) == {"share": [0.85, 0.8, True]}
    assert card._bar("even", None, 0.06) == {"even": [None, 0.06, False]}
    row = {"density": 0.1016, "sparse_cost": 1.3, "sparse_cost_both": 1.6, "overhead": 0.01}
    bars = card._sparse_bars(row, 16384)
    assert bars == {
        "sparse_cost": [1.3, 1.35, True],
        "sparse_cost_both": [1.6, 1.5, False],
        "overhead": [0.01, 0.05, True],
    }
