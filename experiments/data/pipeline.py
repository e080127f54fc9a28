# SPDX-License-Identifier: Apache-2.0
"""From `config.data` to batches: shuffled, endless and checkpointable for training; one padded pass for evaluation.

What makes batches repeatable bit for bit:
  1. the order is grain's shuffle, seeded by the run's seed, another one each epoch;
  2. what is random in an example (crop, flip, window, span noise) is seeded by the run's seed and by the example's
     position in the endless stream, never by a generator that is carried along;
  3. so the position alone is the state of the iterator, and it is part of the checkpoint;
  4. evaluation draws from `data.seed` and the example's index: it is the same for all runs and at all steps.
Examples are batched as pairs (position, index) and made a batch at a time, before the data set becomes an iterator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import jax
import ml_collections
import numpy as np

from experiments.data import (
    diagnostics,
    digits,
    grouping,
    images,
    languages,
    next_byte,
    next_token,
    pairs,
    schema,
    span_corruption,
    spelling,
    text,
    vocabulary,
    word_search,
    words,
)
from experiments.data.splits import check_split

Batch = dict[str, np.ndarray]

# Streams of randomness under one seed.
_ORDER, _TRAIN, _EVAL = 0, 1, 2


class Source(Protocol):
    """A split of a data set with random access.

    A source may have `together`: so many examples, from each multiple of it on, stay neighbours in evaluation (one of
    each language), so that a sample of the first batches is balanced.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> Batch:
        """Returns examples `indices [B]`, what is random in row b being seeded by `entropy[b]`."""
        ...


