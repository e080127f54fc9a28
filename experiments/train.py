# SPDX-License-Identifier: Apache-2.0
r"""The training loop of all studies, and the command that starts it.

    python -m experiments.train --config=configs/PAPER/NAME.py --workdir=runs/NAME
    python -m experiments.train --config=configs/PAPER/NAME.py:runlocal --workdir=/tmp/try --overwrite
    python -m experiments.train --config=configs/PAPER/NAME.py:variant=B/16 --workdir=runs/b16 \
        --config.optimizer.peak=3e-4 --config.parallel.preset=fsdp
    python -m experiments.train --workdir=runs/NAME

Starting the same command again resumes; without --config, a run that is there goes on with its own. The rules, in the order
in which they are applied:

1. A workdir that is new or empty starts at step 0, from `params` where the caller gives them, else from `seed`.
2. A workdir that holds another experiment is refused, untouched; `--overwrite` removes that run and starts anew.
3. A workdir that holds this experiment continues from its newest sound checkpoint, whatever `params` says; a damaged
   one is reported and passed over. Parameters, optimiser, moving average, `extra` and the position in the data all
   come from it. Randomness needs no state: step n uses `fold_in(rng, n)`.
4. Rows of metrics.jsonl that are newer than that checkpoint are dropped, then written again, so a run that was killed
   at any step has the same rows as one that was not.
5. SIGTERM and Ctrl-C let the current step finish and save; the second Ctrl-C stops at once and saves nothing.
6. A loss or gradient that is not finite stops the run. Its update is skipped on the device, so the checkpoint that is
   saved is the last good state, placed before the offending batch, which is saved beside it: a restart meets the same
   batch again.
7. A run that is complete does nothing and returns the metrics of its last evaluation.

Shapes: B batch. A batch is a dict of arrays with leading axis B. Steps count from 1: after step n, `state.step == n`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from flax.core import meta
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments import config as config_lib
from experiments import data, metrics, optim, parallel, tasks
from experiments.checkpoints import Checkpointer, CheckpointMismatch, NoSoundCheckpoint
from experiments.memory import keep_freed_pages
from experiments.optim import TrainState
from experiments.progress import Progress
from experiments.rundir import RunDir, WorkdirMismatch, plain


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A completed run.

    `metrics` holds the last step's "train/..." and the last evaluation's "eval/..." values, "seconds" over all starts
    and, of this start alone, "step_seconds", "examples_per_second" and others; see `Progress.summary`.
    """

    state: TrainState
    metrics: dict[str, Any]
    step: int
    workdir: epath.Path


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the last good state and the batch are saved."""


class Interrupted(Exception):
    """Training was stopped by a signal after it had saved; the same command resumes it."""

    def __init__(self, signum: int, when: str):
        super().__init__(
            f"Stopped by {signal.Signals(signum).name} {when}; all is saved. "
            f"To resume, start the same command again: {shlex.join(sys.orig_argv)}"
        )
        # Whoever sends SIGTERM asked for exactly this; after Ctrl-C a shell script should not go on.
        self.exit_code = 0 if signum == signal.SIGTERM else 130


# ---- The program: everything that is compiled ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run and the shapes they take. Building it allocates nothing on any device.

    create: `(params or None) -> TrainState`, made in its shards.
    train_step: `(state, batch, healthy) -> (state, healthy, outputs)`; the state is donated.
    eval_step: `(params, batch, extra) -> metrics`.
    state, batch, healthy: ShapeDtypeStructs with shardings; the batch is the global one.
    """

    mesh: jax.sharding.Mesh
    state: TrainState
    batch: Any
    healthy: jax.ShapeDtypeStruct
    create: Any
    train_step: Any
    eval_step: Any

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced: wrong shapes, budgets and names surface here."""
        with parallel.on_mesh(self.mesh):
            return self.train_step.lower(self.state, self.batch, self.healthy)


def build_program(config: ConfigDict, task: Any, spec: Any, *, mesh: jax.sharding.Mesh | None = None) -> Program:
    """The program of a config.

    Args:
      task: see `experiments.tasks`.
      spec: the shapes and dtypes of one batch, a tree of objects with `shape` and `dtype`.
      mesh: None makes one by `config.parallel.preset` over all devices.

    Raises:
      ValueError: the batch does not divide over devices and microbatches, or a parameter cannot be placed.
    """
    preset = config.parallel.preset
    mesh = parallel.make_mesh(preset) if mesh is None else mesh
    parallel.check_batch_size(mesh, config.batch_size, config.accumulate)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)), spec
    )
    init_key, state_key = jax.random.split(jax.random.key(config.seed, impl=optim.RNG))
    boxed = jax.eval_shape(lambda: _init_params(task, init_key, batch))
    tx = optim.build(config.optimizer, config.steps, mask=optim.decay_mask(boxed))

    def create(params: Any) -> TrainState:
        # Copies, because the state is donated: it must share no buffer with the caller's arrays or within itself.
        params = meta.unbox(_init_params(task, init_key, batch)) if params is None else jax.tree.map(jnp.copy, params)
        ema = jax.tree.map(jnp.copy, params) if config.ema else None
        extra = jax.tree.map(jnp.asarray, task.init_extra())
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, extra, jax.random.key_data(state_key))

    state = jax.eval_shape(create, None)
    param_shardings = parallel.param_shardings(mesh, preset, boxed)
    shardings = parallel.inherit_shardings(mesh, state, state.params, param_shardings)
    whole, split = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    learning_rate = optim.build_schedule(config.optimizer, config.steps)
    step = optim.make_train_step(task, tx, learning_rate, mesh, accumulate=config.accumulate, ema=config.ema)
    return Program(
        mesh=mesh,
        state=parallel.abstract(state, shardings),
        batch=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch),
        healthy=jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole),
        create=jax.jit(create, out_shardings=shardings),
        train_step=jax.jit(
            step, in_shardings=(shardings, split, whole), out_shardings=(shardings, whole, whole), donate_argnums=0
        ),
        eval_step=jax.jit(
            lambda params, batch, extra: task.eval_step(params, batch, extra=extra),
            in_shardings=(param_shardings, split, whole),
            out_shardings=whole,
        ),
    )


def _init_params(task: Any, key: jax.Array, batch: Any) -> Any:
    """Boxed parameters. Initialisation depends on the shapes of a batch only, so zeros serve."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    return task.init(key, zeros)["params"]


