# SPDX-License-Identifier: Apache-2.0
"""`config.data` is completed with defaults, and what does not belong there is refused with the nearest valid key."""

import ml_collections
import pytest

from experiments.data import OBJECTIVES, SOURCES, TEXTS, resolve


@pytest.mark.parametrize("source", SOURCES)
def test_defaults_resolve_to_themselves(source):
    config = resolve({"source": source})
    assert config.source == source and config.seed == 0
    assert resolve(config) == config


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_text_defaults_follow_its_choices(text, objective):
    config = resolve({"source": "text", "text": text, "objective": objective})
    assert ("path" in config) == (text == "files")
    assert ("noise_density" in config) == (objective == "span_corruption")
    assert ("context" in config) == (objective == "next_byte")


def test_given_values_win():
    config = resolve(ml_collections.ConfigDict({"source": "digits", "image_size": 48, "scale": (0.3, 0.4), "noise": 0}))
    assert config.image_size == 48 and config.scale == (0.3, 0.4) and config.noise == 0.0
    assert isinstance(config.noise, float) and config.channels == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"data\.source=''.*digits, moving_digits, tfds_images, image_folder, text"),
        ({"source": "digit"}, "did you mean 'digits'"),
        ({"source": "text", "text": "stdlibs"}, "did you mean 'stdlib'.*stdlib, files, tfds"),
        ({"source": "text", "objective": "span_coruption"}, "did you mean 'span_corruption'"),
        ({"source": "digits", "image_sise": 32}, r"data\.image_sise; did you mean 'image_size'.*clutter"),
        ({"source": "text", "image_size": 32}, r"data\.image_size.*text/stdlib/span_corruption"),
        ({"source": "text", "objective": "next_byte", "mean_span": 3.0}, r"data\.mean_span"),
        ({"source": "digits", "image_size": "32"}, r"data\.image_size='32' must be of type int"),
        ({"source": "digits", "image_size": 32.0}, "must be of type int"),
        ({"source": "digits", "digits": True}, "must be of type int"),
        ({"source": "digits", "cache": 1}, "must be of type bool"),
    ],
)
def test_mistakes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(config)
