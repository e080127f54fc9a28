# SPDX-License-Identifier: Apache-2.0
"""Small real data made on the spot: text in several languages, and prepared TFDS sets in the layout of XNLI and TyDi QA."""

from __future__ import annotations

import gzip
import pathlib

import numpy as np
import tensorflow_datasets as tfds

SENTENCES = {
    "de": "Der Fluß ist über die Ufer getreten. ",
    "el": "Η θάλασσα είναι ήρεμη σήμερα. ",
    "en": "The river has burst its banks. ",
    "zh": "河水已經決堤了。",
}
NLI_LANGUAGES = ("de", "en", "ur", "zh")
# One question a language, the second answered by bytes that are no UTF-8.
QUESTIONS = {
    "arabic": ("متى بدأت؟", "بدأت عام 1914.", ("1914", "عام 1914")),
    "english": ("Who wrote it?", "It was written by Ada.", ("Ada",)),
    "korean": ("어디입니까?", "서울입니다.", ("서울",)),
}


def write_languages(folder: pathlib.Path, *, repeats: int = 40) -> str:
    """Writes training and validation text in four languages, a second kind of English, and a file that is no language's."""
    for language, sentence in SENTENCES.items():
        for split, count in (("train", 4 * repeats), ("valid", repeats)):
            path = folder / f"{language}_ud.{split}.txt.gz"
            path.write_bytes(gzip.compress((sentence * count).encode()))
    (folder / "en_books.train.txt").write_bytes(b"A book in English. " * repeats)
    (folder / "README.md").write_text("not a language")
    return str(folder)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _describe(self, features):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class TinyXnli(_Builder):
    """The features of TFDS's `xnli`; record i has label i mod 3, and one premise is no valid UTF-8."""

    def _info(self):
        return self._describe(
            {
                "premise": tfds.features.Translation(languages=NLI_LANGUAGES),
                "hypothesis": tfds.features.TranslationVariableLanguages(languages=NLI_LANGUAGES),
                "label": tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            }
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples(6), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            premise = {language: f"p {i} {language} é 河" for language in NLI_LANGUAGES}
            if i == 2:
                premise["ur"] = b"p 2 ur \xff\xfe"
            yield i, {"premise": premise, "hypothesis": {x: f"h {i} {x}" for x in NLI_LANGUAGES}, "label": i % 3}


class TinyMultiNli(_Builder):
    """The features of TFDS's `multi_nli`."""

    def _info(self):
        label = tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"])
        return self._describe({"premise": tfds.features.Text(), "hypothesis": tfds.features.Text(), "label": label})

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "unlabelled": self._generate_examples(2, label=-1)}

    def _generate_examples(self, count, label=None):
        for i in range(count):
            yield i, {"premise": f"P{i}", "hypothesis": f"H{i}", "label": i % 3 if label is None else label}


class TinyTydi(_Builder):
    """The features of TFDS's `tydi_qa/goldp`."""

    def _info(self):
        answers = tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32})
        texts = {name: tfds.features.Text() for name in ("title", "context", "question")}
        return self._describe({"id": np.str_, **texts, "answers": answers})

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            for language, (question, context, answers) in QUESTIONS.items():
                texts = [{"text": text, "answer_start": 0} for text in answers]
                if i == 1:
                    texts = [{"text": b"\xff" + str(i).encode(), "answer_start": 0}, *texts]
                example = {"title": "", "question": question, "context": context, "answers": texts}
                yield f"{language}-{i}", {"id": f"{language}-{i}-0", **example}


def write_pairs(folder: pathlib.Path) -> str:
    """Prepares `tiny_xnli`, `tiny_multi_nli` and `tiny_tydi` for random access, and returns their `data_dir`."""
    for builder in (TinyXnli, TinyMultiNli, TinyTydi):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)