def evaluate(program: Program, params: Any, extra: Any, batches: Iterable[Any]) -> dict[str, float]:
    """The task's evaluation metrics over all batches, added up in float64 on the host.

    Raises:
      ValueError: there is no batch.
    """
    total: dict[str, Any] = {}
    waiting: Any = {}
    with parallel.on_mesh(program.mesh):
        for batch in batches:
            # The result of a batch is fetched while the next one runs: the device never waits, the queue never grows.
            running = program.eval_step(params, parallel.shard_batch(program.mesh, batch), extra)
            total = metrics.merge(total, jax.tree.map(np.float64, jax.device_get(waiting)))
            waiting = running
    if not waiting:
        raise ValueError("evaluation got no batch; check that the evaluation split has examples.")
    return metrics.compute(metrics.merge(total, jax.tree.map(np.float64, jax.device_get(waiting))))


# ---- The loop --------------------------------------------------------------------------------------------------------


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
    task: Any = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    params: Any = None,
) -> TrainResult:
    """Trains until `config.steps`, resuming by the rules at the head of this module.

    Args:
      config: see `experiments.config.base_config`.
      workdir: the run directory, local or remote (gs://).
      overwrite: removes the run that is there, and starts anew.
      progress: draws progress on standard error.
      task, dataset, eval_dataset: None builds them from the config.
      params: initial parameters in place of random ones, such as pretrained ones; used by a new run only.

    Raises:
      ConfigError, ValueError: the config, the data or the shapes are wrong; nothing has been written then.
      WorkdirMismatch: the workdir holds something else.
      Interrupted: SIGTERM or SIGINT arrived; everything is saved.
      NonFiniteError: a loss or gradient was not finite; see rule 6.
    """
    # ---- Build and trace: what is wrong with the input is found here, before the workdir is touched.
    config_lib.validate(config)
    task, dataset, eval_dataset = _inputs(config, task, dataset, eval_dataset)
    program = build_program(config, task, dataset.spec)
    lowered = program.lower()
    _check(config, program, eval_dataset, params)

    with contextlib.ExitStack() as stack:
        # ---- Run directory, and the state: from the newest sound checkpoint, or new.
        run = RunDir.open(workdir, config, overwrite=overwrite)
        stop = stack.enter_context(_StopSignal())
        iterator = dataset.train_iterator()
        checkpointer = stack.enter_context(_checkpointer(config, run))  # waits for the last save when it is left
        restored = checkpointer.restore(program.state, iterator)
        state = program.create(params) if restored is None else restored.state
        start, about = (0, {"seconds": 0.0}) if restored is None else (restored.step, dict(restored.meta))
        seconds = about["seconds"]

        # ---- Writers and progress; the first process alone writes.
        writer = stack.enter_context(contextlib.closing(_writers(run, start)))
        meter = stack.enter_context(_progress(config, task, start, progress))

        # ---- Steps.
        train_step = lowered.compile() if start < config.steps else None
        healthy = jax.device_put(True, program.healthy.sharding)
        records: collections.deque[_Record] = collections.deque()
        for step in range(start + 1, config.steps + 1):
            position = iterator.get_state()
            batch = next(iterator)
            state, healthy, outputs = train_step(state, parallel.shard_batch(program.mesh, batch), healthy)
            records.append(_Record(step, batch, position, healthy, outputs))
            last, stopping = step == config.steps, stop.requested(step)
            eval_due = config.eval.every and (last or step % config.eval.every == 0)
            save_due = last or stopping or step % config.checkpoint.every == 0 or (eval_due and config.checkpoint.best)

            # The host looks one step late, while the next step runs; before it saves or evaluates it catches up.
            while len(records) > (0 if eval_due or save_due else 1):
                record = records.popleft()
                if not record.healthy:
                    raise _stop_at_non_finite(record, state, iterator, checkpointer, about, run)
                meter.update(record.step, {"loss": record.outputs["loss"]})
                if record.step % config.log_every == 0 or record.step == config.steps:
                    writer.write(record.step, _scalars(record) | _rates(meter), prefix="train")

            # ---- Evaluation, before saving: a checkpoint at step n has all of step n behind it.
            if eval_due:
                with meter.pause():
                    batches = eval_dataset.eval_batches(config.eval.batches or None)
                    about["eval"] = evaluate(program, state.average, state.extra, batches)
                    writer.write(step, about["eval"], prefix="eval")

            # ---- Checkpoint.
            if save_due:
                with meter.pause():
                    about |= {"train": _scalars(record), "seconds": seconds + meter.summary()["seconds"]}
                    best = about["eval"] if eval_due else None
                    checkpointer.maybe_save(step, state, iterator, plain(about), metrics=best, force=True)
            if stopping:
                raise Interrupted(stop.signum, f"after step {step} of {config.steps}")

        return TrainResult(state, _summary(about, meter), config.steps, run.path)


