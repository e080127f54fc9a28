# SPDX-License-Identifier: Apache-2.0
"""`config.data` is completed with defaults, and what does not belong there is refused with the nearest valid key."""

import ml_collections
import pytest

from experiments.data import OBJECTIVES, SOURCES, TEXTS, lengths, resolve


@pytest.mark.parametrize("source", SOURCES)
def test_defaults_resolve_to_themselves(source):
    config = resolve({"source": source})
    assert config.source == source and config.seed == 0
    assert resolve(config) == config


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_text_defaults_follow_its_choices(text, objective):
    config = resolve({"source": "text", "text": text, "objective": objective})
    assert ("path" in config) == (text in ("files", "languages"))
    assert ("noise_density" in config) == (objective == "span_corruption")
    assert ("context" in config) == (objective == "next_byte")


def test_given_values_win():
    config = resolve(ml_collections.ConfigDict({"source": "digits", "image_size": 48, "scale": (0.3, 0.4), "noise": 0}))
    assert config.image_size == 48 and config.scale == (0.3, 0.4) and config.noise == 0.0
    assert isinstance(config.noise, float) and config.channels == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"data\.source=''.*digits, moving_digits, tfds_images, image_folder, text, diagnostic"),
        ({"source": "digit"}, "did you mean 'digits'"),
        ({"source": "text", "text": "stdlibs"}, "did you mean 'stdlib'.*books, stdlib, files, tfds, languages"),
        ({"source": "text", "objective": "span_coruption"}, "did you mean 'span_corruption'"),
        ({"source": "digits", "image_sise": 32}, r"data\.image_sise; did you mean 'image_size'.*clutter"),
        ({"source": "text", "image_size": 32}, r"data\.image_size.*text/books/span_corruption"),
        ({"source": "text", "objective": "next_byte", "mean_span": 3.0}, r"data\.mean_span"),
        ({"source": "pairs", "pairs": "xnly"}, "did you mean 'xnli'.*xnli, tydi_qa"),
        ({"source": "pairs", "pairs": "tydi_qa", "train_name": "x"}, r"data\.train_name.*pairs/tydi_qa:"),
        ({"source": "characters", "characters": "word"}, "unknown data.characters='word'"),
        ({"source": "characters", "text": "languages"}, "valid: books, stdlib, files, tfds$"),
        ({"source": "characters", "held_out": 0.2}, r"data\.held_out.*characters/spelling_correction/books"),
        ({"source": "digits", "image_size": "32"}, r"data\.image_size='32' must be of type int"),
        ({"source": "digits", "image_size": 32.0}, "must be of type int"),
        ({"source": "digits", "digits": True}, "must be of type int"),
        ({"source": "digits", "cache": 1}, "must be of type bool"),
    ],
)
def test_mistakes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"source": "text"}, (1024, 189)),
        (
            {"source": "text", "text": "languages", "objective": "next_byte", "context": 48, "targets_length": 4},
            (48, 4),
        ),
        ({"source": "text", "objective": "next_byte", "context": 1}, (1, 512)),
        ({"source": "diagnostic", "length": 32}, (32, 32)),
        ({"source": "characters"}, (64, 64)),
        ({"source": "characters", "characters": "word_search"}, (128, 16)),
        ({"source": "pairs"}, (1024, 2)),
        ({"source": "pairs", "pairs": "tydi_qa"}, (2048, 128)),
    ],
)
def test_lengths_are_known_before_anything_is_read(config, expected):
    assert lengths(resolve(config)) == expected


def test_sources_without_sequences_have_no_lengths():
    with pytest.raises(ValueError, match=r"data\.source='digits' gives no sequences of bytes"):
        lengths(resolve({"source": "digits"}))
