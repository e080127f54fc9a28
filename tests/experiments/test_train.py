# SPDX-License-Identifier: Apache-2.0
"""The trainer's resume rules, one by one, with real processes and real signals; and how configs are named and checked.

"The same rows" means metrics.jsonl equal bit for bit (floats are written in full), speeds left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import config as config_lib
from experiments import train
from experiments.checkpoints import Checkpointer
from experiments.metrics import read_rows
from experiments.rundir import WorkdirMismatch
from tests.experiments import toy

REPO = Path(__file__).resolve().parents[2]
SPEEDS = ("train/step_seconds", "train/examples_per_second")


def rows(workdir):
    """The rows of a run without speeds."""
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in read_rows(workdir / "metrics.jsonl")]


def run_toy(workdir, *, data=None, task=None, overwrite=False, params=None, **overrides):
    """Trains the toy in this process, without progress."""
    config = toy.config(**overrides)
    data = toy.ToyData(config.batch_size) if data is None else data
    task = toy.ToyTask() if task is None else task
    return train.train(config, workdir, task=task, dataset=data, progress=False, overwrite=overwrite, params=params)


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Most tests here compile the same toy: a cache of this module's own keeps them quick."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run in this process."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    return workdir, run_toy(workdir)


# ---- Killed and resumed, in real processes ---------------------------------------------------------------------------


def start_toy(workdir, delay=0.0):
    environment = os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "tests/experiments/toy.py", str(workdir), "{}", str(delay)]
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def signal_at(process, workdir, step, number):
    """Sends the signal once the row of `step` is written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if (workdir / "metrics.jsonl").read_text().count('"train/loss"') >= step:
                process.send_signal(number)
                return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never written: {process.communicate()}")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Three runs of one command: undisturbed, with SIGKILL, with SIGTERM; the latter two then started again."""
    root = tmp_path_factory.mktemp("killed")
    # Not near the end: a slow machine may need some steps' time to deliver a signal.
    steps = {"SIGKILL": random.randint(2, 16), "SIGTERM": random.randint(2, 16)}
    whole = start_toy(root / "whole")
    first = {name: start_toy(root / name, delay=0.1) for name in steps}
    seen = {}
    for name, process in sorted(first.items(), key=lambda item: steps[item[0]]):
        signal_at(process, root / name, steps[name], getattr(signal, name))
    for name, process in first.items():
        seen[name] = {"at": steps[name], "output": process.communicate(timeout=120), "code": process.returncode}
        seen[name]["saved"] = saved_steps(root / name) if (root / name / "checkpoints").exists() else []
    second = {name: start_toy(root / name) for name in steps}
    for name, process in {"whole": whole, **second}.items():
        output = process.communicate(timeout=120)
        assert process.returncode == 0, output
        seen.setdefault(name, {})["rows"] = rows(root / name)
        seen[name]["again"] = output
    return seen


def test_sigkill_at_a_random_step_then_the_same_command_gives_the_same_rows(killed):
    assert killed["SIGKILL"]["code"] == -signal.SIGKILL
    assert killed["SIGKILL"]["rows"] == killed["whole"]["rows"], f"killed at step {killed['SIGKILL']['at']}"
    assert [r["step"] for r in killed["whole"]["rows"] if "train/loss" in r] == list(range(1, 25))
    assert [r["step"] for r in killed["whole"]["rows"] if "eval/accuracy" in r] == [8, 16, 24]


def test_sigterm_finishes_the_step_saves_and_exits_with_0_and_says_how_to_resume(killed):
    run = killed["SIGTERM"]
    assert run["code"] == 0, run["output"]
    step = max(run["saved"])
    assert run["at"] <= step < 24
    message = run["output"][1]
    assert f"Stopped by SIGTERM after step {step} of 24" in message
    assert "start the same command again" in message and "tests/experiments/toy.py" in message
    assert run["rows"] == killed["whole"]["rows"]
    assert "Complete at step 24" in run["again"][0]


# ---- Signals, in this process ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SignallingData(toy.ToyData):
    """Sends this process a signal while batch `at` (from 1) is made by the main thread."""

    at: int = 7
    number: int = signal.SIGINT

    def train_iterator(self):
        order = grain.MapDataset.range(self.examples).shuffle(seed=self.seed).repeat()
        batches = order.batch(self.batch_size).map_with_index(self._signal).map(self._batch)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def _signal(self, index, numbers):
        if index == self.at - 1:
            os.kill(os.getpid(), self.number)
        return numbers