@dataclasses.dataclass(frozen=True)
class _Record:
    """A step that was sent to the device and not yet looked at."""

    step: int
    batch: Any
    position: Any  # of the data, before this batch
    healthy: jax.Array
    outputs: dict[str, Any]


def _inputs(config: ConfigDict, task: Any, dataset: Any, eval_dataset: Any) -> tuple[Any, Any, Any]:
    """Builds what the caller did not give; a data set given alone serves for evaluation as well."""
    shared = {"batch_size": config.batch_size, "seed": config.seed}
    shared |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    try:
        task = tasks.build(config) if task is None else task
        if eval_dataset is None and dataset is not None:
            eval_dataset = dataset
        elif eval_dataset is None and config.eval.every:
            eval_dataset = data.build(config.data, split=config.eval.split, **shared)
        dataset = data.build(config.data, split="train", **shared) if dataset is None else dataset
    except (ValueError, KeyError) as error:
        raise config_lib.ConfigError(error.args[0]) from error
    return task, dataset, eval_dataset


def _check(config: ConfigDict, program: Program, eval_dataset: Any, params: Any) -> None:
    """Traces the evaluation of one real batch, so that its mistakes appear now and not after the first thousand steps.

    Raises:
      ValueError: the evaluation split is empty, or `checkpoint.best` is not one of its metrics.
      AssertionError: `params` do not fit the model.
    """
    if params is not None:
        chex.assert_trees_all_equal_shapes_and_dtypes(params, program.state.params)
    if not config.eval.every:
        return
    batch = next(iter(eval_dataset.eval_batches(1)), None)
    if batch is None:
        raise ValueError(f"the evaluation split {config.eval.split!r} has no batch.")
    with parallel.on_mesh(program.mesh):
        batch = parallel.shard_batch(program.mesh, batch)
        result = program.eval_step.eval_shape(program.state.params, batch, program.state.extra)
    best = config.checkpoint.best
    if best and best not in result:
        raise config_lib.ConfigError(
            f"config.checkpoint.best is {best!r}; evaluation gives {', '.join(sorted(result))}."
        )


