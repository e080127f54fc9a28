# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit, or not at all: damage is real here (bytes flipped, files cut and removed)."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import flax
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import checkpoints
from experiments.checkpoints import (
    Checkpointer,
    CheckpointMismatch,
    DamagedCheckpoint,
    NoSoundCheckpoint,
    fingerprints,
)

REPOSITORY = Path(__file__).resolve().parents[2]

# A failed orbax read leaves coroutines that complain when they end; checkpoints.py gives them time to end unheard, which
# on a busy machine is at times too short.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Pair(NamedTuple):
    """A container that is neither dict nor list."""

    left: Any
    right: Any


@flax.struct.dataclass
class State:
    """Everything that a train state may hold."""

    step: jax.Array
    params: dict
    opt_state: Any
    ema: Any
    extra: dict
    rng: jax.Array


def make_state(step: int, *, ema: bool = False) -> State:
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((64, 33)).astype(np.float32)
    kernel[0, :4] = [np.nan, np.inf, -0.0, 1e-42]
    params = {
        "dense": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(kernel[1], jnp.bfloat16)},
        "layers": [jnp.asarray(step, jnp.int8), jnp.arange(5) % 2 == 0],
        "empty": {},
    }
    floats = {"kernel": params["dense"]["kernel"], "scale": jnp.float16(step)}
    return State(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=Pair(optax.adamw(1e-3).init(floats), None),
        ema=jax.tree.map(jnp.array, params) if ema else None,
        extra={},
        rng=jax.random.split(jax.random.key(step), 3),
    )


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree: Any) -> list:
    """Dtype, shape and bytes of each leaf, with its path."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        raw = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        found.append((jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, np.asarray(raw).tobytes()))
    return found


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset())


def save_steps(directory: Path, steps: tuple[int, ...], **options: Any) -> None:
    """Checkpoints of `make_state(step)`, each after `step` batches."""
    iterator = make_iterator()
    drawn = 0
    with Checkpointer(directory, every=1, **options) as checkpointer:
        for step in steps:
            while drawn < step:
                next(iterator)
                drawn += 1
            assert checkpointer.maybe_save(step, make_state(step), iterator, {"step": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound checkpoints, of steps 2 and 4; tests copy them before they do damage."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, (2, 4))
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def biggest(directory: Path) -> Path:
    return max(files_of(directory), key=lambda path: path.stat().st_size)


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(bytes(data))


def assert_is_step(restored: Any, step: int) -> None:
    assert restored.step == step
    assert restored.meta == {"step": step}
    assert bits(restored.state) == bits(make_state(step))


# --- what is saved comes back


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = make_state(5, ema=True)
    meta = {"config": [1, {"a": "b"}], "sizes": (2, 3), "worst": math.inf, "text": "\u00b5 \u2028"}
    with Checkpointer(tmp_path, every=5) as checkpointer:
        assert checkpointer.restore(abstract(state)) is None
        assert not checkpointer.maybe_save(4, state, None, {})
        assert checkpointer.maybe_save(5, state, None, meta, {"loss": jnp.float32(2.5)})
        assert not checkpointer.maybe_save(5, state, None, {}, force=True)
        assert checkpointer.latest_step == 5
        restored = checkpointer.restore(abstract(state))
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.meta == {"config": [1, {"a": "b"}], "sizes": [2, 3], "worst": math.inf, "text": "\u00b5 \u2028"}
    assert restored.metrics == {"loss": 2.5}
    assert restored.skipped == ()


def test_data_position_is_that_of_the_save_and_batches_continue(copied: Path) -> None:
    reference = make_iterator()
    batches = [next(reference) for _ in range(8)]
    iterator = make_iterator()
    with Checkpointer(copied, every=1) as checkpointer:
        assert_is_step(checkpointer.restore(abstract(make_state(0)), iterator), 4)
    for expected in batches[4:]:
        np.testing.assert_array_equal(next(iterator), expected)


def test_donating_the_state_and_drawing_batches_right_after_the_save_changes_nothing(tmp_path: Path) -> None:
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    values = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    expected = {"a": values, "b": values[0]}
    state = {name: jnp.array(value) for name, value in expected.items()}
    iterator = make_iterator()
    with Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.maybe_save(1, state, iterator, {})
        for _ in range(20):
            state = donate(state)
            next(iterator)
        fresh = make_iterator()
        restored = checkpointer.restore(abstract(state), fresh)
    for name, value in expected.items():
        np.testing.assert_array_equal(restored.state[name], value)
    assert fresh.get_state() == make_iterator().get_state()


def test_relative_directory_and_synchronous_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_steps(Path("run/checkpoints"), (1,), async_save=False)
    monkeypatch.chdir("/")
    with Checkpointer(tmp_path / "run/checkpoints", every=1) as checkpointer:
        assert_is_step(checkpointer.restore(abstract(make_state(0))), 1)


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 0.5, 3: float("nan"), 4: 2.0, 5: None, 6: 1.0}
    with Checkpointer(tmp_path, every=1, keep=2, best_metric="loss") as checkpointer:
        for step, loss in losses.items():
            metrics = None if loss is None else {"loss": loss, "other": 1}
            checkpointer.maybe_save(step, {"x": jnp.float32(step)}, None, {}, metrics)
        assert checkpointer.best_step == 2
        assert checkpointer.steps() == [2, 5, 6]
    with Checkpointer(tmp_path, every=1, keep=1, best_metric="loss", best_mode="max") as again:
        assert again.best_step == 6
        again.maybe_save(7, {"x": jnp.float32(7)}, None, {}, {"loss": 0.1})
        assert again.steps() == [6, 7]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["6", "7"]


def test_only_forced_saves_without_an_interval(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, every=None) as checkpointer:
        assert not checkpointer.maybe_save(100, {"x": jnp.zeros(())}, None, {})
        assert checkpointer.maybe_save(101, {"x": jnp.zeros(())}, None, {}, force=True)


# --- damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# What is done to the folder of a checkpoint, and what the report of it says.
DAMAGE = {
    "bytes flipped": (lambda d: flip(biggest(d / "state"), biggest(d / "state").stat().st_size // 2), "bits|DATA_LOSS"),
    "biggest file cut": (lambda d: cut(biggest(d / "state")), "state cannot be read"),
    "biggest file empty": (lambda d: os.truncate(biggest(d / "state"), 0), "state cannot be read"),
    "biggest file lost": (lambda d: biggest(d / "state").unlink(), "state cannot be read"),
    "state lost": (lambda d: shutil.rmtree(d / "state"), "state cannot be read"),
    "meta cut": (lambda d: cut(d / "meta" / "metadata"), "meta cannot be read: JSONDecodeError"),
    "meta lost": (lambda d: shutil.rmtree(d / "meta"), "meta cannot be read"),
    "meta is other JSON": (lambda d: (d / "meta" / "metadata").write_text("[]"), "meta cannot be read"),
    "meta changed": (lambda d: rewrite(d / "meta" / "metadata", "bfloat16", "float16"), "checksum"),
    "folder of another step": (lambda d: (shutil.rmtree(d), shutil.copytree(d.parent / "2", d)), "folder's name"),
    "position changed": (lambda d: rewrite(d / "data" / "process_0-of-1.json", "4", "5"), "position.*checksum"),
    "position lost": (lambda d: (d / "data" / "process_0-of-1.json").unlink(), "position cannot be read"),
    "everything lost": (lambda d: (shutil.rmtree(d), d.mkdir()), "meta cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_checkpoint_before_is_used(
    copied: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage][0](copied / "4")
    left = {str(path.relative_to(copied / "4")) for path in files_of(copied / "4")}
    iterator = make_iterator()
    with caplog.at_level(logging.WARNING), Checkpointer(copied, every=1) as checkpointer:
        restored = checkpointer.restore(abstract(make_state(0)), iterator)
        assert_is_step(restored, 2)
        assert iterator.get_state() == {"next_index": 2}
        (skipped,) = restored.skipped
        assert skipped.path == copied / "4"
        assert "\n" not in skipped.reason
        assert re.search(DAMAGE[damage][1], skipped.reason)
        assert f"{copied / '4'}: {skipped.reason}" in caplog.text

        aside = copied / "damaged-4-0"
        assert {str(path.relative_to(aside)) for path in files_of(aside)} == left
        for step in (3, 4):  # at and before the damaged step
            assert checkpointer.maybe_save(step, make_state(step), iterator, {"step": step})
        checkpointer.wait()
        assert_is_step(checkpointer.restore(abstract(make_state(0)), iterator), 4)
    assert aside.exists()


def test_a_step_damaged_again_is_put_beside_the_first_one(copied: Path) -> None:
    for expected in ("damaged-4-0", "damaged-4-1"):
        (copied / "4" / "meta" / "metadata").unlink()
        with Checkpointer(copied, every=1) as checkpointer:
            assert_is_step(checkpointer.restore(abstract(make_state(0))), 2)
            assert (copied / expected).is_dir()
            checkpointer.maybe_save(4, make_state(4), None, {"step": 4})


def test_no_flipped_byte_in_any_file_gives_a_wrong_state(copied: Path) -> None:
    """Every file, with its middle and its last byte flipped, is sound or refused, never wrong."""
    checkpointer = Checkpointer(copied, every=1)
    target = abstract(make_state(0))
    refused = 0
    for path in files_of(copied / "4"):
        size = path.stat().st_size
        for position in {size // 2, size - 1}:
            flip(path, position)
            try:
                assert_is_step(checkpointer._read(4, target, "", make_iterator()), 4)
            except DamagedCheckpoint:
                refused += 1
            flip(path, position)
    assert refused > 10
    assert_is_step(checkpointer.restore(target), 4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 255), st.integers(1, 40))
def test_random_damage_never_gives_a_wrong_state(saved: Path, random: Any, mask: int, length: int) -> None:
    path = random.choice(files_of(saved / "4"))
    original = path.read_bytes()
    start = random.randrange(len(original))
    damaged = bytearray(original)
    for position in range(start, min(start + length, len(original))):
        damaged[position] ^= mask
    path.write_bytes(bytes(damaged) if random.random() < 0.7 else original[:start])
    try:
        assert_is_step(Checkpointer(saved, every=1)._read(4, abstract(make_state(0)), "", make_iterator()), 4)
    except DamagedCheckpoint:
        pass
    finally:
        path.write_bytes(original)


def test_unreadable_orbax_notes_do_not_stop_a_save(copied: Path) -> None:
    (copied / "4" / "_CHECKPOINT_METADATA").write_text("{")
    with Checkpointer(copied, every=1) as checkpointer:
        assert_is_step(checkpointer.restore(abstract(make_state(0))), 4)
        assert checkpointer.maybe_save(5, make_state(5), None, {"step": 5})
        checkpointer.wait()
        assert_is_step(checkpointer.restore(abstract(make_state(0))), 5)


def test_half_written_folder_is_reported_and_later_removed(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = copied / "6.orbax-checkpoint-tmp"
    shutil.copytree(copied / "4" / "state", partial / "state.orbax-checkpoint-tmp")
    with caplog.at_level(logging.WARNING), Checkpointer(copied, every=1) as checkpointer:
        assert checkpointer.latest_step == 4
        restored = checkpointer.restore(abstract(make_state(0)))
        assert_is_step(restored, 4)
        assert [item.path for item in restored.skipped] == [partial]
        assert caplog.text.count(str(partial)) == 1
        assert partial.exists()
        checkpointer.maybe_save(6, make_state(6), None, {"step": 6})
        checkpointer.wait()
        assert not partial.exists()
        assert_is_step(checkpointer.restore(abstract(make_state(0))), 6)


def test_only_a_half_written_folder_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
    assert Checkpointer(tmp_path, every=1).restore(abstract(make_state(0))) is None


def test_when_all_are_damaged_nothing_is_moved_and_the_error_says_why(copied: Path) -> None:
    for step in ("2", "4"):
        biggest(copied / step / "state").unlink()
    before = files_of(copied)
    iterator = make_iterator()
    checkpointer = Checkpointer(copied, every=1)
    with pytest.raises(NoSoundCheckpoint, match=r"(?s)checkpoints/4: .*checkpoints/2: .*--overwrite"):
        checkpointer.restore(abstract(make_state(0)), iterator)
    assert files_of(copied) == before
    assert iterator.get_state() == make_iterator().get_state()


# --- another experiment is not damage


def test_another_tree_shape_or_dtype_is_an_error_that_names_the_leaf(copied: Path) -> None:
    state = make_state(0)
    others = {
        r"params/extra \(saved nothing, wanted float32\[2\]\)": state.replace(
            params=state.params | {"extra": jnp.zeros(2)}
        ),
        r"params/dense/kernel \(saved float32\[64, 33\], wanted float32\[64, 34\]\)": state.replace(
            params=state.params | {"dense": {**state.params["dense"], "kernel": jnp.zeros((64, 34))}}
        ),
        r"params/dense/bias \(saved bfloat16\[33\], wanted float32\[33\]\)": state.replace(
            params=state.params | {"dense": {**state.params["dense"], "bias": jnp.zeros(33)}}
        ),
        r"rng \(saved key<fry>\[3\], wanted nothing\)": state.replace(rng=None),
        r"rng \(saved key<fry>\[3\], wanted key<rbg>\[3\]\)": state.replace(
            rng=jax.random.split(jax.random.key(0, impl="rbg"), 3)
        ),
    }
    before = files_of(copied)
    for message, other in others.items():
        with pytest.raises(CheckpointMismatch, match=message):
            Checkpointer(copied, every=1).restore(abstract(other))
    assert files_of(copied) == before


def test_another_config_hash_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, (1,), config_hash="aaaa")
    with pytest.raises(CheckpointMismatch, match=r"aaaa.*bbbb"):
        Checkpointer(tmp_path, every=1, config_hash="bbbb").restore(abstract(make_state(0)))
    assert_is_step(Checkpointer(tmp_path, every=1, config_hash="aaaa").restore(abstract(make_state(0))), 1)


def test_missing_or_foreign_data_position_is_refused(tmp_path: Path, copied: Path) -> None:
    with Checkpointer(tmp_path / "bare", every=1) as checkpointer:
        checkpointer.maybe_save(1, make_state(1), None, {})
        with pytest.raises(CheckpointMismatch, match="no data position"):
            checkpointer.restore(abstract(make_state(0)), make_iterator())
    meta = copied / "4" / "meta" / "metadata"
    body = json.loads(meta.read_text())
    del body["checksum"]
    meta.write_text(json.dumps(checkpoints._seal(body | {"data": [1, 2]})))
    with pytest.raises(CheckpointMismatch, match=r"2 process\(es\); this run needs those of 1"):
        Checkpointer(copied, every=1).restore(abstract(make_state(0)), make_iterator())


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every must be at least 1.*got 0"):
        Checkpointer(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        Checkpointer(tmp_path, every=1, keep=0)
    with pytest.raises(ValueError, match=r"best_mode.*'best'"):
        Checkpointer(tmp_path, every=1, best_mode="best")
    with Checkpointer(tmp_path, every=1, best_metric="loss") as checkpointer:
        with pytest.raises(ValueError, match=r"lack best_metric = 'loss'; they hold \['acc'\]"):
            checkpointer.maybe_save(1, make_state(1), None, {}, {"acc": 1.0})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.maybe_save(1, make_state(1), None, {"bad": object()})
        with pytest.raises(TypeError, match=r"leaf 'x' is int64.*int32"):
            checkpointer.maybe_save(1, {"x": np.zeros(3, np.int64)}, None, {})
        with pytest.raises(ValueError, match="path names"):
            checkpointer.maybe_save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, None, {})
        checkpointer.maybe_save(3, make_state(3), None, {})
        with pytest.raises(ValueError, match=r"step 2 lies before the newest checkpoint \(3\)"):
            checkpointer.maybe_save(2, make_state(2), None, {})


# --- reading for evaluation


def test_params_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path, every=1, best_metric="loss") as checkpointer:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            checkpointer.maybe_save(step, make_state(step, ema=True), None, {"step": step}, {"loss": loss})
    target = abstract(make_state(0).params)
    reader = Checkpointer(tmp_path, every=None, best_metric="loss")
    for step, expected in ((None, 3), ("best", 2), (1, 1)):
        restored = reader.restore_params(target, step)
        assert restored.step == expected
        assert bits(restored.state) == bits(make_state(expected).params)
    assert bits(reader.restore_params(target, 1, collection="ema").state) == bits(make_state(1).params)

    shutil.rmtree(tmp_path / "2" / "state")
    before = files_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        restored = reader.restore_params(target, "best")
    assert (restored.step, [item.path for item in restored.skipped]) == (3, [tmp_path / "2"])
    assert str(tmp_path / "2") in caplog.text
    with pytest.raises(DamagedCheckpoint):
        reader.restore_params(target, 2)
    assert files_of(tmp_path) == before


def test_params_of_a_checkpoint_that_is_not_there(copied: Path, tmp_path: Path) -> None:
    target = abstract(make_state(0).params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at all in .*nothing"):
        Checkpointer(tmp_path / "nothing", every=1).restore_params(target)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(FileNotFoundError, match=r"of step 3 .*\[2, 4\]"):
        Checkpointer(copied, every=1).restore_params(target, 3)
    with pytest.raises(FileNotFoundError, match="with metric 'loss'"):
        Checkpointer(copied, every=1, best_metric="loss").restore_params(target, "best")
    with pytest.raises(CheckpointMismatch, match=r"ema/dense/kernel \(saved nothing"):
        Checkpointer(copied, every=1).restore_params(target, collection="ema")


# --- fingerprints


def numpy_fingerprint(array: np.ndarray) -> int:
    """The same sum, with Python integers over the flat words."""
    words = np.ascontiguousarray(array).view({1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32))
    return sum(int(word) * (2 * i + 1) for i, word in enumerate(words.reshape(-1))) % 2**32


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(), (0,), (5,), (2, 3, 4)]),
    st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool", "float16", "complex64"]),
    st.integers(0, 2**32 - 1),
)
def test_fingerprint_is_the_position_weighted_sum_of_words(shape: tuple, dtype: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, 8), dtype=np.uint8)
    array = raw[..., 0] > 127 if dtype == "bool" else raw.view(jnp.dtype(dtype))[..., 0]
    assert fingerprints({"x": jnp.asarray(array)})["x"] == numpy_fingerprint(array)


def test_fingerprint_sees_one_bit_and_exchanged_values() -> None:
    x = jnp.arange(1, 65, dtype=jnp.float32).reshape(8, 8)
    flipped = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32).at[3, 5].add(np.uint32(2**31)), jnp.float32
    )
    prints = fingerprints({"x": x, "flipped": flipped, "rows": x[::-1], "columns": x[:, ::-1], "turned": x.T})
    assert len(set(prints.values())) == 5


SHARDED = """
    import os, signal, sys
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from experiments.checkpoints import Checkpointer, fingerprints

    directory = sys.argv[1]
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = {"rows": P("fsdp"), "both": P("data", "fsdp"), "columns": P(None, ("data", "fsdp")), "none": P()}
    state = {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in specs.items()}
    prints = fingerprints(state | {"single": jnp.asarray(values)})
    assert len(set(prints.values())) == 1, prints
    state |= {"step": jnp.int32(1), "rng": jax.device_put(jax.random.key(1), NamedSharding(mesh, P()))}

    checkpointer = Checkpointer(directory, every=1)
    with jax.set_mesh(mesh):
        assert checkpointer.maybe_save(1, state, None, {})
        checkpointer.wait()
        for turn in (1, -1):  # the same layout, then another one
            layout = dict(zip(specs, list(specs.values())[::turn]))
            target = {n: jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=NamedSharding(mesh, layout[n])) for n in specs}
            target |= {n: jax.ShapeDtypeStruct((), state[n].dtype, sharding=NamedSharding(mesh, P())) for n in ("step", "rng")}
            restored = checkpointer.restore(target).state
            for name in specs:
                np.testing.assert_array_equal(restored[name], values)
                assert restored[name].sharding == target[name].sharding
    for name in specs:
        state[name] = state[name] + 1
    state["big"] = jnp.ones((4096, 4096))  # 64 MiB: still being written when the process dies
    checkpointer.maybe_save(2, state, None, {})
    print("saving", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sharded_arrays_and_a_kill_during_the_write(tmp_path: Path) -> None:
    """8 devices; any layout gives one fingerprint; a checkpoint of 8 devices is read on one, after a real SIGKILL."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "saving\n", done.stderr
    assert done.returncode == -signal.SIGKILL

    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    target = {name: jax.ShapeDtypeStruct((16, 24), jnp.float32) for name in ("rows", "both", "columns", "none")}
    target |= {"step": jax.ShapeDtypeStruct((), jnp.int32), "rng": abstract(jax.random.key(0))}
    checkpointer = Checkpointer(tmp_path / "run", every=1)
    if checkpointer.latest_step == 2:  # the write was faster than the kill
        restored = checkpointer.restore(target | {"big": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)})
    else:
        restored = checkpointer.restore(target)
        assert [item.path.name for item in restored.skipped] == ["2.orbax-checkpoint-tmp"]
    for name in ("rows", "both", "columns", "none"):
        np.testing.assert_array_equal(restored.state[name], values + (restored.step - 1))
    checkpointer.maybe_save(3, {"x": jnp.zeros(1)}, None, {})
    checkpointer.close()
    assert not list((tmp_path / "run").glob("*tmp*"))


PROCESSES = """
    import sys
    import grain, jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from experiments.checkpoints import Checkpointer

    index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    state = {"x": jax.make_array_from_callback(values.shape, sharding, lambda where: values[where])}
    iterator = iter(grain.MapDataset.range(100)[index::2].repeat().to_iter_dataset())
    checkpointer = Checkpointer(directory, every=1)
    for step in (1, 2):
        next(iterator)
        checkpointer.maybe_save(step, state, iterator, {})
    checkpointer.wait()
    if index == 0:  # only the other process can see this damage
        (checkpointer.directory / "2" / "data" / "process_1-of-2.json").write_text("{}")
    multihost_utils.sync_global_devices("damaged")
    target = {"x": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
    restored = checkpointer.restore(target, iterator)
    for shard in restored.state["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
    (skipped,) = restored.skipped
    print(restored.step, iterator.get_state(), skipped.reason, flush=True)
    checkpointer.maybe_save(2, state, iterator, {})
    checkpointer.close()
"""


def test_processes_agree_on_damage_that_one_of_them_sees(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESSES), str(index), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    results = [[line for line in out.splitlines() if line.startswith("1 ")] for out, _ in outputs]
    reasons = ("damaged for process(es) [1]", "the data position does not agree with its checksum")
    assert results == [[f"1 {{'next_index': 1}} {reason}"] for reason in reasons], outputs[0][1] + outputs[1][1]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "damaged-2-0"]
