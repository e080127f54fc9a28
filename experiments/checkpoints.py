# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are written in the background, checked when read, and never trusted blindly.

One folder a step holds `state` (arrays, through orbax), `data` (the position of the grain iterator) and `meta` (JSON).
Orbax renames a folder to its final name when all is written; flipped bits and cut or lost files come later. So `meta` has
a checksum of itself and of the data position, and for each leaf its shape, dtype and a fingerprint of its bits, compared
again after reading. What fails is reported and skipped for the checkpoint before it; a sound checkpoint of another model
is an error. Leaves are stored under the names of their tree paths ("params/encoder/kernel"), so any pytree can be saved,
None and empty containers cost nothing, and a part can be read alone. Typed PRNG keys are stored as their key data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

_OTHER = "use the config it was written with, or choose another --workdir"
_log = logging.getLogger(__name__)


class CheckpointMismatch(ValueError):
    """A sound checkpoint that belongs to another model, optimiser, config or number of processes."""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that cannot be read back as it was written; its message is the reason."""


class NoSoundCheckpoint(RuntimeError):
    """There are checkpoints, and every one of them is damaged."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A folder that was not restored from, and why."""

    path: epath.Path
    reason: str


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was read: `state` as arrays in the asked tree; `meta` and `metrics` as given at saving (NaN as None)."""

    step: int
    state: Any
    meta: dict[str, Any]
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Orbax preservation policy: one bool for each checkpoint; the newest `count` are kept, and the best one."""

    count: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self.best()
        return [i >= len(checkpoints) - self.count or info.step == best for i, info in enumerate(checkpoints)]


