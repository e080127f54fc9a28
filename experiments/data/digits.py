# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits on cluttered canvases, still and moving: real strokes, redundant tokens, varying difficulty.

The digits are scikit-learn's bundled 8 x 8 scans (1797 of them, UCI "Optical Recognition of Handwritten Digits"), so
nothing is downloaded. Most of a canvas is smooth background, which adaptive models may skip; how large the digits are,
how much clutter and noise there is varies from example to example, and so does the compute that an example deserves.

Letters: B batch, T frames, H = W canvas side, C channels. Example i is a pure function of (seed, split, i) and the
options; the three splits draw from disjoint sets of scans.

Source: the composition follows cluttered translated MNIST (Mnih et al. 2014, section 4.1), clutter being fragments of
other digits; the motion follows moving MNIST (Srivastava et al. 2015, section 4.1).
Differs: several digits of an image are of one class; scale, clutter and noise are drawn for each example.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.data.splits import SPLITS, check_split

_SCAN = 8  # side of a scan
_FRAGMENT = 4  # side of the crop of a scan that makes one piece of clutter
_SHARES = (0.7, 0.15)  # of the scans, for training and validation; the rest is for the test
_SPLIT_SEED = 20240  # fixed: which scans are held out must not change with a run's seed
_DIM = 0.4  # how bright clutter stays behind a digit
_CACHE_LIMIT = 4 * 2**30  # bytes


@functools.cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Returns all scans `[1797, 8, 8]` float32 in 0..1 and their classes `[1797]`."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    bundle = load_digits()
    return (bundle.images / 16.0).astype(np.float32), bundle.target.astype(np.int32)


def scan_indices(split: str) -> np.ndarray:
    """Returns which scans (rows of the bundled set) a split draws from; splits are disjoint and cover all scans.

    Raises:
      ValueError: unknown split.
    """
    check_split(split)
    total = len(_load_scans()[1])
    order = np.random.default_rng(_SPLIT_SEED).permutation(total)
    first_valid, first_test = int(total * _SHARES[0]), int(total * sum(_SHARES))
    parts = {"train": order[:first_valid], "valid": order[first_valid:first_test], "test": order[first_test:]}
    return np.sort(parts[split])