def _checkpointer(config: ConfigDict, run: RunDir) -> Checkpointer:
    """The run's checkpoints."""
    settings = config.checkpoint
    return Checkpointer(
        run.checkpoints,
        every=settings.every,
        keep=settings.keep,
        best_metric=settings.best or None,
        best_mode=settings.best_mode,
        config_hash=run.config_hash,
    )


def _writers(run: RunDir, step: int) -> metrics.MultiWriter:
    """JSON lines and TensorBoard; rows after `step` are dropped."""
    if jax.process_index():
        return metrics.MultiWriter()
    return metrics.MultiWriter(
        [metrics.JsonlWriter(run.metrics_path, step), metrics.TensorBoardWriter(run.tensorboard, step)]
    )


def _progress(config: ConfigDict, task: Any, start: int, enabled: bool) -> Progress:
    """The progress of the whole run, over all processes."""
    return Progress(
        config.steps,
        start=start,
        examples_per_step=config.batch_size,
        tokens_per_step=config.batch_size * task.tokens_per_example,
        enabled=enabled and jax.process_index() == 0,
        log_every=config.log_every,
    )


def _scalars(record: _Record) -> dict[str, float]:
    """A step's training metrics as Python numbers (float32 values are exact in them)."""
    own = {name: float(record.outputs[name]) for name in optim.OWN_METRICS}
    return own | metrics.compute(record.outputs["metrics"])


def _rates(meter: Progress) -> dict[str, float]:
    """Speed up to now, for the log; empty before it is known."""
    seconds = meter.step_seconds()
    return {} if not seconds else {"step_seconds": seconds, "examples_per_second": meter.examples_per_step / seconds}


def _summary(about: dict[str, Any], meter: Progress) -> dict[str, Any]:
    """The metrics of a completed run; `about` is what its last checkpoint says about it."""
    # float(), since `plain` writes a metric that nothing was measured for as "nan".
    values = {f"{part}/{name}": float(v) for part in ("train", "eval") for name, v in about.get(part, {}).items()}
    return values | meter.summary() | {"seconds": about["seconds"]}


# ---- Stopping --------------------------------------------------------------------------------------------------------


