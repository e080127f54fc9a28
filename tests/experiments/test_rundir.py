# SPDX-License-Identifier: Apache-2.0
"""A run directory holds one experiment, tells what it was, and is never emptied by mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import rundir
from experiments.rundir import ConfigKeyError, RunDir, WorkdirMismatch, apply_overrides, config_hash

REPOSITORY = Path(__file__).resolve().parents[2]


def make_config(**changes: object) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(
        {
            "seed": 7,
            "steps": 100,
            "log_every": 10,
            "model": {"depth": 2, "rates": (0.5, 0.25), "name": "vit", "scan": False},
            "optimizer": {"peak": 1e-3, "warmup": 10},
            "checkpoint": {"every": 50, "keep": 3},
            "eval": {"every": 20, "batches": 4},
            "cap": ml_collections.config_dict.placeholder(int),
        }
    )
    config.lock()
    return apply_overrides(config, changes)


def test_open_writes_the_resolved_config_and_how_it_was_started(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "a" / "run", make_config())
    assert not run.resumed
    assert json.loads((run.path / "config.json").read_text())["model"] == {
        "depth": 2,
        "name": "vit",
        "rates": [0.5, 0.25],
        "scan": False,
    }
    record = json.loads((run.path / "run.json").read_text())
    assert record["seed"] == 7
    assert record["config_hash"] == run.config_hash == config_hash(make_config())
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["jax"]
    assert "pytest" in record["command"] or sys.argv[0] in record["command"]
    assert len(record["starts"]) == 1
    assert run.checkpoints == run.path / "checkpoints"
    assert run.metrics_path.name == "metrics.jsonl"
    assert run.tensorboard.parent == run.path


def test_relative_workdir_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir.open("run", make_config())
    assert run.path.is_absolute()
    assert (tmp_path / "run" / "config.json").exists()


def test_second_start_resumes_and_is_recorded_with_what_changed(tmp_path: Path) -> None:
    RunDir.open(tmp_path, make_config())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    changed = make_config(log_every=1, **{"checkpoint.keep": 9, "eval.every": 5})
    run = RunDir.open(tmp_path, changed)
    assert run.resumed
    assert run.config_hash == config_hash(make_config())
    assert run.metrics_path.read_text() == '{"step": 1}\n'
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["changed"] == {"log_every": [10, 1], "checkpoint.keep": [3, 9], "eval.every": [20, 5]}
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 1


def test_another_experiment_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    RunDir.open(tmp_path, make_config())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_config(steps=200, **{"optimizer.peak": 3e-4, "model.rates": (0.5, 0.1)})
    with pytest.raises(WorkdirMismatch) as error:
        RunDir.open(tmp_path, other)
    text = str(error.value)
    assert "steps: 100 there, 200 now" in text
    assert "optimizer.peak: 0.001 there, 0.0003 now" in text
    assert "model.rates: [0.5, 0.25] there, [0.5, 0.1] now" in text
    assert "seed" not in text
    assert "--overwrite" in text
    assert "--workdir" in text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    RunDir.open(tmp_path, make_config())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "tb").mkdir()
    (tmp_path / "metrics.jsonl").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    run = RunDir.open(tmp_path, make_config(steps=5), overwrite=True)
    assert not run.resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "figures", "notes.txt", "run.json"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(WorkdirMismatch, match=r"not empty and not a run \(thesis\.tex\)"):
        RunDir.open(tmp_path, make_config(), overwrite=overwrite)
    with pytest.raises(WorkdirMismatch, match="is a file"):
        RunDir.open(tmp_path / "thesis.tex", make_config(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_before_its_config_was_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "config.json.tmp").write_text('{"see')
    assert not RunDir.open(tmp_path, make_config()).resumed
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_unreadable_config_is_refused_and_unreadable_record_is_kept_aside(tmp_path: Path) -> None:
    RunDir.open(tmp_path, make_config())
    (tmp_path / "run.json").write_text('{"starts": ')
    assert RunDir.open(tmp_path, make_config()).resumed
    assert (tmp_path / "run.json.damaged").read_text() == '{"starts": '
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirMismatch, match=r"cannot be read.*--overwrite"):
        RunDir.open(tmp_path, make_config())
    assert not RunDir.open(tmp_path, make_config(), overwrite=True).resumed


def test_a_value_without_json_form_is_named_before_anything_is_written(tmp_path: Path) -> None:
    config = ml_collections.ConfigDict({"model": {"act": len}})
    with pytest.raises(TypeError, match=r"config\.model\.act = .*builtin_function_or_method"):
        RunDir.open(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    text = json.dumps(rundir.plain({"a": np.float32(0.5), "b": float("inf"), "c": (Path("/x"), None)}), allow_nan=False)
    assert json.loads(text) == {"a": 0.5, "b": "inf", "c": ["/x", None]}


# --- identity


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "import sys, json; from experiments.rundir import config_hash; print(config_hash(json.loads(sys.stdin.read())))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    text = json.dumps(rundir.plain(make_config()))
    done = subprocess.run([sys.executable, "-c", code], input=text, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == config_hash(make_config()), done.stderr
    assert len(done.stdout.strip()) == 12
    assert int(done.stdout, 16) >= 0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(rundir.flatten(make_config()))), st.integers(1000, 2000))
def test_hash_and_refusal_agree_on_every_key(key: str, value: int) -> None:
    """A key is either ignored by both or decides both."""
    config = make_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    ignored = key in rundir.IGNORED
    assert (config_hash(config) == config_hash(make_config())) == ignored
    assert (rundir.differences(make_config(), config) == {}) == ignored


def test_added_and_removed_keys_differ() -> None:
    old, new = {"a": 1, "b": {"c": True}}, {"a": 1, "b": {"c": 1, "d": None}}
    assert rundir.differences(old, new) == {"b.c": (True, 1), "b.d": ("<absent>", None)}
    assert config_hash({"m": {}}) != config_hash({})


# --- overrides


def test_overrides_set_nested_keys() -> None:
    config = make_config()
    changes = {"optimizer.peak": 2, "model.rates": [1.0], "cap": 5, "model.scan": True, "steps": np.int64(3)}
    apply_overrides(config, changes)
    assert config.optimizer.peak == 2.0
    assert isinstance(config.optimizer.peak, float)
    assert config.model.rates == (1.0,)
    assert (config.cap, config.model.scan, config.steps) == (5, True, 3)
    assert apply_overrides(config, {"cap": None}).cap is None


def test_a_section_without_keys_takes_any_and_one_with_keys_those_alone() -> None:
    config = ml_collections.ConfigDict({"hyper": {}, "optimizer": {"peak": 1.0}})
    apply_overrides(config, {"hyper": {"alive": (3, 2)}})
    assert config.hyper.alive == (3, 2)
    apply_overrides(config, {"hyper": {"alive": (4, 1)}})
    assert config.hyper.alive == (4, 1)
    for value in ({"peek": 1.0}, {}):
        with pytest.raises(TypeError, match="of type ConfigDict"):
            apply_overrides(config, {"optimizer": value})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.peek", "did you mean 'optimizer.peak'"),
        ("optimiser.peak", "did you mean 'optimizer.peak'"),
        ("depth", "did you mean 'model.depth'"),
        ("stepz", "did you mean 'steps'"),
        ("zzzzqq", "known keys: .*optimizer.warmup"),
        ("seed.x", "config has no key 'seed.x'"),
    ],
)
def test_unknown_key_names_the_nearest_and_changes_nothing(key: str, hint: str) -> None:
    config = make_config()
    with pytest.raises(ConfigKeyError, match=hint):
        apply_overrides(config, {"steps": 1, key: 1})
    assert config.steps == 100


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 1.5, r"config.steps is of type int; 1.5 is of type float"),
        ("steps", True, r"config.steps is of type int; True is of type bool"),
        ("steps", "5", r"config.steps is of type int; '5' is of type str"),
        ("model.scan", 1, r"config.model.scan is of type bool; 1 is of type int"),
        ("model", 3, r"config.model is of type ConfigDict"),
        ("cap", "x", r"config.cap is of type int"),
    ],
)
def test_wrong_type_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        apply_overrides(make_config(), {key: value})


# --- where the code was


def test_git_revision_of_a_clean_a_changed_and_no_repository(tmp_path: Path) -> None:
    assert rundir.git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert rundir.git_revision(tmp_path) is None
    (tmp_path / "code.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x", "--no-verify"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert rundir.git_revision(tmp_path) == head
    (tmp_path / "untracked.txt").write_text("results")
    assert rundir.git_revision(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert rundir.git_revision(tmp_path) == f"{head}-dirty"
    assert rundir.git_revision(tmp_path / "nowhere") is None
