# SPDX-License-Identifier: Apache-2.0
"""Several languages: files are found by name, windows never cross languages, each has its equal share."""

import gzip

import numpy as np
import pytest

from experiments import data
from experiments.data import byte_vocab, languages
from experiments.data.grouping import choose_languages
from experiments.data.next_byte import NextByte
from experiments.data.splits import SPLITS
from tests.experiments.tiny_data import SENTENCES, write_languages


@pytest.fixture
def folder(tmp_path):
    return write_languages(tmp_path)


def _config(folder, **kwargs):
    base = dict(source="text", text="languages", path=folder, objective="next_byte", context=8, targets_length=8)
    return {**base, "threads": 0, **kwargs}


def _build(config, split="valid", batch_size=8, seed=0):
    return data.build(config, split=split, batch_size=batch_size, seed=seed)


def _read(folder, language, split, **kwargs):
    files = languages.find_languages(folder)[language]
    return languages.read_language(files, split=split, **kwargs).tobytes()


def test_languages_are_found_by_name(folder, tmp_path):
    (tmp_path / "notes_on_this.txt").write_text("no language")
    found = languages.find_languages(folder)
    assert {name: [file.name for file in files] for name, files in found.items()} == {
        "de": ["de_ud.train.txt.gz", "de_ud.valid.txt.gz"],
        "el": ["el_ud.train.txt.gz", "el_ud.valid.txt.gz"],
        "en": ["en_books.train.txt", "en_ud.train.txt.gz", "en_ud.valid.txt.gz"],
        "zh": ["zh_ud.train.txt.gz", "zh_ud.valid.txt.gz"],
    }
    assert len(languages.find_languages(folder, include="*_ud.*")["en"]) == 2
    assert list(languages.find_languages(f"{folder}/[dz]*")) == ["de", "zh"]
    (tmp_path / "zh-Latn_x.txt").write_text("han yu")
    assert list(languages.find_languages(folder, include="*_x.*")) == ["zh-Latn"]


def test_named_files_are_the_splits_and_validation_is_halved(folder):
    whole = (SENTENCES["de"] * 40).encode()
    assert _read(folder, "de", "train") == (SENTENCES["de"] * 160).encode()
    assert _read(folder, "de", "valid") + _read(folder, "de", "test") == whole
    assert abs(len(_read(folder, "de", "valid")) - len(whole) / 2) <= 1
    assert _read(folder, "en", "train").startswith(b"A book in English. ")
    assert _read(folder, "en", "train").count(b"river") == 160


def test_files_without_a_split_in_their_name_are_divided(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "fr_x.txt").write_bytes(content)
    parts = [_read(str(tmp_path), "fr", split, valid_fraction=0.1) for split in SPLITS]
    assert b"".join(parts) == content and [len(part) for part in parts] == [800, 100, 100]
    (tmp_path / "fr_y.test.txt").write_bytes(b"test")
    assert _read(str(tmp_path), "fr", "test") == b"test"
    (tmp_path / "fr_y.valid.txt.gz").write_bytes(gzip.compress(b"valid"))
    assert [_read(str(tmp_path), "fr", split) for split in SPLITS] == [content, b"valid", b"test"]
    assert _read(str(tmp_path), "fr", "train", max_bytes=7) == content[:7]


def _source(**kwargs):
    """Three languages, each of bytes of its own that say where a window was cut."""
    texts = {
        name: np.arange(size, dtype=np.uint8) + base
        for name, size, base in (("a", 40, 0), ("b", 80, 60), ("c", 70, 160))
    }
    return languages.LanguageSource(texts, NextByte(1, 10), names=("a", "b", "c", "d"), **kwargs)


def _entropy(count):
    return np.stack([np.zeros(count, int), np.arange(count)], axis=1)


def test_training_draws_languages_and_windows_uniformly():
    batch = _source().batch(np.zeros(6000, int), _entropy(6000), augment=True)
    starts = batch["labels"][:, 0] - byte_vocab.OFFSET
    assert (np.diff(batch["labels"], axis=1) == 1).all()
    np.testing.assert_allclose(np.bincount(batch["language"]) / 6000, 1 / 3, atol=0.03)
    for number, (base, size) in enumerate(((0, 40), (60, 80), (160, 70))):
        assert set(starts[batch["language"] == number].tolist()) == set(range(base, base + size - 9))