class _StopSignal:
    """Notes SIGTERM and SIGINT while it is entered, in place of dying from them.

    With several processes the signal reaches them between different steps; then JAX's own preemption service notes it
    and makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        # Python lets only the main thread set handlers; elsewhere signals do what the program's owner chose.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if kind is None and self.signum is not None:  # it came after the last step; the caller has to stop all the same
            raise Interrupted(self.signum, "after the last step")

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signum = signal.SIGTERM
        return self.signum is not None

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        # Not print: a handler may run in the middle of a print.
        os.write(2, f"\n{signal.Signals(signum).name}: finishing this step, then saving\n".encode())


def _stop_at_non_finite(
    record: _Record, state: TrainState, iterator: Any, checkpointer: Checkpointer, about: dict, run: RunDir
) -> NonFiniteError:
    """Saves the batch of the failed step and the state before it; returns the error to raise.

    `state` may come from a later step: since the failed one, no step has changed it.
    """
    process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.path / f"nonfinite_step{record.step}{process}.npz"
    leaves = jax.tree_util.tree_flatten_with_path(record.batch)[0]
    buffer = io.BytesIO()
    np.savez(buffer, **{jax.tree_util.keystr(name, simple=True, separator="/"): leaf for name, leaf in leaves})
    path.write_bytes(buffer.getvalue())

    good = record.step - 1
    iterator.set_state(record.position)
    checkpointer.maybe_save(good, state, iterator, plain(about), force=True)
    values = _scalars(record)
    bad = ", ".join(f"{name}={value}" for name, value in values.items() if not np.isfinite(value))
    return NonFiniteError(
        f"step {record.step} is not finite ({bad}). Its update was not applied: the checkpoint at step {good} is the "
        f"last good state, and the batch is in {path}. Lower optimizer.peak, raise optimizer.warmup, lower "
        "optimizer.clip, or look at the batch."
    )


# ---- Command line ----------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: str | os.PathLike[str], **options: Any) -> int:
    """`train` for a command line: prints how it ended, and returns the exit code.

    0: complete, or stopped by SIGTERM. 1: not finite. 2: bad config or workdir. 130: stopped by Ctrl-C.
    """
    try:
        result = train(config, workdir, **options)
    except Interrupted as reason:
        print(reason, file=sys.stderr)
        return reason.exit_code
    except (NonFiniteError, config_lib.ConfigError, WorkdirMismatch, CheckpointMismatch, NoSoundCheckpoint) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1 if isinstance(reason, NonFiniteError) else 2
    shown = [f"  {k}: {v:.6g}" for k, v in result.metrics.items() if isinstance(v, float) and "/" in k]
    print("\n".join([f"Complete at step {result.step} in {result.workdir}", *shown]))
    return 0


def quiet_logs() -> None:
    """Warnings only, unless `--verbosity` was given: orbax tells the story of each save at INFO."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def _main(argv: list[str]) -> None:
    """Reads the flags and trains."""
    del argv
    values = flags.FLAGS
    config = values.config
    resumes = config is None and values.workdir is not None and not values.overwrite
    if resumes and (epath.Path(values.workdir) / "config.json").exists():
        config = config_lib.load_config(values.workdir)
    missing = [name for name, value in (("config", config), ("workdir", values.workdir)) if value is None]
    if missing:
        raise app.UsageError(f"--{' and --'.join(missing)} must be given; see the examples above.", exitcode=2)
    quiet_logs()
    if values.distributed:
        jax.distributed.initialize()
    sys.exit(run(config, values.workdir, overwrite=values.overwrite))


if __name__ == "__main__":
    keep_freed_pages()
    config_lib.define_flag()
    flags.DEFINE_string("workdir", None, "Directory of the run; local or gs://. A run that is there is resumed.")
    flags.DEFINE_bool("overwrite", False, "Remove the run that is in --workdir, and start anew.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host run before anything else.")
    app.run(_main, flags_parser=config_lib.parse_flags)