def test_ctrl_c_saves_stops_the_caller_too_and_puts_the_old_handler_back(tmp_path, reference):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(train.Interrupted, match="SIGINT after step 7 of 24") as stopped:
        run_toy(tmp_path / "run", data=SignallingData())
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert saved_steps(tmp_path / "run") == [5, 7]
    run_toy(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(reference[0])


def test_a_signal_in_or_after_the_last_step_stops_the_caller_of_a_complete_run(tmp_path):
    with pytest.raises(train.Interrupted, match="SIGTERM after step 6 of 6"):
        run_toy(tmp_path / "run", data=SignallingData(at=6, number=signal.SIGTERM), steps=6)
    before = rows(tmp_path / "run")
    assert run_toy(tmp_path / "run", steps=6).step == 6
    assert rows(tmp_path / "run") == before
    with pytest.raises(train.Interrupted, match="after the last step") as late, train._StopSignal():
        signal.raise_signal(signal.SIGTERM)
    assert late.value.exit_code == 0


# ---- Not finite ------------------------------------------------------------------------------------------------------


def test_a_nan_stops_with_step_batch_and_last_good_state_and_a_repaired_run_goes_on(tmp_path, reference, capsys):
    workdir = tmp_path / "run"
    iterator = toy.ToyData().train_iterator()
    batches = [next(iterator) for _ in range(13)]
    numbers = {n: toy.ToyData()._example(n)["x"].tobytes() for n in range(256)}
    poison = next(n for n, x in numbers.items() if x == batches[12]["x"][4].tobytes())

    config, data = toy.config(), toy.ToyData(poison=poison)
    assert train.run(config, workdir, task=toy.ToyTask(), dataset=data, progress=False) == 1
    message = capsys.readouterr().err
    assert "step 13 is not finite" in message and "loss=nan" in message and "checkpoint at step 12" in message
    saved = np.load(workdir / "nonfinite_step13.npz")
    assert np.isnan(saved["x"]).sum() == 1 and np.isnan(saved["x"][4]).any()
    np.testing.assert_array_equal(saved["y"], batches[12]["y"])
    assert max(saved_steps(workdir)) == 12
    assert rows(workdir) == [r for r in rows(reference[0]) if r["step"] <= 12]

    # The checkpoint stands before the offending batch: the same data fail again, repaired data go on as if nothing was.
    with pytest.raises(train.NonFiniteError, match="step 13"):
        run_toy(workdir, data=data)
    run_toy(workdir)
    assert rows(workdir) == rows(reference[0])


def test_a_nan_in_the_first_step_saves_the_initial_state(tmp_path):
    order = toy.ToyData().train_iterator()
    first = next(order)["x"][0].tobytes()
    poison = next(n for n in range(256) if toy.ToyData()._example(n)["x"].tobytes() == first)
    with pytest.raises(train.NonFiniteError, match="step 1 is not finite"):
        run_toy(tmp_path / "run", data=toy.ToyData(poison=poison))
    assert saved_steps(tmp_path / "run") == [0]


# ---- Workdirs --------------------------------------------------------------------------------------------------------


def test_a_complete_run_is_not_touched_and_returns_its_metrics(reference):
    workdir, first = reference
    before = (rows(workdir), saved_steps(workdir))
    again = run_toy(workdir)
    assert (rows(workdir), saved_steps(workdir)) == before
    assert again.step == first.step == 24
    kept = {k: v for k, v in first.metrics.items() if "/" in k}
    assert {"train/loss", "eval/accuracy", "eval/cross_entropy"} <= set(kept)
    assert {k: again.metrics[k] for k in kept} == kept
    jax.tree.map(np.testing.assert_array_equal, again.state, first.state)


def test_the_summary_agrees_with_the_rows(reference):
    workdir, result = reference
    train_rows = [r for r in rows(workdir) if "train/loss" in r]
    assert result.metrics["train/loss"] == train_rows[-1]["train/loss"] < 0.7 * train_rows[0]["train/loss"]
    assert result.metrics["eval/accuracy"] > 0.8
    assert result.metrics["examples_per_second"] > 0 and result.metrics["tokens_per_second"] > 0
    assert list((workdir / "tb").iterdir())


def test_another_experiments_workdir_is_refused_untouched_unless_overwritten(tmp_path, capsys):
    workdir = tmp_path / "run"
    run_toy(workdir, steps=4)
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    config = toy.config(steps=4, seed=1)
    options = {"task": toy.ToyTask(), "dataset": toy.ToyData(), "progress": False}
    assert train.run(config, workdir, **options) == 2
    message = capsys.readouterr().err
    assert "seed" in message and "--overwrite" in message
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    assert train.run(config, workdir, overwrite=True, **options) == 0
    assert json.loads((workdir / "config.json").read_text())["seed"] == 1
    assert [r["step"] for r in rows(workdir)] == [1, 2, 3, 4, 4]


def test_a_damaged_newest_checkpoint_is_passed_over_and_its_steps_are_done_again(tmp_path, reference, caplog):
    workdir = tmp_path / "run"
    with pytest.raises(train.Interrupted):
        run_toy(workdir, data=SignallingData(at=13))
    assert saved_steps(workdir) == [10, 13]
    files = [p for p in (workdir / "checkpoints" / "13" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    run_toy(workdir)
    assert "13" in caplog.text and "damaged" in caplog.text
    assert rows(workdir) == rows(reference[0])


def test_given_parameters_start_a_new_run_but_never_an_old_one(tmp_path, reference):
    workdir, trained = reference
    params = trained.state.params
    start = run_toy(tmp_path / "tuned", params=params, steps=2)
    assert start.metrics["train/cross_entropy"] < rows(workdir)[0]["train/cross_entropy"] - 0.3
    jax.tree.map(lambda x: x.block_until_ready(), params)  # the caller's arrays were not donated
    again = run_toy(tmp_path / "tuned", params=jax.tree.map(jnp.zeros_like, params), steps=2)
    jax.tree.map(np.testing.assert_array_equal, again.state, start.state)


def test_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    # A rate that is far too high after a good start: the best evaluation is not the last one.
    workdir = tmp_path / "run"
    run_toy(workdir, checkpoint__best="cross_entropy", checkpoint__keep=1, eval__every=6, optimizer__peak=0.5, steps=18)
    losses = {r["step"]: r["eval/cross_entropy"] for r in rows(workdir) if "eval/cross_entropy" in r}
    best = min(losses, key=losses.get)
    assert saved_steps(workdir) == sorted({best, 18})
    kept = Checkpointer(workdir / "checkpoints", every=5, best_metric="cross_entropy")
    assert kept.best_step == best


def test_rows_come_at_log_every_and_at_the_end(tmp_path, reference):
    run_toy(tmp_path / "run", log_every=5, eval__every=0, steps=24)
    got = rows(tmp_path / "run")
    assert [r["step"] for r in got] == [5, 10, 15, 20, 24]
    losses = {r["step"]: r["train/loss"] for r in rows(reference[0]) if "train/loss" in r}
    assert [r["train/loss"] for r in got] == [losses[r["step"]] for r in got]


# ---- Mistakes are found before anything is written -------------------------------------------------------------------


class BrokenEval(toy.ToyTask):
    def eval_step(self, params, batch, *, extra):
        return {"m": (batch["x"] @ batch["w"][:3], 1.0)}


class BrokenLoss(toy.ToyTask):
    def loss(self, *args, **kwargs):
        raise ValueError("r=99 is more than the 16 tokens allow")


class EmptyEval(toy.ToyData):
    def eval_batches(self, max_batches=None):
        return iter(())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": BrokenLoss()}, "r=99 is more"),
        ({"task": BrokenEval()}, "shape"),
        ({"data": EmptyEval()}, "has no batch"),
        ({"checkpoint__best": "acuracy"}, "accuracy, cross_entropy"),
        ({"accumulate": 3}, "config.batch_size is 16"),
        ({"optimizer__warmup": 25}, r"optimizer.warmup is 25 with steps=24"),
        ({"parallel__preset": "tp"}, "known presets"),
    ],
)
def test_mistakes_leave_no_workdir_behind(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run_toy(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WorkdirMismatch, match=r"thesis\.txt"):
        run_toy(tmp_path, overwrite=True, steps=2)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- The compiled program --------------------------------------------------------------------------------------------


def test_the_state_is_donated():
    config = toy.config()
    program = train.build_program(config, toy.ToyTask(), toy.ToyData().spec)
    state = program.create(None)
    compiled = program.lower().compile()
    new, _, _ = compiled(state, program_batch(program), jax.device_put(True, program.healthy.sharding))
    donated = [x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state, state.ema))]
    assert all(donated)
    assert int(new.step) == 1


