# SPDX-License-Identifier: Apache-2.0
"""Image classification from prepared TFDS sets and from folders of image files.

Letters: B batch, H = W image side, C channels. Both sources share one pipeline: decode, convert to C channels, crop and
resize to one side length, flip, normalise. Augmentation is random per example from the caller's entropy alone.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from experiments.data import tfds_source
from experiments.data.splits import check_fraction, check_split, relative_name, split_of, walk

_CROPS = ("none", "pad", "resized")
_MODES = {1: "L", 3: "RGB"}
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# Ranges of area and aspect ratio of a resized crop: Szegedy et al. 2015, section 6.
_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are brought to one form.

    Attributes:
      image_size: H = W, pixels. Without a random crop the short side is resized to it and the centre is cut out.
      channels: C, 1 or 3.
      mean, std: of the pixels in 0..1, one number or one a channel; images are `(pixel - mean) / std`.
      flip: mirrors half of the training images.
      crop: of training images: `"none"`; `"pad"`, a shift by up to `crop_padding` pixels, the edge filled with 0;
        `"resized"`, a random area and aspect ratio, for large photographs.
      crop_padding: largest shift, pixels.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    image_size: int = 32
    channels: int = 3
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    flip: bool = True
    crop: str = "pad"
    crop_padding: int = 4

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1 pixel")
        if self.channels not in _MODES:
            raise ValueError(f"channels={self.channels} must be 1 (grey) or 3 (colour)")
        if self.crop not in _CROPS:
            raise ValueError(f"crop={self.crop!r} must be one of {', '.join(_CROPS)}")
        if not 0 <= self.crop_padding <= self.image_size:
            raise ValueError(f"crop_padding={self.crop_padding} must lie between 0 and image_size={self.image_size}")
        for name in ("mean", "std"):
            if np.size(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name}={getattr(self, name)} must be one number or {self.channels}, one a channel")
        if np.min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be positive")


def _resized_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random area and aspect ratio; the centre square when ten tries fail."""
    for _ in range(10):
        area = width * height * rng.uniform(*_CROP_AREA)
        aspect = np.exp(rng.uniform(*np.log(_CROP_ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w, endpoint=True))
            top = int(rng.integers(0, height - h, endpoint=True))
            return left, top, left + w, top + h
    return _centre_box(width, height)


def _centre_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the box of the largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _shifted(pixels: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts `[H, W, C]` by up to `padding` pixels each way; what comes in is 0."""
    side = pixels.shape[0]
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
    top, left = rng.integers(0, 2 * padding, 2, endpoint=True)
    return padded[top : top + side, left : left + side]


def prepare(pixels: np.ndarray, options: ImageOptions, rng: np.random.Generator | None) -> np.ndarray:
    """Brings one decoded image `[h, w, 1 or 3 or 4]` uint8 to `[H, W, C]` uint8; augments when `rng` is given.

    Raises:
      ValueError: the image is not uint8 or has another number of axes.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(f"an image must be uint8 [height, width, channels], got {pixels.dtype} {pixels.shape}")
    resized_crop = rng is not None and options.crop == "resized"
    side = options.image_size
    if resized_crop or pixels.shape != (side, side, options.channels):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(_MODES[options.channels])
        box = _resized_crop_box(*image.size, rng) if resized_crop else _centre_box(*image.size)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image).reshape(side, side, options.channels)
    if rng is None:
        return pixels
    if options.crop == "pad" and options.crop_padding:
        pixels = _shifted(pixels, options.crop_padding, rng)
    if options.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


class _ImageSource(abc.ABC):
    """Examples `{"image" [H, W, C] float32, "label" int32}` from `_read(index) -> (pixels uint8, label)`."""

    def __init__(self, options: ImageOptions | None) -> None:
        self.options = options or ImageOptions()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def _read(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Returns (pixels `[h, w, C']` uint8, label) of some examples."""

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns examples `indices [B]`; with `augment` each row's crop and flip come from `entropy [B, E]`."""
        records = self._read([int(i) for i in indices])
        rngs = [np.random.default_rng(row) if augment else None for row in entropy]
        images = [prepare(pixels, self.options, rng) for (pixels, _), rng in zip(records, rngs, strict=True)]
        mean, std = np.float32(self.options.mean), np.float32(self.options.std)
        return {
            "image": (np.stack(images).astype(np.float32) * np.float32(1 / 255) - mean) / std,
            "label": np.array([label for _, label in records], np.int32),
        }


class TfdsImages(_ImageSource):
    """Any image classification set that TFDS has prepared for random access.

    Attributes:
      classes: number of classes, or None when the set does not say.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: str = "",
        split: str = "train",
        image_key: str = "image",
        label_key: str = "label",
        options: ImageOptions | None = None,
    ) -> None:
        """Opens a split, given in TFDS notation.

        Raises:
          ValueError: set, split or field is missing, or the split is empty.
        """
        super().__init__(options)
        self._source = tfds_source.open_split(name, data_dir=data_dir, split=split)
        tfds_source.require_field(self._source, image_key, name=name, option="image_key")
        tfds_source.require_field(self._source, label_key, name=name, option="label_key")
        self._keys = image_key, label_key
        self.classes = getattr(self._source.dataset_info.features[label_key], "num_classes", None)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source)

    def _read(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        image_key, label_key = self._keys
        return [(record[image_key], int(record[label_key])) for record in self._source.__getitems__(indices)]


class ImageFolder(_ImageSource):
    """A folder with one folder a class, named by class; label k is the k-th name in order.

    Attributes:
      class_names: sorted names of the classes.
      classes: their number.
    """

    def __init__(
        self,
        directory: str,
        *,
        split: str | None = None,
        valid_fraction: float = 0.1,
        options: ImageOptions | None = None,
    ) -> None:
        """Lists the files below each class folder; hidden files and files that are no images are left out.

        Args:
          directory: the folder of class folders.
          split: keeps the files whose relative names hash to this split; None keeps all.
          valid_fraction: share held out for validation, and again for the test.
          options: how images are brought to one form.

        Raises:
          ValueError: the directory is missing, holds no class folder, a class has no image, or a split is empty.
        """
        super().__init__(options)
        if not directory:
            raise ValueError("data.path is empty: give a folder that holds one folder of images a class")
        root = epath.Path(directory).expanduser()
        if not root.is_dir():
            raise ValueError(f"image folder {directory!r} does not exist or is not a folder")
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise ValueError(f"image folder {directory!r} is empty: it must hold one folder of images a class")
        files = [(path, label) for label, folder in enumerate(folders) for path in _images_in(folder)]
        if split is not None:
            check_split(split)
            check_fraction(valid_fraction)
            files = [pair for pair in files if split_of(relative_name(pair[0], root), valid_fraction) == split]
        if not files:
            raise ValueError(
                f"the {split} split of image folder {directory!r} is empty at valid_fraction={valid_fraction}: "
                "add images, raise the fraction, or give the split a path of its own"
            )
        self._files = files
        self.class_names = tuple(folder.name for folder in folders)
        self.classes = len(folders)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._files)

    def _read(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        return [(_decode(path), label) for path, label in (self._files[i] for i in indices)]


def _images_in(folder: epath.Path) -> list[epath.Path]:
    """Returns the sorted image files below a class folder.

    Raises:
      ValueError: there is none.
    """
    files = [path for path in walk(folder) if path.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"class folder {str(folder)!r} holds no image ({', '.join(sorted(_SUFFIXES))})")
    return files


def _decode(path: epath.Path) -> np.ndarray:
    """Reads an image file as uint8 `[h, w, 3]`.

    Raises:
      ValueError: the file is damaged or is no image; the message names it.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error