@dataclasses.dataclass(eq=False)
class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores a train state, the data position and JSON meta under `directory`.

    Raises:
      ValueError: for values out of range.
    """

    directory: epath.PathLike  # any path that `epath` knows; made at the first save
    _: dataclasses.KW_ONLY
    every: int | None  # `maybe_save` saves at multiples of it; None saves only when forced
    keep: int = 3  # newest checkpoints to keep, beside the best one
    best_metric: str | None = None  # name in `metrics` that decides which checkpoint is best; NaN is never best
    best_mode: str = "min"  # or "max"
    async_save: bool = True  # write in the background; the state may be donated as soon as `maybe_save` returns
    config_hash: str | None = None  # when given, stored, and compared on restoring

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, or None to save only when forced; got {self.every}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1; got {self.keep}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f'best_mode must be "min" or "max"; got {self.best_mode!r}')
        path = epath.Path(self.directory).expanduser()
        self.directory = path if path.is_absolute() else path.resolve()  # orbax takes absolute paths only
        self._manager: ocp.CheckpointManager | None = None
        self._scores: dict[int, float | None] = {}
        self._half_written: tuple[Skipped, ...] = ()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first; one that is being written counts, damaged ones too."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        entries = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The newest of `steps()`; None when there is no checkpoint."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best `best_metric`; None when no checkpoint has a finite one."""
        return next(iter(self._ranked()), None)

    def _ranked(self) -> list[int]:
        """Steps that have a score, best first; of equal ones the newest."""
        sign = 1 if self.best_mode == "min" else -1
        scores = {step: self._score(step) for step in reversed(self.steps())}
        return sorted((step for step in scores if scores[step] is not None), key=lambda step: sign * scores[step])

    def _score(self, step: int) -> float | None:
        if self.best_metric and step not in self._scores:
            self._scores[step] = None
            with contextlib.suppress(DamagedCheckpoint):  # reported when it is to be restored
                self._scores[step] = self._read_meta(step)["metrics"].get(self.best_metric)
        return self._scores.get(step)

    def maybe_save(
        self,
        step: int,
        state: Any,
        data_iterator: Any,
        meta: dict[str, Any],
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves when `step` is a multiple of `every`, or when forced; False when not due or already there.

        Args:
          step: optimiser steps done.
          state: pytree of jax arrays, typed PRNG keys, NumPy arrays and numbers.
          data_iterator: grain iterator whose position is stored, or None.
          meta: JSON data of the caller; metrics: evaluation scalars, None at a step without evaluation.

        Raises:
          ValueError: when `step` lies before the newest checkpoint, or `metrics` lacks `best_metric`.
          TypeError: when `meta` is not JSON, or a leaf's dtype is one that jax does not keep.
        """
        step = int(step)
        if not (force or (self.every and step % self.every == 0)) or step in self.steps():
            return False
        if step < (self.latest_step or 0):
            where = f"the newest checkpoint ({self.latest_step}) in {self.directory}"
            raise ValueError(f"step {step} lies before {where}: restore it first, or use another directory")
        scalars = self._finite(metrics)
        arrays, leaves = _storable(state)
        body = {"step": step, "config_hash": self.config_hash, "meta": meta}
        body |= {"metrics": scalars, "leaves": leaves, "data": _position_checksums(data_iterator)}
        items = {"state": ocp.args.StandardSave(_nest(arrays)), "meta": ocp.args.JsonSave(_seal(body))}
        if data_iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
        self._scores[step] = scalars.get(self.best_metric)
        return self._writer().save(step, args=ocp.args.Composite(**items), force=True)

    def _finite(self, metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
        """Metrics as JSON numbers, with None for NaN and infinities."""
        if metrics is None:
            return {}
        if self.best_metric and self.best_metric not in metrics:
            raise ValueError(f"metrics lack best_metric = {self.best_metric!r}; they hold {sorted(metrics)}")
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def _writer(self) -> ocp.CheckpointManager:
        """The orbax manager, made at the first save: it clears half-written folders, which only a writer may."""
        if self._manager is None:
            self._report_half_written()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(self.keep, lambda: self.best_step),
                enable_async_checkpointing=self.async_save,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def wait(self) -> None:
        """Blocks until what is being written is written; raises what went wrong with it."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads; a second call does nothing."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state: Any, data_iterator: Any = None) -> Restored | None:
        """Reads the newest sound checkpoint; None when there is none at all.

        Damaged and half-written folders are logged as warnings and listed in `Restored.skipped`. Damaged ones, newer
        than the restored one, are moved to `damaged-<step>-<n>` beside it, so that their steps can be saved again.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with `sharding` (or arrays), as the state shall be.
          data_iterator: grain iterator to set to the stored position, or None; set only when all else is sound.

        Raises:
          CheckpointMismatch: leaves, shapes, dtypes, config or process count differ; leaves are named.
          NoSoundCheckpoint: there are checkpoints, and all are damaged. Nothing is moved then.
        """
        self.wait()
        half_written = self._report_half_written()
        restored, damaged = self._first_sound(self.steps()[::-1], abstract_state, "", data_iterator)
        self._move_aside(damaged)
        return restored and dataclasses.replace(restored, skipped=(*half_written, *damaged.values()))

    def restore_params(
        self, abstract_params: Any, step: int | str | None = None, *, collection: str = "params"
    ) -> Restored:
        """Reads one field of the saved state for evaluation: `Restored.state` is that field. Changes nothing on disk.

        Args:
          abstract_params: tree of `jax.ShapeDtypeStruct` of the field.
          step: None for the newest sound one, "best" for the sound one with the best metric, or a step.
          collection: the field of the state: "params", or "ema" where the run keeps an average.

        Raises:
          FileNotFoundError: no checkpoint, or none of this step, or none with the metric.
          DamagedCheckpoint: the asked step is damaged. CheckpointMismatch, NoSoundCheckpoint: as in `restore`.
        """
        self.wait()
        steps = self.steps()
        if step in steps:
            return self._read(step, abstract_params, collection, None)
        candidates = {None: steps[::-1], "best": self._ranked()}.get(step, [])
        if not candidates:
            asked = {None: "at all", "best": f"with metric {self.best_metric!r}"}.get(step, f"of step {step!r}")
            raise FileNotFoundError(f"no checkpoint {asked} in {self.directory}; steps there: {steps}")
        restored, damaged = self._first_sound(candidates, abstract_params, collection, None)
        return dataclasses.replace(restored, skipped=tuple(damaged.values()))

    def _first_sound(
        self, steps: Iterable[int], abstract: Any, collection: str, data_iterator: Any
    ) -> tuple[Restored | None, dict[int, Skipped]]:
        """The first of `steps` that can be read, and those before it; None only without steps."""
        damaged: dict[int, Skipped] = {}
        for step in steps:
            try:
                return self._read(step, abstract, collection, data_iterator), damaged
            except DamagedCheckpoint as error:
                damaged[step] = Skipped(self.directory / str(step), str(error))
                _log.warning("skipping damaged checkpoint %s: %s", damaged[step].path, error)
        if not damaged:
            return None, damaged
        lines = [f"no checkpoint in {self.directory} is sound; nothing was changed:"]
        lines += [f"  {item.path}: {item.reason}" for item in damaged.values()]
        raise NoSoundCheckpoint("\n".join([*lines, "repair or remove them, or pass --overwrite to start anew"]))

    def _report_half_written(self) -> tuple[Skipped, ...]:
        """Logs, once each, the folders that orbax had not finished when their process ended."""
        paths = self.directory.glob("*.orbax-checkpoint-tmp*") if self._manager is None else ()
        for path in sorted(set(paths) - {item.path for item in self._half_written}):
            self._half_written += (Skipped(path, "half-written: its process ended before it was complete"),)
            _log.warning("skipping half-written checkpoint %s; the next save removes it", path)
        return self._half_written

    def _move_aside(self, damaged: Mapping[int, Skipped]) -> None:
        for step, item in damaged.items():
            self._scores.pop(step, None)
            if jax.process_index() == 0:
                places = (self.directory / f"damaged-{step}-{n}" for n in itertools.count())
                place = item.path.rename(next(path for path in places if not path.exists()))
                _log.warning("moved the damaged checkpoint of step %d to %s; remove it when not needed", step, place)
        multihost_utils.sync_global_devices("checkpoints: damaged ones moved")
        if self._manager is not None:
            self._manager.reload()

    def _read(self, step: int, abstract: Any, collection: str, data_iterator: Any) -> Restored:
        """Reads and checks one checkpoint; all processes agree on whether it is damaged."""
        folder, head = self.directory / str(step), f"{collection}/" if collection else ""
        named, treedef = _named(abstract)
        wanted = {head + name: leaf for name, leaf in named.items()}
        failure, found = None, None
        try:  # without collectives, which would hang when one process fails
            found = self._read_here(step, wanted, head, data_iterator is not None)
        except DamagedCheckpoint as error:
            failure = error
        failed = np.atleast_1d(multihost_utils.process_allgather(np.asarray(failure is not None)))
        if failed.any():
            raise failure or DamagedCheckpoint(f"damaged for process(es) {np.flatnonzero(failed).tolist()}")
        body, arrays = found
        prints = fingerprints(arrays)
        if bad := [name for name in wanted if prints[name] != body["leaves"][name]["fingerprint"]]:
            raise DamagedCheckpoint(f"bits differ from what was saved in {len(bad)} leaves: {', '.join(bad[:5])}")
        if data_iterator is not None:
            _set_position(folder, data_iterator)
        for name in filter(lambda name: _is_key(wanted[name]), wanted):
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=body["leaves"][name]["key_impl"])
        state = jax.tree.unflatten(treedef, [arrays[name] for name in wanted])
        return Restored(step, state, body["meta"], body["metrics"])

    def _read_here(
        self, step: int, wanted: Mapping[str, Any], head: str, with_position: bool
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Meta and arrays of one checkpoint, as far as this process can check them."""
        folder, body = self.directory / str(step), self._read_meta(step)
        if None not in (body["config_hash"], self.config_hash) and body["config_hash"] != self.config_hash:
            raise CheckpointMismatch(f"{folder}: config {body['config_hash']}, here {self.config_hash}; {_OTHER}")
        _check_leaves(folder, {name: leaf for name, leaf in body["leaves"].items() if name.startswith(head)}, wanted)
        if with_position:
            _check_position(folder, body["data"])
        return body, _read_leaves(folder, wanted)

    def _read_meta(self, step: int) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            sealed = ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "meta")
            body = {key: value for key, value in sealed.items() if key != "checksum"}
            if _seal(body)["checksum"] != sealed["checksum"] or body["step"] != step:
                raise ValueError("it does not agree with its checksum or with the folder's name")
            return body

        return _attempt(read, DamagedCheckpoint, "meta cannot be read")


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum over all words of word * (2 * index + 1), modulo 2**32.

    The odd factor shows any single changed word, and exchanged ones; every sharding gives the same value.
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype.name in ("bool", "int2", "uint2", "int4", "uint4"):
        x = x.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # not a reshape: that would gather a sharded array
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Fingerprint of each array's bits, computed where the array lies; one small transfer to the host."""
    return {name: int(x) for name, x in jax.device_get({n: _fingerprint(x) for n, x in arrays.items()}).items()}


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path name, in the order of the tree, and the tree's structure."""
    pairs, treedef = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) != len(pairs) or "" in named:
        raise ValueError("a checkpoint needs a container of leaves with different path names (0 and '0' are the same)")
    return named, treedef


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(state: Any) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """The arrays to write, and what meta says of each leaf: shape, dtype, fingerprint, and the kind of a PRNG key."""
    arrays, leaves = {}, {}
    for name, leaf in _named(state)[0].items():
        array = jnp.asarray(leaf)
        if isinstance(leaf, np.ndarray | np.generic) and array.dtype != leaf.dtype:
            raise TypeError(f"leaf {name!r} is {leaf.dtype}, which jax stores as {array.dtype}; convert it yourself")
        leaves[name] = {"shape": list(array.shape), "dtype": str(array.dtype)}
        if _is_key(array):
            leaves[name]["key_impl"] = str(jax.random.key_impl(array))
        arrays[name] = jax.random.key_data(array) if _is_key(array) else array
    for name, value in fingerprints(arrays).items():
        leaves[name]["fingerprint"] = value
    return arrays, leaves