def program_batch(program):
    return jax.device_put(next(toy.ToyData().train_iterator()), program.batch["x"].sharding)


def test_evaluation_adds_sums_and_counts_under_padding(reference):
    config, data = toy.config(), toy.ToyData()
    program = train.build_program(config, toy.ToyTask(), data.spec)
    state = reference[1].state
    got = train.evaluate(program, state.ema, state.extra, data.eval_batches())
    real = [data._example(10_000 + n) for n in range(256 // 4 + 5)]
    x, y, w = (np.stack([r[k] for r in real]) for k in ("x", "y", "w"))
    logits = np.asarray(toy.Mlp().apply({"params": state.ema}, x), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    assert got["cross_entropy"] == pytest.approx((w * nll).sum() / w.sum(), rel=1e-5)
    assert got["accuracy"] == pytest.approx((w * (logits.argmax(-1) == y)).sum() / w.sum(), rel=1e-6)
    assert got == pytest.approx({k.removeprefix("eval/"): v for k, v in reference[1].metrics.items() if "eval/" in k})


# ---- Configs ---------------------------------------------------------------------------------------------------------


def test_parse_arg_reads_types_from_defaults():
    spec = {"variant": "S/16", "runlocal": False, "r": 8, "rate": 0.5}
    assert config_lib.parse_arg(None, **spec).to_dict() == spec
    got = config_lib.parse_arg("variant=B/16, runlocal,r=13,rate=1e-3", **spec)
    assert got.to_dict() == {"variant": "B/16", "runlocal": True, "r": 13, "rate": 1e-3}
    assert config_lib.parse_arg("runlocal=false", runlocal=True).runlocal is False


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("varient=B", "unknown config argument 'varient'.*variant='S'"),
        ("r=3.5", "r='3.5' must be of type int"),
        ("r", "r='true' must be of type int"),
        ("runlocal=maybe", "must be true or false"),
        ("r=1,r=2", "given twice"),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.parse_arg(arg, variant="S", r=1, runlocal=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.optimizer.update(peek=1.0), "config.optimizer.peek does not exist. Did you mean optimizer.peak"),
        (lambda c: c.update(stesp=1), "config.stesp does not exist. Did you mean steps"),
        (lambda c: c.optimizer.__delitem__("clip"), "config.optimizer.clip is missing"),
        (lambda c: c.update(steps=0), "config.steps is 0; it must be at least 1"),
        (lambda c: c.update(ema=1.0), r"config.ema is 1.0; it must lie in \[0, 1\)"),
        (lambda c: c.update(dtype="float16"), "float32, bfloat16"),
        (lambda c: c.update(accumulate=5), "must divide by"),
        (lambda c: c.checkpoint.update(best="loss") or c.eval.update(every=0), "needs evaluations"),
        (lambda c: c.checkpoint.update(best_mode="low"), "min or max"),
    ],
)
def test_validate_names_the_key_and_the_rule(change, message):
    config = config_lib.base_config()
    config_lib.validate(config)
    change(config)
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(config)


CONFIG_FILE = """
from experiments.config import base_config, parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, variant="S", runlocal=False)
    config = base_config()
    config.task = "toy"
    config.model.variant = arg.variant
    config.steps = 2 if arg.runlocal else 1000
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE)
    return path


def test_load_takes_argument_and_overrides_and_locks(config_file):
    config = config_lib.load(f"{config_file}:variant=B/16,runlocal", {"optimizer.peak": 1e-4, "model.variant": "L"})
    assert (config.steps, config.model.variant, config.optimizer.peak) == (2, "L", 1e-4)
    config_lib.validate(config)
    with pytest.raises(AttributeError, match="locked"):
        config.stepz = 1


def test_load_refuses_with_a_reason(config_file, tmp_path):
    with pytest.raises(config_lib.ConfigError, match=r"no config file 'nowhere\.py'"):
        config_lib.load("nowhere.py")
    with pytest.raises(config_lib.ConfigError, match=r"no key 'optimizer\.peek'.*optimizer\.peak"):
        config_lib.load(str(config_file), {"optimizer.peek": 1.0})
    with pytest.raises(config_lib.ConfigError, match=r"config\.steps is .*int"):
        config_lib.load(str(config_file), {"steps": "many"})
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(config_lib.ConfigError, match="no function get_config"):
        config_lib.load(str(tmp_path / "empty.py"))


def test_the_command_line_explains_itself(config_file, tmp_path):
    """`--help`, missing flags, and each kind of bad flag: one clear line, no traceback, and no workdir."""
    cases = {
        "help": (["--help"], 1, "--config=configs/PAPER/NAME.py --workdir=runs/NAME"),
        "missing": ([], 2, "--config and --workdir must be given"),
        "bad key": ([f"--config={config_file}", "--config.optimizer.peek=1"], 2, "'optimizer.peak'"),
        "no task": ([f"--config={config_file}:runlocal", f"--workdir={tmp_path / 'run'}"], 2, "toy"),
    }
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (arguments, _, _) in cases.items()
    }
    for name, (_, status, text) in cases.items():
        output = started[name].communicate(timeout=120)[0]
        assert text in output, (name, output)
        assert started[name].returncode == status, (name, output)
        assert "Traceback" not in output, (name, output)
    assert not (tmp_path / "run").exists()
