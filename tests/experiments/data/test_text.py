# SPDX-License-Identifier: Apache-2.0
"""Text sources: what is read, how it is divided, and that windows are true pieces of it."""

import gzip
import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import byte_vocab, text
from experiments.data.next_byte import NextByte
from experiments.data.span_corruption import SpanCorruption
from experiments.data.splits import SPLITS

HASHES = {"train": "ea62f2387cf6", "valid": "85eb0d7b4f1f", "test": "eddf96d98a77"}


@pytest.fixture
def books(tmp_path):
    """Three files, one packed, one hidden; no byte occurs in two of them."""
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "a.txt").write_bytes(b"a" * 1000)
    (tmp_path / "de_b.txt.gz").write_bytes(gzip.compress(b"b" * 1000))
    (tmp_path / ".notes").write_bytes(b"hidden")
    return tmp_path


def _read(path, **kwargs):
    return text.from_files(str(path), **{"split": "train", **kwargs}).tobytes()


def test_a_folder_is_all_its_files_unpacked(books):
    assert _read(books) == b"b" * 900 + b"\n" + b"a" * 900


def test_file_glob_prefix_and_several_paths(books):
    assert set(_read(books / "en" / "a.txt")) == set(b"a")
    assert set(_read(books / "*.gz")) == set(b"b")
    assert set(_read(books / "*" / "a*")) == set(b"a")
    assert set(_read(books, file_prefix="de")) == set(b"b")
    several = text.from_files([str(books / "en"), str(books / "de*")], split="train").tobytes()
    assert set(several) == set(b"ab\n")


def test_splits_of_a_file_are_disjoint_and_cover_it(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "x").write_bytes(content)
    parts = [_read(tmp_path / "x", split=split, valid_fraction=0.1) for split in SPLITS]
    assert b"".join(parts) == content
    assert [len(p) for p in parts] == [800, 100, 100]


def test_splits_with_paths_of_their_own(tmp_path):
    for name in SPLITS:
        (tmp_path / name).write_bytes(name.encode() * 20)
    own = {"valid_path": str(tmp_path / "valid"), "test_path": str(tmp_path / "test")}
    for name in SPLITS:
        assert _read(tmp_path / "train", split=name, **own) == name.encode() * 20


def test_bytes_that_are_no_text_are_data(tmp_path):
    content = bytes(range(256)) * 10
    (tmp_path / "binary").write_bytes(content)
    data = text.from_files(str(tmp_path / "binary"), split="train", valid_fraction=0.01)
    source = text.TextSource(data, NextByte(1, 256))
    batch = source.batch(np.array([0]), np.zeros((1, 3), np.int64), augment=False)
    assert byte_vocab.decode(batch["labels"][0]) == bytes(range(256))


def test_max_bytes_is_the_most_that_is_read(books, caplog):
    with caplog.at_level("INFO"):
        data = _read(books, max_bytes=1500, valid_fraction=0.01)
    # 1000 + newline + 499 bytes are read, and of each file its last hundredths are held out
    assert data.count(b"b") == 980 and data.count(b"a") == 491
    assert "1500" in caplog.text
    assert len(_read(books / "en" / "a.txt", max_bytes=100, valid_fraction=0.1)) == 80


@pytest.mark.parametrize("path", ["", [], ["", "x"]])
def test_no_path_is_refused(path):
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        text.from_files(path, split="train")


def test_empty_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="matches no file"):
        _read(tmp_path)
    with pytest.raises(ValueError, match="matches no file"):
        _read(tmp_path / "*.txt")
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no byte"):
        _read(tmp_path)
    with pytest.raises(ValueError, match="starts with 'fr'"):
        _read(tmp_path, file_prefix="fr")


def test_other_bad_input_is_refused(books):
    with pytest.raises(ValueError, match="'dev'"):
        _read(books, split="dev")
    with pytest.raises(ValueError, match="max_bytes"):
        _read(books, max_bytes=-1)
    with pytest.raises(ValueError, match="valid_fraction"):
        _read(books, valid_fraction=0.5)
    with pytest.raises(ValueError, match="not supported"):
        _read(books / "**" / "*.txt")


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(b"x" * 5000, mtime=0)[:20]], ids=["plain", "cut"])
def test_damaged_gz_is_named(tmp_path, content):
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gz cannot be unpacked"):
        _read(tmp_path)


# -- The embedded books ----------------------------------------------------------------------------------------------


def test_books_are_two_novels_and_their_ends_are_held_out():
    parts = {split: text.from_books(split=split).tobytes() for split in SPLITS}
    assert sum(map(len, parts.values())) > 1_750_000
    assert parts["train"].startswith(b"MOBY-DICK;\nor, THE WHALE.") and b"SHERLOCK HOLMES" in parts["train"]
    assert "On the second day, a sail drew near" in parts["test"].decode(errors="ignore")
    assert parts["test"].rstrip().endswith(b"she has met with considerable success.")
    assert 0.045 < len(parts["valid"]) / sum(map(len, parts.values())) < 0.055
    hashes = {split: hashlib.sha256(part).hexdigest()[:12] for split, part in parts.items()}
    assert hashes == HASHES, "figures of byte-level models rest on these very bytes"