def _check_leaves(folder: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes (orbax would cast silently); a difference means another config, not damage."""
    has = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in saved.items()}
    wants = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    bad = [
        f"{name} (saved {has.get(name, 'nothing')}, wanted {wants.get(name, 'nothing')})"
        for name in sorted(has | wants)
        if has.get(name) != wants.get(name)
    ]
    if bad:
        what = f"{folder} belongs to another model or optimiser; leaves that differ: {len(bad)}"
        raise CheckpointMismatch(f"{what}, the first: {', '.join(bad[:20])}; {_OTHER}")


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to read a leaf as; on one device where no sharding is asked for."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    stored = jax.eval_shape(jax.random.key_data, plain) if _is_key(leaf) else plain
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def _read_leaves(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads leaves into the wanted shardings, PRNG keys as their data."""
    targets = _nest({name: _target(leaf) for name, leaf in wanted.items()})

    def read() -> dict[str, jax.Array]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=True)
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return _named(handler.restore(folder / "state", args=args))[0]

    return _attempt(read, DamagedCheckpoint, "state cannot be read", stragglers=True)


def _position_checksums(data_iterator: Any) -> list[int] | None:
    """A checksum for each process of the file that grain's handler writes; None without an iterator."""
    if data_iterator is None:
        return None
    own = zlib.crc32(json.dumps(data_iterator.get_state(), indent=4).encode())
    return np.atleast_1d(multihost_utils.process_allgather(np.uint32(own))).tolist()