@functools.cache
def _resize_matrix(source: int, target: int) -> np.ndarray:
    """Returns the bilinear interpolation matrix `[target, source]` of one axis, pixel centres aligned."""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    distance = np.abs(centres[:, None] - np.arange(source)[None, :])
    weight = np.maximum(1.0 - distance, 0.0)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _resize(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes square images `[..., s, s]` to `[..., side, side]` bilinearly."""
    matrix = _resize_matrix(images.shape[-1], side)
    return matrix @ images @ matrix.T


def _reflect(positions: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Folds unbounded positions into 0..limit as a ball bounces between two walls."""
    if np.all(limit == 0):
        return np.zeros_like(positions)
    folded = np.mod(positions, 2 * limit)
    return np.where(folded > limit, 2 * limit - folded, folded)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Where the random amounts of one example fell, each from 0 (easiest) to 1 (hardest); None: it does not vary."""

    size: float | None
    clutter: float | None
    noise: float | None

    @property
    def difficulty(self) -> float:
        """Mean of the amounts that vary, 0 when none does."""
        varying = [value for value in (self.size, self.clutter, self.noise) if value is not None]
        return sum(varying) / len(varying) if varying else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitOptions:
    """How digit images are composed.

    Attributes:
      image_size: H = W, pixels.
      channels: C; with more than one, each digit and each fragment has a random colour.
      digits: digits in an image, different handwritings of the same class.
      scale: smallest and largest side of a digit, as a share of the canvas side; an example draws one side.
      clutter: largest number of fragments of other digits; an example draws 0..clutter.
      background: strength of the smooth background gradient, 0..1.
      noise: largest standard deviation of the pixel noise (pixels lie in 0..1); an example draws 0..noise.
      seed: of the data set; examples of different seeds are independent.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    image_size: int = 64
    channels: int = 1
    digits: int = 1
    scale: tuple[float, float] = (0.25, 0.5)
    clutter: int = 8
    background: float = 0.2
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("image_size", _SCAN), ("channels", 1), ("digits", 1), ("clutter", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {lowest}")
        for name in ("background", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1, as pixels do")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={tuple(self.scale)} must be (smallest, largest) with 0 < smallest <= largest <= 1")
        if self.sides[0] < _FRAGMENT:
            raise ValueError(
                f"scale={tuple(self.scale)} makes digits of {self.sides[0]} pixels on a canvas of {self.image_size}; "
                f"at least {_FRAGMENT} pixels are needed: raise the scale or image_size"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Smallest and largest side of a digit, pixels."""
        return round(self.scale[0] * self.image_size), round(self.scale[1] * self.image_size)


class _Composer:
    """Draws scans, clutter, background and noise for one split; all randomness comes from the caller's generator."""

    def __init__(self, split: str, options: DigitOptions) -> None:
        scans, classes = _load_scans()
        chosen = scan_indices(split)
        self.options = options
        self._scans = scans[chosen]
        self._of_class = [np.flatnonzero(classes[chosen] == c) for c in range(10)]
        available = min(len(pool) for pool in self._of_class)
        if options.digits > available:
            raise ValueError(
                f"digits={options.digits}, but some class of the {split} split has {available} handwritings"
            )

    def amounts(self, rng: np.random.Generator) -> tuple[int, int, float, Draw]:
        """Draws digit side (pixels), number of fragments and noise, and where in their ranges they fell."""
        smallest, largest = self.options.sides
        side = int(rng.integers(smallest, largest, endpoint=True))
        pieces = int(rng.integers(0, self.options.clutter, endpoint=True))
        noise_share = float(rng.random())
        draw = Draw(
            size=(largest - side) / (largest - smallest) if largest > smallest else None,
            clutter=pieces / self.options.clutter if self.options.clutter else None,
            noise=noise_share if self.options.noise else None,
        )
        return side, pieces, noise_share * self.options.noise, draw

    def digits(self, label: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """Returns different handwritings of class `label`, `[digits, side, side, C]` in 0..1."""
        chosen = rng.choice(self._of_class[label], self.options.digits, replace=False)
        return self._coloured(_resize(self._scans[chosen], side), rng)

    def fragments(self, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """Returns `count` pieces of random scans, enlarged as much as the digits, `[count, f, f, C]`."""
        chosen = rng.integers(0, len(self._scans), count)
        offset = rng.integers(0, _SCAN - _FRAGMENT, (2, count), endpoint=True)
        span = np.arange(_FRAGMENT)
        rows, columns = offset[0][:, None, None] + span[:, None], offset[1][:, None, None] + span
        crops = self._scans[chosen[:, None, None], rows, columns]
        return self._coloured(_resize(crops, max(side * _FRAGMENT // _SCAN, 2)), rng)

    def _coloured(self, shapes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gives each of `[n, s, s]` shapes a brightness (and colour) of its own."""
        colours = rng.uniform(0.6, 1.0, (len(shapes), 1, 1, self.options.channels)).astype(np.float32)
        return shapes[..., None] * colours

    def background(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a smooth random background `[H, W, C]` in 0..background."""
        coarse = rng.random((self.options.channels, 3, 3), dtype=np.float32) * self.options.background
        return np.ascontiguousarray(np.moveaxis(_resize(coarse, self.options.image_size), 0, -1))

    @staticmethod
    def place(canvas: np.ndarray, items: np.ndarray, corners: np.ndarray, *, dim: float = 1.0) -> None:
        """Lights items `[n, s, s, C]` up on `canvas [H, W, C]` at `corners [n, 2]` (row, column), in place.

        `dim` darkens what is behind an item first, so that clutter under a digit does not hide it.
        """
        side = items.shape[1]
        for item, (row, column) in zip(items, corners.tolist(), strict=True):
            region = canvas[row : row + side, column : column + side]
            np.maximum(region * np.float32(dim), item, out=region)

    def corners(self, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """Returns uniform corners `[count, 2]` of items that lie wholly on the canvas."""
        return rng.integers(0, self.options.image_size - side, (count, 2), endpoint=True)

    def scene(self, pieces: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """Returns what stands still: background and clutter, `[H, W, C]`."""
        canvas = self.background(rng)
        if pieces:
            clutter = self.fragments(pieces, side, rng)
            self.place(canvas, clutter, self.corners(pieces, clutter.shape[1], rng))
        return canvas

    @staticmethod
    def quantised(frames: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
        """Adds pixel noise and rounds to uint8, so that a cache is small and equals what is made afresh."""
        if noise:
            frames = frames + np.float32(noise) * rng.standard_normal(frames.shape, dtype=np.float32)
        return (np.clip(frames, 0.0, 1.0) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


class Digits:
    """Cluttered digit images: `{"image" [H, W, C] float32, "label" int32, "difficulty" float32 in 0..1}`.

    Difficulty is the mean of three shares: how small the digits are, how many of the possible fragments there are, and
    how much of the possible noise; those that the options hold fixed do not count.

    Attributes:
      mean, std: of the pixels in 0..1, measured on the first training examples; images are `(pixel - mean) / std`.
      classes: number of classes.
    """

    classes = 10
    _field = "image"

    def __init__(self, split: str, examples: int, options: DigitOptions | None = None, *, cache: bool = False) -> None:
        """Prepares `examples` examples of a split.

        Args:
          split: `"train"`, `"valid"` or `"test"`.
          examples: size of the split.
          options: how images are composed.
          cache: keeps every example once made (uint8), for runs whose processor should train, not draw.

        Raises:
          ValueError: unknown split, no example, more digits than handwritings, or a cache above 4 GiB.
        """
        check_split(split)
        self._options = options or self._default_options()
        if examples < 1:
            raise ValueError(f"examples={examples} must be at least 1")
        self._split = SPLITS.index(split)
        self._composer = _Composer(split, self._options)
        self._examples = examples
        self._cache: dict[str, np.ndarray] | None = None
        self.mean, self.std = self._measure()
        if cache:
            self._allocate_cache()

    @staticmethod
    def _default_options() -> DigitOptions:
        return DigitOptions()

    def __len__(self) -> int:
        """Number of examples."""
        return self._examples

    def _measure(self) -> tuple[np.float32, np.float32]:
        """Returns mean and standard deviation of the first 64 training examples, the same for every split."""
        train = _Composer("train", self._options)
        pixels = np.stack([self._make(train, SPLITS.index("train"), i)[0] for i in range(64)])
        scaled = pixels.astype(np.float64) / 255
        return np.float32(scaled.mean()), np.float32(max(scaled.std(), 1e-3))

    def _allocate_cache(self) -> None:
        pixels, _, _ = self._raw(0)
        size = pixels.nbytes * self._examples
        if size > _CACHE_LIMIT:
            raise ValueError(
                f"a cache of {self._examples} examples would take {size / 2**30:.1f} GiB; at most "
                f"{_CACHE_LIMIT // 2**30} GiB are allowed: set data.cache=False or lower data.examples"
            )
        self._cache = {
            "filled": np.zeros(self._examples, bool),
            "pixels": np.zeros((self._examples, *pixels.shape), np.uint8),
            "label": np.zeros(self._examples, np.int32),
            "difficulty": np.zeros(self._examples, np.float32),
        }

    def _raw(self, index: int) -> tuple[np.ndarray, int, float]:
        """Returns pixels uint8, label and difficulty of one example."""
        if not 0 <= index < self._examples:
            raise IndexError(f"example {index} of {self._examples}")
        return self._make(self._composer, self._split, index)

    def _make(self, composer: _Composer, split: int, index: int) -> tuple[np.ndarray, int, float]:
        """Composes one still image."""
        rng = np.random.default_rng((self._options.seed, split, index))
        label = int(rng.integers(10))
        side, pieces, noise, draw = composer.amounts(rng)
        canvas = composer.scene(pieces, side, rng)
        digits = composer.digits(label, side, rng)
        composer.place(canvas, digits, composer.corners(len(digits), side, rng), dim=_DIM)
        return composer.quantised(canvas, noise, rng), label, draw.difficulty

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        """Turns uint8 pixels to float32 with mean 0 and deviation 1."""
        return (pixels.astype(np.float32) * np.float32(1 / 255) - self.mean) / self.std

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example."""
        pixels, label, difficulty = self._raw(index)
        return {
            self._field: self._normalised(pixels),
            "label": np.int32(label),
            "difficulty": np.float32(difficulty),
        }

    def batch(self, indices: np.ndarray, entropy: np.ndarray, *, augment: bool) -> dict[str, np.ndarray]:
        """Returns examples `indices [B]`; nothing is augmented, for an example is a pure function of its index."""
        del entropy, augment
        if self._cache is None:
            pixels, label, difficulty = zip(*(self._raw(int(i)) for i in indices), strict=True)
        else:
            pixels, label, difficulty = self._cached(np.asarray(indices))
        return {
            self._field: self._normalised(np.asarray(pixels)),
            "label": np.asarray(label, np.int32),
            "difficulty": np.asarray(difficulty, np.float32),
        }

    def _cached(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gathers from the cache, filling what is missing; safe in threads, since all write the same values."""
        cache = self._cache
        for i in indices[~cache["filled"][indices]].tolist():
            cache["pixels"][i], cache["label"][i], cache["difficulty"][i] = self._raw(i)
            cache["filled"][i] = True
        return cache["pixels"][indices], cache["label"][indices], cache["difficulty"][indices]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingDigitOptions(DigitOptions):
    """How digit videos are composed: as images, and

    Attributes:
      frames: T.
      speed: slowest and fastest motion, pixels a frame; each digit draws its own speed and direction.

    Raises:
      ValueError: at construction, for a value outside its range.
    """

    image_size: int = 32
    frames: int = 8
    speed: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1:
            raise ValueError(f"frames={self.frames} must be at least 1")
        if len(self.speed) != 2 or not 0 <= self.speed[0] <= self.speed[1]:
            raise ValueError(f"speed={tuple(self.speed)} must be (slowest, fastest) with 0 <= slowest <= fastest")


class MovingDigits(Digits):
    """Digits that bounce off the edges before a still, cluttered scene.

    Examples are `{"video" [T, H, W, C] float32, "label" int32, "difficulty" float32}`. Only the digits and the
    noise change from frame to frame, so most tokens repeat in time.
    """

    _field = "video"

    @staticmethod
    def _default_options() -> MovingDigitOptions:
        return MovingDigitOptions()

    def _make(self, composer: _Composer, split: int, index: int) -> tuple[np.ndarray, int, float]:
        """Composes one video."""
        options = self._options
        rng = np.random.default_rng((options.seed, split, index))
        label = int(rng.integers(10))
        side, pieces, noise, draw = composer.amounts(rng)
        scene = composer.scene(pieces, side, rng)
        digits = composer.digits(label, side, rng)
        paths = self._paths(len(digits), side, rng)
        frames = np.repeat(scene[None], options.frames, axis=0)
        for frame, corners in zip(frames, paths, strict=True):
            composer.place(frame, digits, corners, dim=_DIM)
        return composer.quantised(frames, noise, rng), label, draw.difficulty

    def _paths(self, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the corners of `count` bouncing digits, `[T, count, 2]` whole pixels."""
        options = self._options
        room = options.image_size - side
        start = rng.uniform(0, room, (count, 2)) if room else np.zeros((count, 2))
        angle = rng.uniform(0, 2 * np.pi, count)
        speed = rng.uniform(*options.speed, count)
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
        times = np.arange(options.frames)[:, None, None]
        return np.rint(_reflect(start + times * velocity, room)).astype(np.int64)
