# SPDX-License-Identifier: Apache-2.0
"""Pairs from prepared sets in the layout of TFDS: what is read, in which languages, and how it is cut."""

import numpy as np
import pytest

from experiments import data
from experiments.data import byte_vocab, pairs
from experiments.data.pairs import PairOptions, TydiQa, Xnli
from tests.experiments.tiny_data import NLI_LANGUAGES, QUESTIONS, write_pairs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def _rows(source, indices=None):
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)
    batch = source.batch(indices, np.zeros((len(indices), 3), int), augment=True)
    both = [[byte_vocab.decode(row) for row in batch[key]] for key in ("input_ids", "labels")]
    return batch, list(zip(*both, strict=True))


def test_xnli_pairs_every_record_with_every_language(data_dir):
    source = Xnli("tiny_xnli", data_dir=data_dir, split="validation", options=PairOptions(64, 2))
    batch, rows = _rows(source)
    assert len(source) == 24 and source.together == 4
    expected = set()
    for i in range(6):
        for language in NLI_LANGUAGES:
            premise = b"p 2 ur \xff\xfe" if (i, language) == (2, "ur") else f"p {i} {language} é 河".encode()
            text = b"Premise: " + premise + f" Hypothesis: h {i} {language}".encode()
            expected.add((text, str(i % 3).encode(), pairs.XNLI_LANGUAGES.index(language)))
    assert {(*row, number) for row, number in zip(rows, batch["language"].tolist(), strict=True)} == expected
    assert batch["labels"].shape == (24, 2) and (batch["labels"][:, 1] == byte_vocab.EOS).all()
    np.testing.assert_array_equal(batch["language"][:4], batch["language"][4:8])


def test_xnli_languages_can_be_chosen(data_dir):
    source = Xnli("tiny_xnli", data_dir=data_dir, split="test", languages=("zh", "en"), options=PairOptions(64, 2))
    batch, rows = _rows(source)
    assert len(rows) == 6 and all(
        (b" en " in text) == (n == 4) for (text, _), n in zip(rows, batch["language"], strict=True)
    )
    with pytest.raises(ValueError, match=r"data\.eval_languages names fr; the languages found are de, en, ur, zh"):
        Xnli("tiny_xnli", data_dir=data_dir, split="test", languages=("fr",), key="eval_languages")


def test_plain_strings_are_one_language(data_dir):
    source = Xnli("tiny_multi_nli", data_dir=data_dir, split="train", languages=("en",))
    batch, rows = _rows(source)
    assert sorted(rows) == sorted((f"Premise: P{i} Hypothesis: H{i}".encode(), b"%d" % (i % 3)) for i in range(10))
    assert set(batch["language"].tolist()) == {pairs.XNLI_LANGUAGES.index("en")}
    for wrong in ((), ("en", "de")):
        with pytest.raises(ValueError, match=r"one language, which data\.languages must name alone"):
            Xnli("tiny_multi_nli", data_dir=data_dir, split="train", languages=wrong)
    with pytest.raises(ValueError, match="label -1"):
        _rows(Xnli("tiny_multi_nli", data_dir=data_dir, split="unlabelled", languages=("en",)))


def test_tydi_qa_asks_for_the_first_answer(data_dir):
    source = TydiQa("tiny_tydi", data_dir=data_dir, split="train", options=PairOptions(128, 16))
    batch, rows = _rows(source)
    expected = []
    for name, (question, context, answers) in QUESTIONS.items():
        text = f"Question: {question} Context: {context}".encode()
        expected += 9 * [(text, answers[0].encode(), name)] + [(text, b"\xff1", name)]
    names = {code: name for name, code in pairs._TYDI_CODES.items()}
    found = [(*row, names[pairs.TYDI_LANGUAGES[n]]) for row, n in zip(rows, batch["language"], strict=True)]
    assert sorted(found) == sorted(expected)


