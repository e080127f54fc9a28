# SPDX-License-Identifier: Apache-2.0
"""Batches: repeatable bit for bit, exact after a checkpoint, shared evenly by processes, complete in evaluation."""

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import data
from tests.experiments.tiny_data import write_languages, write_pairs

DIGITS = {"source": "digits", "image_size": 12, "scale": (0.7, 1.0), "examples": 23, "valid_examples": 23}
MOVING = {**DIGITS, "source": "moving_digits", "frames": 2}
SPANS = {"source": "text", "inputs_length": 64, "max_bytes": 20_000}
BYTES = {"source": "text", "objective": "next_byte", "context": 8, "targets_length": 8, "max_bytes": 1_000}
DIAGNOSTIC = {"source": "diagnostic", "diagnostic": "contextual_vowel_removal", "length": 16, "examples": 30}
SPELLING = {"source": "characters", "max_bytes": 20_000}
SEARCH = {**SPELLING, "characters": "word_search"}
CONFIGS = {
    "diagnostic": DIAGNOSTIC,
    "spelling": SPELLING,
    "search": SEARCH,
    "digits": DIGITS,
    "moving_digits": MOVING,
    "spans": SPANS,
    "bytes": BYTES,
}


def _build(config, *, split="train", batch_size=4, seed=0, **kwargs):
    return data.build({"threads": 0, **config}, split=split, batch_size=batch_size, seed=seed, **kwargs)


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


def _same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(params=[*sorted(CONFIGS), "image_folder", "tfds_images", "files", "languages", "pairs"])
def config(request, tmp_path):
    """One configuration of each source."""
    if request.param == "image_folder":
        return {"source": "image_folder", "path": str(request.getfixturevalue("image_folder")), "image_size": 8}
    if request.param == "tfds_images":
        return {"source": "tfds_images", "name": "cifar10", "data_dir": request.getfixturevalue("cifar_dir")}
    if request.param == "files":
        (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
        return {"source": "text", "text": "files", "path": str(tmp_path), "inputs_length": 64}
    (tmp_path / "data").mkdir()
    if request.param == "languages":
        return {"source": "text", "text": "languages", "path": write_languages(tmp_path / "data"), "inputs_length": 64}
    if request.param == "pairs":
        return {"source": "pairs", "pairs": "tydi_qa", "name": "tiny_tydi", "data_dir": write_pairs(tmp_path / "data")}
    return CONFIGS[request.param]


def test_batches_have_their_spec_and_repeat_bit_for_bit(config):
    dataset = _build(config)
    batches = _take(dataset.train_iterator(), 5)
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in dataset.spec.items()
        }
    _same(batches, _take(_build(config).train_iterator(), 5))
    first, other = batches[0], next(_build(config, seed=1).train_iterator())
    assert any((first[key] != other[key]).any() for key in first)


def test_checkpoint_continues_bit_for_bit(config, tmp_path):
    iterator = _build(config).train_iterator()
    _take(iterator, 7)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = _take(iterator, 5)
        manager.wait_until_finished()
        restored = _build(config).train_iterator()
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    _same(expected, _take(restored, 5))


def test_state_moves_back_and_forth():
    iterator = _build(SPANS).train_iterator()
    state = iterator.get_state()
    first = _take(iterator, 3)
    iterator.set_state(state)
    _same(first, _take(iterator, 3))


def test_threads_change_nothing():
    alone = _build(DIGITS).train_iterator()
    ahead = _build({**DIGITS, "threads": 3, "prefetch": 5}).train_iterator()
    _same(_take(alone, 12), _take(ahead, 12))
    # the state is what was taken, not what was made ahead
    assert alone.get_state() == ahead.get_state()
    ahead.close()


def test_worker_processes_change_nothing():
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain passes absl's flags on to its workers
        flags.FLAGS.mark_as_parsed()
    iterator = _build({**SPANS, "workers": 2}).train_iterator()
    _same(_take(_build(SPANS).train_iterator(), 5), _take(iterator, 5))
    state = iterator.get_state()
    expected = _take(iterator, 2)
    iterator.set_state(state)
    _same(expected, _take(iterator, 2))
    iterator.close()


def test_an_epoch_passes_over_every_example_once_in_a_new_order():
    seen = []

    class Recorder:
        """A source of 20 examples that notes what it is asked for."""

        def __len__(self):
            return 20

        def batch(self, indices, entropy, *, augment):
            assert augment
            seen.append((indices.copy(), entropy.copy()))
            return {"x": indices}

    _take(data.Dataset(source=Recorder(), batch_size=5, seed=0, threads=0).train_iterator(), 12)
    orders = np.concatenate([indices for indices, _ in seen]).reshape(3, 20)
    assert [sorted(order) for order in orders.tolist()] == [list(range(20))] * 3
    assert len({tuple(order) for order in orders.tolist()}) == 3
    entropies = {tuple(row) for _, entropy in seen for row in entropy.tolist()}
    assert len(entropies) == 60, "an example is augmented in another way each epoch"