@pytest.mark.parametrize(("examples", "each"), [(0, 4), (7, 7), (1, 1)])
def test_evaluation_gives_each_language_as_many_windows(examples, each):
    source = _source(examples=examples)
    assert len(source) == 3 * each
    batch = source.batch(np.arange(3 * each), _entropy(3 * each), augment=False)
    np.testing.assert_array_equal(batch["language"], np.tile([0, 1, 2], each))
    starts = batch["labels"][:, 0].reshape(each, 3) - byte_vocab.OFFSET
    np.testing.assert_array_equal(starts[0], [0, 60, 160])
    if each > 1:
        np.testing.assert_array_equal(starts[-1], [30, 130, 220], "from the first window to the last")
        steps = np.diff(starts, axis=0)
        assert (steps.max(axis=0) - steps.min(axis=0) <= 1).all()


def test_every_evaluation_batch_is_balanced(folder):
    dataset = _build(_config(folder, eval_examples=11))
    batches = list(dataset.eval_batches())
    assert dataset.examples == 44
    for batch in batches[:-1]:
        np.testing.assert_array_equal(np.bincount(batch["language"], minlength=4), 2)
    real = np.concatenate([batch["language"][batch["weight"] > 0] for batch in batches])
    np.testing.assert_array_equal(np.bincount(real), 11)
    inputs = np.concatenate([batch["input_ids"] for batch in batches])
    assert not np.array_equal(inputs[:8], dataset.source.batch(np.arange(8), _entropy(8), augment=False)["input_ids"])


@pytest.mark.parametrize("split", SPLITS)
def test_windows_are_of_the_language_that_the_batch_names(folder, split):
    dataset = _build(_config(folder, include="*_ud.*"), split=split, batch_size=40)
    batch = next(iter(dataset.train_iterator() if split == "train" else dataset.eval_batches()))
    for ids, labels, number in zip(batch["input_ids"], batch["labels"], batch["language"], strict=True):
        window = byte_vocab.decode(np.concatenate([ids, labels]))
        assert window in (SENTENCES[dataset.source.names[number]] * 3).encode()


def test_span_corruption_has_languages_too(folder):
    config = dict(source="text", text="languages", path=folder, inputs_length=64, threads=0)
    batch = next(_build(config, split="train").train_iterator())
    assert batch["input_ids"].shape == (8, 64) and batch["language"].dtype == np.int32
    assert data.lengths(data.resolve(config)) == (64, batch["labels"].shape[1])


def test_training_and_evaluation_may_differ_in_language(folder):
    config = _config(folder, languages=("en", "zh"), eval_languages=("zh", "el"))
    chosen = choose_languages(data.resolve(config))
    assert chosen.names == ("el", "en", "zh") and chosen.train == ("en", "zh") and chosen.evaluation == ("el", "zh")
    trained = _build(config, split="train", batch_size=64)
    assert set(next(trained.train_iterator())["language"].tolist()) == {1, 2}
    evaluated = np.concatenate([b["language"] for b in _build(config).eval_batches()])
    assert set(evaluated.tolist()) == {0, 2}
    assert data.groups(config) == (("el", "language", 0), ("zh", "language", 2))


def test_evaluation_languages_are_those_of_training_by_default(folder):
    assert [group.name for group in data.groups(_config(folder, languages=("zh", "de")))] == ["de", "zh"]
    assert [group.name for group in data.groups(_config(folder))] == ["de", "el", "en", "zh"]


def test_undecodable_bytes_are_data(tmp_path):
    (tmp_path / "xx_a.txt").write_bytes(bytes(range(256)) * 20)
    batches = list(_build(_config(str(tmp_path)), split="valid").eval_batches())
    assert all((batch["input_ids"][:, :-1] >= byte_vocab.OFFSET).all() for batch in batches)
    assert max(batch["input_ids"].max() for batch in batches) > 0xC0 + byte_vocab.OFFSET


def test_mistakes_are_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"data\.languages names fr, sw; the languages found are de, el, en, zh"):
        data.groups(_config(folder, languages=("sw", "de", "fr")))
    with pytest.raises(ValueError, match=r"data\.eval_languages names fr"):
        _build(_config(folder, eval_languages=("fr",)))
    with pytest.raises(ValueError, match=r"named LANGUAGE_\*\.txt.* and matches '\*_wiki"):
        data.groups(_config(folder, include="*_wiki.*"))
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        data.groups(_config(""))
    with pytest.raises(ValueError, match="matches no file"):
        data.groups(_config(str(tmp_path_factory.mktemp("nothing"))))
    with pytest.raises(ValueError, match="'zh' has 480 bytes but one example needs 607"):
        _build(_config(folder, context=600))
    with pytest.raises(ValueError, match="eval_examples=-1"):
        _build(_config(folder, eval_examples=-1))
    with pytest.raises(ValueError, match="'dev'"):
        _read(folder, "de", "dev")