def test_tydi_qa_languages_and_accepted_answers(data_dir):
    source = TydiQa("tiny_tydi", data_dir=data_dir, split="validation", languages=("ar", "ko"))
    batch, rows = _rows(source)
    assert len(source) == 4 and set(batch["language"].tolist()) == {0, pairs.TYDI_LANGUAGES.index("ko")}
    for index, (text, target) in enumerate(rows):
        accepted = source.answers(index)
        assert accepted[0] == target.decode(errors="replace")
        assert set(accepted) >= set(QUESTIONS["arabic" if "متى".encode() in text else "korean"][2])
    with pytest.raises(ValueError, match=r"data\.languages names fi; the languages found are ar, en, ko"):
        TydiQa("tiny_tydi", data_dir=data_dir, split="validation", languages=("fi",))


def test_long_strings_lose_their_end_or_are_refused(data_dir):
    arguments = dict(data_dir=data_dir, split="train", languages=("en",))
    whole = f"Question: {QUESTIONS['english'][0]} Context: {QUESTIONS['english'][1]}".encode()
    batch, rows = _rows(TydiQa("tiny_tydi", **arguments, options=PairOptions(20, 3)))
    assert all(text == whole[:19] and len(target) <= 2 for text, target in rows)
    assert (batch["input_ids"][:, -1] == byte_vocab.EOS).all()
    with pytest.raises(ValueError, match=f"{len(whole)} bytes and its eos do not fit into 20 ids"):
        _rows(TydiQa("tiny_tydi", **arguments, options=PairOptions(20, 16, "refuse")))
    exact = PairOptions(len(whole) + 1, 16, "refuse")
    assert _rows(TydiQa("tiny_tydi", **arguments, options=exact))[1][0][0] == whole


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="inputs_length=1 "):
        PairOptions(inputs_length=1)
    with pytest.raises(ValueError, match="targets_length=0"):
        PairOptions(targets_length=0)
    with pytest.raises(ValueError, match="truncation='start' must be one of end, refuse"):
        PairOptions(truncation="start")


def test_sets_of_another_layout_are_refused(data_dir):
    with pytest.raises(ValueError, match="'tiny_tydi' has no field 'premise'"):
        Xnli("tiny_tydi", data_dir=data_dir, split="train")
    with pytest.raises(ValueError, match="'tiny_xnli' has no field 'id'"):
        TydiQa("tiny_xnli", data_dir=data_dir, split="test")


def test_configs_read_training_and_evaluation_from_their_sets(data_dir):
    xnli = dict(source="pairs", name="tiny_xnli", train_name="tiny_multi_nli", data_dir=data_dir, threads=0)
    train = data.build(xnli, split="train", batch_size=4, seed=0)
    assert train.examples == 10 and train.spec["input_ids"].shape == (4, 1024) and train.spec["labels"].shape == (4, 2)
    assert data.build(xnli, split="valid", batch_size=4, seed=0).examples == 24
    assert data.build({**xnli, "eval_languages": ("zh",)}, split="test", batch_size=4, seed=0).examples == 3
    batch = next(data.build(xnli, split="valid", batch_size=8, seed=0).eval_batches())
    np.testing.assert_array_equal(np.bincount(batch["language"])[[2, 4, 12, 14]], 2)

    tydi = dict(source="pairs", pairs="tydi_qa", name="tiny_tydi", data_dir=data_dir, languages=("en",), threads=0)
    parts = {split: data.build(tydi, split=split, batch_size=2, seed=0) for split in data.SPLITS}
    assert [parts[split].examples for split in ("valid", "test")] == [6, 6]
    assert parts["train"].spec["input_ids"].shape == (2, 2048)


def test_groups_are_the_languages_of_evaluation():
    assert [group.name for group in data.groups(dict(source="pairs"))] == list(pairs.XNLI_LANGUAGES)
    chosen = data.groups(dict(source="pairs", pairs="tydi_qa", eval_languages=("sw", "ar")))
    assert chosen == (("ar", "language", 0), ("sw", "language", 7))
    with pytest.raises(ValueError, match=r"data\.eval_languages names xx"):
        data.groups(dict(source="pairs", eval_languages=("xx",)))
