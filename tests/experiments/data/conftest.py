# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the data tests: where larger real data may lie, and small real files made on the spot."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of larger real data; tests that need it are skipped where it is absent."""
    beside = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("ADAPTIVE_DATA_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set ADAPTIVE_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def cifar_dir(shared_data: pathlib.Path) -> str:
    """`data_dir` of a prepared CIFAR-10."""
    if not (shared_data / "tfds" / "cifar10").is_dir():
        pytest.skip(f"no prepared CIFAR-10 under {shared_data / 'tfds'}")
    return str(shared_data / "tfds")


@pytest.fixture
def image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of two classes with 12 small PNG files each, of differing sizes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 100, (10 + i % 3, 14, 3), dtype=np.uint8) + np.uint8(100 * label)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"