def test_epochs_of_neighbouring_seeds_differ():
    """Grain's own seeding makes epoch 1 of seed 0 equal epoch 0 of seed 1; a sweep over seeds would share its order."""
    config = {**DIGITS, "examples": 20}
    second_epoch = np.concatenate([b["label"] for b in _take(_build(config, seed=0).train_iterator(), 10)[5:]])
    first_epoch = np.concatenate([b["label"] for b in _take(_build(config, seed=1).train_iterator(), 5)])
    assert (first_epoch != second_epoch).any()


@pytest.mark.parametrize("name", ["digits", "spans"])
def test_processes_share_each_batch(name):
    whole = _take(_build(CONFIGS[name], batch_size=6).train_iterator(), 9)
    parts = [
        _take(_build(CONFIGS[name], batch_size=6, process_index=i, process_count=3).train_iterator(), 9)
        for i in range(3)
    ]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            for i in range(3):
                np.testing.assert_array_equal(value[i::3], parts[i][step][key])


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_is_one_padded_pass(process_count):
    parts = [
        list(_build(DIGITS, split="valid", process_index=i, process_count=process_count).eval_batches())
        for i in range(process_count)
    ]
    assert [len(part) for part in parts] == [6] * process_count  # 23 examples in batches of 4
    rows = [b for part in parts for b in part]
    assert all(len(b["weight"]) == 4 // process_count for b in rows)
    assert sum(b["weight"].sum() for b in rows) == 23
    real = [image.tobytes() for b in rows for image, w in zip(b["image"], b["weight"], strict=True) if w]
    source = _build(DIGITS, split="valid").source
    assert sorted(real) == sorted(source[i]["image"].tobytes() for i in range(23))
    assert all(np.isfinite(b["image"]).all() for b in rows)


def test_evaluation_is_the_same_for_every_run_and_every_time():
    dataset = _build(SPANS, split="valid", seed=0)
    first = list(dataset.eval_batches())
    _same(first, list(dataset.eval_batches()))
    _same(first, list(_build(SPANS, split="valid", seed=5).eval_batches()))
    _same(first[:2], list(dataset.eval_batches(2)))
    other = list(_build({**SPANS, "seed": 1}, split="valid").eval_batches())
    assert any((a["labels"] != b["labels"]).any() for a, b in zip(first, other, strict=True))


def test_padded_text_rows_have_no_loss():
    examples = _build(SPANS, split="valid").examples
    first, last = _build(SPANS, split="valid", batch_size=examples - 1).eval_batches()
    assert first["weight"].all() and last["weight"].sum() == 1
    np.testing.assert_array_equal((last["labels"] != 0).any(axis=1), last["weight"] == 1)
    assert (last["input_ids"] != 0).all()


def test_splits_differ():
    for config in (DIGITS, SPANS, DIAGNOSTIC, SPELLING, SEARCH):
        batches = [next(_build(config, split=split).eval_batches()) for split in data.SPLITS]
        key = "image" if config is DIGITS else "input_ids"
        assert (batches[0][key] != batches[1][key]).any() and (batches[1][key] != batches[2][key]).any()


def test_image_folder_with_splits_of_their_own(image_folder, tmp_path):
    config = {"source": "image_folder", "path": str(image_folder), "valid_path": str(image_folder), "image_size": 8}
    assert _build({**config, "test_path": str(image_folder)}).examples == 24
    assert _build(config, split="valid").examples == 24
    assert _build({**config, "valid_fraction": 0.3}).examples < 24
    (tmp_path / "other" / "ant").mkdir(parents=True)
    (image_folder / "ant" / "0.png").rename(tmp_path / "other" / "ant" / "0.png")
    with pytest.raises(ValueError, match="classes under"):
        _build({**config, "valid_path": str(tmp_path / "other")}, split="valid")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "dev"}, "'dev'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "process_count": 2}, "multiple of the 2 processes"),
        ({"process_index": 1}, "process_index=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _build(DIGITS, **kwargs)


def test_bad_max_batches_is_refused():
    with pytest.raises(ValueError, match="max_batches=0"):
        _build(DIGITS, split="valid").eval_batches(0)


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match="did you mean 'clutter'"):
        _build({**DIGITS, "cluter": 3})
    with pytest.raises(ValueError, match=r"data\.threads"):
        _build({**DIGITS, "threads": "two"})
    with pytest.raises(ValueError, match="workers=-1"):
        _build({**DIGITS, "workers": -1})