def _pair(position: int, index: int) -> np.ndarray:
    """Keeps an example's place in the endless stream beside its index in the split."""
    return np.array([position, index], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, as batches of dicts of NumPy arrays.

    Attributes:
      source: the examples.
      batch_size: of all processes together.
      seed: the run's, for order and augmentation.
      data_seed: the data set's, for what evaluation draws.
      process_index, process_count: which rows of each batch this process makes: every `process_count`-th.
      threads, prefetch, workers: how batches are made ahead.

    Raises:
      ValueError: at construction, for a batch that the processes cannot share evenly or a value outside its range.
    """

    source: Source
    batch_size: int
    seed: int
    data_seed: int = 0
    process_index: int = 0
    process_count: int = 1
    threads: int = 2
    prefetch: int = 4
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "data_seed", "threads", "prefetch", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index={self.process_index} must lie in 0..{self.process_count - 1}")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} must be a positive multiple of the {self.process_count} processes"
            )

    @property
    def examples(self) -> int:
        """Number of examples in the split, all processes together."""
        return len(self.source)

    @property
    def local_batch_size(self) -> int:
        """Rows that this process makes of each batch."""
        return self.batch_size // self.process_count

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole training batch, all processes together; evaluation adds `weight [B]` float32."""
        example = self.source.batch(np.zeros(1, np.int64), self._entropy(_EVAL, np.zeros(1, np.int64)), augment=False)
        return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for k, v in example.items()}

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns an endless iterator over this process's rows of each batch.

        Each epoch passes over all examples once in a new order; batches run on across epochs, so none is partial. The
        iterator's `get_state` and `set_state` are exact, and `grain.checkpoint.CheckpointSave` takes it as it is.
        """
        pairs = grain.MapDataset.range(self.examples).shuffle(seed=self._order_seed(self.seed)).repeat()
        pairs = pairs.map_with_index(_pair)[self.process_index :: self.process_count]
        batches = pairs.batch(self.local_batch_size, drop_remainder=True).map(self._train_batch)
        dataset = batches.to_iter_dataset(self._read_options())
        if self.workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self.workers, max(self.prefetch, 1)))
        return iter(dataset)

    def eval_batches(self, max_batches: int | None = None) -> Iterator[Batch]:
        """Returns an iterator over one pass, in an order that is the same each time; the first batches are a sample.

        Each batch has `weight [B]` float32, 1 for real rows. The last batch is padded to full size with copies of a
        real row at weight 0, and with text labels 0 (no loss), so all processes have as many batches of one shape.

        Args:
          max_batches: stops after so many batches; None passes over all examples.

        Raises:
          ValueError: `max_batches` is below 1.
        """
        count = -(-self.examples // self.batch_size)
        if max_batches is not None:
            if max_batches < 1:
                raise ValueError(f"max_batches={max_batches} must be at least 1, or None for all {count}")
            count = min(count, max_batches)
        batches = grain.MapDataset.range(count).map(self._eval_batch)
        return iter(batches.to_iter_dataset(self._read_options()))

    def _read_options(self) -> grain.ReadOptions:
        # Grain's defaults, 16 threads and 500 batches ahead, would take a small machine's memory and processors.
        return grain.ReadOptions(
            num_threads=self.threads if self.prefetch else 0,
            prefetch_buffer_size=self.prefetch if self.threads else 0,
        )

    @staticmethod
    def _order_seed(seed: int) -> int:
        # Grain seeds epoch e with seed + e; hashing keeps epoch 1 of seed 0 from being epoch 0 of seed 1.
        return int(np.random.SeedSequence((seed, _ORDER)).generate_state(1)[0])

    def _entropy(self, stream: int, places: np.ndarray) -> np.ndarray:
        """Returns what seeds each row's generator, `[B, 3]`."""
        seed = self.seed if stream == _TRAIN else self.data_seed
        return np.stack([np.full_like(places, seed), np.full_like(places, stream), places], axis=1)

    def _train_batch(self, pairs: np.ndarray) -> Batch:
        positions, indices = pairs[:, 0], pairs[:, 1]
        return self.source.batch(indices, self._entropy(_TRAIN, positions), augment=True)

    @functools.cached_property
    def _eval_order(self) -> np.ndarray:
        together = getattr(self.source, "together", 1)
        rounds = np.random.default_rng((self.data_seed, _ORDER)).permutation(self.examples // together)
        return (rounds[:, None] * together + np.arange(together)).reshape(-1)

    def _eval_batch(self, number: int) -> Batch:
        first = number * self.batch_size + self.process_index
        positions = first + self.process_count * np.arange(self.local_batch_size)
        real = positions < self.examples
        indices = self._eval_order[np.where(real, positions, 0)]
        batch = self.source.batch(indices, self._entropy(_EVAL, indices), augment=False)
        if "labels" in batch:
            batch["labels"] = np.where(real[:, None], batch["labels"], 0)
        return {**batch, "weight": real.astype(np.float32)}


# -- Building ---------------------------------------------------------------------------------------------------------


def _subset(config: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Returns those values of `config` that are fields of the options class `kind`."""
    return {field.name: config[field.name] for field in dataclasses.fields(kind) if field.name in config}


def _digits(config: ml_collections.ConfigDict, split: str) -> Source:
    source, kind = {
        "digits": (digits.Digits, digits.DigitOptions),
        "moving_digits": (digits.MovingDigits, digits.MovingDigitOptions),
    }[config.source]
    examples = config.examples if split == "train" else config.valid_examples
    return source(split, examples, kind(**_subset(config, kind)), cache=config.cache)


def _tfds_images(config: ml_collections.ConfigDict, split: str) -> Source:
    return images.TfdsImages(
        config.name,
        data_dir=config.data_dir,
        split=config[f"{split}_split"],
        image_key=config.image_key,
        label_key=config.label_key,
        options=images.ImageOptions(**_subset(config, images.ImageOptions)),
    )


def _image_folder(config: ml_collections.ConfigDict, split: str) -> Source:
    options = images.ImageOptions(**_subset(config, images.ImageOptions))
    own_path = {"valid": config.valid_path, "test": config.test_path}.get(split)
    if not own_path:
        whole = split == "train" and config.valid_path and config.test_path
        kept = None if whole else split
        return images.ImageFolder(config.path, split=kept, valid_fraction=config.valid_fraction, options=options)
    folder = images.ImageFolder(own_path, options=options)
    expected = images.ImageFolder(config.path, options=options).class_names
    if folder.class_names != expected:
        raise ValueError(f"classes under {own_path!r} are {folder.class_names}, but under {config.path!r} {expected}")
    return folder


def _text(config: ml_collections.ConfigDict, split: str) -> Source:
    kind = {
        "span_corruption": span_corruption.SpanCorruption,
        "next_byte": next_byte.NextByte,
        "next_token": next_token.NextToken,
        "next_subword": next_token.NextToken,
    }[config.objective]
    objective = kind(**_subset(config, kind))
    if config.objective == "next_subword":
        if config.text == "languages":
            raise ValueError("data.objective='next_subword' reads a text in one piece; data.text='languages' has bytes")
        ids, sizes = vocabulary.vocabulary(config).encode_corpus(_read_text(config, split))
        return text.TextSource(ids, objective, sizes)
    if config.text == "languages":
        return _languages(config, split, objective)
    return text.TextSource(_read_text(config, split), objective)


def _read_text(config: ml_collections.ConfigDict, split: str) -> np.ndarray:
    """Returns the bytes of a split of a text in one piece."""
    if config.text == "books":
        return text.from_books(split=split, valid_fraction=config.valid_fraction, max_bytes=config.max_bytes)
    if config.text == "stdlib":
        return text.from_stdlib(split=split, valid_fraction=config.valid_fraction, max_bytes=config.max_bytes)
    if config.text == "files":
        return text.from_files(
            config.path,
            split=split,
            valid_path=config.valid_path,
            test_path=config.test_path,
            file_prefix=config.file_prefix,
            valid_fraction=config.valid_fraction,
            max_bytes=config.max_bytes,
        )
    return text.from_tfds(
        config.name,
        data_dir=config.data_dir,
        split=config[f"{split}_split"],
        field=config.field,
        max_bytes=config.max_bytes,
    )


def _languages(config: ml_collections.ConfigDict, split: str, objective: text.Objective) -> Source:
    chosen = grouping.choose_languages(config)
    options = dict(split=split, valid_fraction=config.valid_fraction, max_bytes=config.max_bytes)
    wanted = chosen.train if split == "train" else chosen.evaluation
    texts = {language: languages.read_language(chosen.files[language], **options) for language in wanted}
    examples = 0 if split == "train" else config.eval_examples
    return languages.LanguageSource(texts, objective, names=chosen.names, examples=examples)


def _diagnostic(config: ml_collections.ConfigDict, split: str) -> Source:
    examples = config.examples if split == "train" else config.valid_examples
    return diagnostics.Diagnostic(config.diagnostic, split, examples, length=config.length, seed=config.seed)


def _characters(config: ml_collections.ConfigDict, split: str) -> Source:
    train = words.Corpus.from_bytes(_read_text(config, "train"))
    corpus = train if split == "train" else words.Corpus.from_bytes(_read_text(config, split))
    vocabulary = words.Vocabulary(train, config.vocabulary)
    if config.characters == "spelling_correction":
        kind = spelling.SpellingOptions
        return spelling.SpellingCorrection(corpus, vocabulary, kind(**_subset(config, kind)))
    kind = word_search.SearchOptions
    return word_search.WordSearch(corpus, vocabulary, kind(**_subset(config, kind)), train=split == "train")


def _pairs(config: ml_collections.ConfigDict, split: str) -> Source:
    kind = {"xnli": pairs.Xnli, "tydi_qa": pairs.TydiQa}[config.pairs]
    return kind(
        (config.get("train_name") if split == "train" else "") or config.name,
        data_dir=config.data_dir,
        split=config[f"{split}_split"],
        languages=config.languages if split == "train" else config.eval_languages,
        key="languages" if split == "train" else "eval_languages",
        options=pairs.PairOptions(**_subset(config, pairs.PairOptions)),
    )


_BUILDERS = {
    "digits": _digits,
    "moving_digits": _digits,
    "tfds_images": _tfds_images,
    "image_folder": _image_folder,
    "text": _text,
    "diagnostic": _diagnostic,
    "characters": _characters,
    "pairs": _pairs,
}


def build(
    data_config: ml_collections.ConfigDict | Mapping[str, Any],
    *,
    split: str,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Builds one split of the data set that `config.data` describes; keys that are not given take their defaults.

    Batches by source (float32 unless said): `digits`, `image_folder` and `tfds_images` give `image [B, H, W, C]` and
    `label [B]` int32, `moving_digits` gives `video [B, T, H, W, C]`; digits also `difficulty [B]`. The others, of text,
    give `input_ids [B, N]`, `decoder_input_ids [B, T]` and `labels [B, T]`, all int32: attend where `input_ids != 0`,
    count losses where `labels != 0`.
    The objective "next_token" gives `input_ids [B, N]` and `labels [B, N]` alone; "next_subword" also `bytes [B, N]`, those
    that labels stand for, and any id may be a label, 0 too. Several languages give `language [B]`
    int32, `characters` gives `kind [B]` int32; `grouping.groups` names their values.

    Args:
      data_config: see `schema.resolve`.
      split: `"train"`, `"valid"` or `"test"`.
      batch_size: rows of all processes together.
      seed: the run's, for order and augmentation.
      process_index, process_count: of this process.

    Raises:
      ValueError: unknown split, source or key; a value outside its range; an empty source.
    """
    check_split(split)
    config = schema.resolve(data_config)
    return Dataset(
        source=_BUILDERS[config.source](config, split),
        batch_size=batch_size,
        seed=seed,
        data_seed=config.seed,
        process_index=process_index,
        process_count=process_count,
        threads=config.threads,
        prefetch=config.prefetch,
        workers=config.workers,
    )