def _check_position(folder: epath.Path, checksums: list[int] | None) -> None:
    """Compares the stored data position with its checksum."""
    index, count = jax.process_index(), jax.process_count()
    if checksums is None or len(checksums) != count:
        held = "no data position" if checksums is None else f"data positions of {len(checksums)} process(es)"
        raise CheckpointMismatch(f"{folder} holds {held}; this run needs those of {count}")
    path = folder / "data" / f"process_{index}-of-{count}.json"
    text = _attempt(path.read_bytes, DamagedCheckpoint, "data position cannot be read")
    if zlib.crc32(text) != checksums[index]:
        raise DamagedCheckpoint("the data position does not agree with its checksum")


def _set_position(folder: epath.Path, data_iterator: Any) -> None:
    """Sets the iterator. Its stored bytes are sound, so what fails here is another pipeline."""
    restore, args = grain.checkpoint.CheckpointHandler().restore, grain.checkpoint.CheckpointRestore(data_iterator)
    what = f"{folder} belongs to another data pipeline; {_OTHER}"
    _attempt(lambda: restore(folder / "data", args=args), CheckpointMismatch, what)


def _seal(body: dict[str, Any]) -> dict[str, Any]:
    """JSON data with a checksum of itself."""
    return body | {"checksum": zlib.crc32(json.dumps(body, sort_keys=True).encode())}


def _reason(error: BaseException) -> str:
    """The kind and the first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0][:300]}"


def _attempt(read: Callable[[], Any], kind: type[Exception], what: str, stragglers: bool = False) -> Any:
    """What `read` returns; whatever a damaged file makes it raise becomes `kind`, with `what` before it.

    A failed orbax read leaves stragglers, coroutines and reads that print a traceback each when they end. They are given
    time to end here, silently: one reason is enough. (Hence no `raise ... from`, which would keep them alive.)
    """
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, level = lambda _: None, log.level
    log.setLevel(logging.CRITICAL)
    reason = ""
    try:
        return read()
    except Exception as error:
        reason = _reason(error)
    finally:
        if reason and stragglers:
            time.sleep(0.1)
            gc.collect()
        sys.unraisablehook = hook
        log.setLevel(level)
    raise kind(f"{what}: {reason}")
