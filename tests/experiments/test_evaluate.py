# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a checkpoint from the command line, as trained and with training-free methods put on it."""

import json

import pytest

from configs.tome import digits
from experiments import evaluate, train
from experiments.rundir import apply_overrides


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "vit"
    config = apply_overrides(digits.get_config("runlocal"), {"data.valid_examples": 24})
    train.train(config, path, progress=False)
    return path


def run(workdir, *arguments):
    assert evaluate.main([f"--workdir={workdir}", *arguments]) == 0
    return json.loads((workdir / "evaluations.jsonl").read_text().splitlines()[-1])


def test_the_dense_run_is_its_own_baseline(workdir):
    row = run(workdir, "--no-speed")
    assert row["implied"] == 1.0 and row["tokens_left"] == 65 and row["step"] == 2
    assert 0 <= row["accuracy"] <= 1


def test_a_reduction_is_put_on_the_same_weights(workdir):
    dense = run(workdir, "--no-speed")
    row = run(workdir, "--set", "model.reduction.method=tome", "--set", "model.reduction.r=10", "--split=valid")
    assert row["tokens_left"] == 45 and row["implied"] > 1 and row["realised"] > 0
    assert row["config_hash"] == dense["config_hash"]
    nothing = run(workdir, "--no-speed", "--set", "model.reduction.method=tome")
    assert nothing["cross_entropy"] == dense["cross_entropy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.reduction.method=tomee", "--set", "model.reduction.r=1"], "did you mean 'tome'"),
        (["--set", "model.reduction.method=tome", "--set", "model.reduction.r=40"], "at most 32 can go"),
        (["--set", "model.widht=3"], "model.width"),
        (["--set", "model.width=16"], "params"),
        (["--step=999"], "999"),
    ],
)
def test_mistakes_get_one_clear_line(workdir, capsys, arguments, message):
    assert evaluate.main([f"--workdir={workdir}", "--no-speed", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert evaluate.main([f"--workdir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err