# -- The standard library ---------------------------------------------------------------------------------------------


def test_stdlib_is_real_text_divided_by_file():
    parts = {split: text.from_stdlib(split=split) for split in SPLITS}
    everything = b"\n".join(part.tobytes() for part in parts.values())
    assert len(everything) > 5_000_000
    assert everything.count(b"class JSONDecoder(object):") == 1, "a file is in one split, once"
    assert 0.02 < parts["valid"].size / len(everything) < 0.15
    assert parts["valid"].tobytes() == text.from_stdlib(split="valid").tobytes()


def test_stdlib_leaves_tests_out_and_reads_documentation_first():
    names = [name for name, _ in text._stdlib_files()]
    assert {"os.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    start = text.from_stdlib(split="train", max_bytes=2000)
    assert start.size == 2000
    first = next(doc for name, doc in text._pydoc_topics() if text.split_of(name, 0.05) == "train")
    assert start.tobytes().startswith(first[:1000])


def test_stdlib_without_source_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(text, "_pydoc_topics", list)
    with pytest.raises(ValueError, match="holds no byte"):
        text.from_stdlib(split="train")


# -- TFDS -------------------------------------------------------------------------------------------------------------


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A small real TFDS set of text, one record of it no valid UTF-8."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": b"\xff\xfe" if i == 3 else f"document {i}", "number": i}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_text(tfds_dir):
    data = text.from_tfds("tiny_text", data_dir=tfds_dir, split="train").tobytes()
    expected = [b"\xff\xfe" if i == 3 else b"document %d" % i for i in range(10)]
    assert sorted(data.split(b"\n")) == sorted(expected)
    assert len(text.from_tfds("tiny_text", data_dir=tfds_dir, split="test", max_bytes=4)) == 4


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("tiny_text", {"field": "txt"}, "no field 'txt'.*'text'"),
        ("tiny_text", {"field": "number"}, "not text"),
        ("tiny_text", {"split": "valid"}, "'valid'"),
        ("tiny_text", {"split": ""}, "no TFDS split"),
        ("tiny_textt", {}, "no set 'tiny_textt'"),
        ("imdb_reviews", {}, "not prepared"),
        ("", {}, r"data\.name is empty"),
    ],
)
def test_tfds_bad_input(tfds_dir, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        text.from_tfds(name, data_dir=tfds_dir, **kwargs)


# -- Windows ----------------------------------------------------------------------------------------------------------


def _entropy(count, seed=0):
    return np.stack([np.full(count, seed), np.arange(count)], axis=1)


def test_windows_lie_side_by_side():
    data = np.random.default_rng(0).integers(0, 256, 103, dtype=np.uint8)
    source = text.TextSource(data, NextByte(5, 6))
    assert len(source) == 10
    batch = source.batch(np.arange(10), _entropy(10), augment=False)
    rows = np.concatenate([batch["input_ids"][:, :-1], batch["labels"]], axis=1)
    np.testing.assert_array_equal(rows.reshape(-1), data[:100].astype(np.int32) + 3)


def test_training_windows_are_shifted_pieces_of_the_text():
    data = np.arange(200, dtype=np.uint8)  # a window shows where it was cut
    source = text.TextSource(data, NextByte(1, 10))
    indices = np.tile(np.arange(20), 200)
    labels = source.batch(indices, _entropy(4000), augment=True)["labels"]
    starts = labels[:, 0] - 3
    assert (np.diff(labels, axis=1) == 1).all()
    assert (np.abs(starts - 10 * indices) < 10).all()
    assert set(starts.tolist()) == set(range(191)), "every start occurs, the first and last too"
    again = source.batch(indices, _entropy(4000), augment=True)["labels"]
    np.testing.assert_array_equal(labels, again)
    assert (labels != source.batch(indices, _entropy(4000, seed=1), augment=True)["labels"]).any()


def test_examples_depend_on_their_own_entropy_alone():
    data = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)
    source = text.TextSource(data, SpanCorruption(64))
    entropy = _entropy(5)
    together = source.batch(np.arange(5), entropy, augment=True)
    for row in range(5):
        alone = source.batch(np.array([row]), entropy[row : row + 1], augment=True)
        for key, value in alone.items():
            np.testing.assert_array_equal(value[0], together[key][row])


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="9 bytes but one example needs 10"):
        text.TextSource(np.zeros(9, np.uint8), NextByte(5, 6))
    assert len(text.TextSource(np.zeros(10, np.uint8), NextByte(5, 6))) == 1


def test_books_in_many_languages(shared_data):
    folder = str(shared_data / "text")
    data = text.from_files(folder, split="train", file_prefix="zh_", max_bytes=100_000)
    assert "的" in data.tobytes().decode(errors="replace")
    source = text.TextSource(data, SpanCorruption())
    assert source.batch(np.arange(2), _entropy(2), augment=True)["input_ids"].shape == (2, 1024)
