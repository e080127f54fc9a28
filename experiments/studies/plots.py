# SPDX-License-Identifier: Apache-2.0
"""Plots of studies: trade-offs as lines, and pictures of what happened to patches and bytes. PNG and PDF each.

Shapes: B images, N0 original tokens, h w the patch grid.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

# Text in a PDF stays text.
matplotlib.rcParams["pdf.fonttype"] = 42

MARKERS = "osD^vP*X"


def save(figure: Figure, directory: epath.Path, name: str) -> None:
    """Writes `name.png` and `name.pdf`; the files hold no date, so that equal figures are equal files."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=130, bbox_inches="tight", metadata=metadata)
        (directory / f"{name}.{kind}").write_bytes(buffer.getvalue())


def trade_off(
    rows: Iterable[Mapping[str, Any]],
    panels: Sequence[tuple[str, str, str, str]],
    *,
    line: str = "method",
    level: Mapping[str, Any] | None = None,
) -> Figure:
    """Lines of methods in one panel for each `(x key, x label, y key, y label)`; points of several seeds are averaged.

    Args:
      rows: with a `group` each (seeds of a setting share it).
      panels: what to draw against what.
      line: key that names a line.
      level: the dense row, drawn as a dashed level.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    rows = list(rows)
    lines = dict.fromkeys(row[line] for row in rows)
    for axis, (x, x_label, y, y_label) in zip(axes, panels, strict=True):
        for index, name in enumerate(lines):
            chosen = [row for row in rows if row[line] == name]
            groups = dict.fromkeys(row["group"] for row in chosen)
            points = [
                [np.mean([row[key] for row in chosen if row["group"] == group]) for key in (x, y)] for group in groups
            ]
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, marker=MARKERS[index % len(MARKERS)], markersize=4, label=str(name))
        if level is not None and y in level:
            axis.axhline(level[y], color="0.5", linestyle="--", linewidth=1, label="dense")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    levels: Sequence[float] = (),
) -> Figure:
    """One line for each name in `lines`, given as `(xs, ys)`, over dashed horizontal `levels`."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for level in levels:
        axis.axhline(level, color="0.5", linestyle="--", linewidth=1)
    for name, (xs, ys) in lines.items():
        axis.plot(xs, ys, linewidth=1, label=name)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    return figure


def by_layer(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Values of layers 1, 2, ... in one panel for each y label; the lines of a name, one a seed, share its colour."""
    figure = Figure(figsize=(4.2 * len(panels) + 1.0, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (y_label, lines) in zip(axes, panels.items(), strict=True):
        for index, (name, seeds) in enumerate(lines.items()):
            for place, ys in enumerate(seeds):
                label = None if place else name
                axis.plot(range(1, len(ys) + 1), ys, color=f"C{index}", linewidth=1, marker=".", label=label)
        axis.set_xlabel("layer")
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], y_label: str, *, slanted: bool = False) -> Figure:
    """One group of bars for each name in `groups`, one bar in it for each method; long names stand `slanted`."""
    methods = list(next(iter(groups.values())))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(max(4.6, 0.6 * len(groups)), 3.6), layout="constrained")
    axis = figure.subplots()
    for index, method in enumerate(methods):
        places = np.arange(len(groups)) + (index - (len(methods) - 1) / 2) * width
        axis.bar(places, [group[method] for group in groups.values()], width, label=method)
    slant = {"rotation": 60, "ha": "right", "fontsize": 7} if slanted else {}
    axis.set_xticks(np.arange(len(groups)), list(groups), **slant)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    return figure


def merged_patches(
    images: np.ndarray, origins: Sequence[np.ndarray], grid: tuple[int, int], titles: Sequence[str], *, skip: int
) -> Figure:
    """Images beside the patches that share a token, one column for each reduction; dropped patches are dark.

    Patches of one token have the mean colour of their pixels and a common outline.

    Args:
      images: `[B, H, W, C]`.
      origins: for each column `[B, N0]`, slot of each original token, -1 for dropped.
      grid: `(h, w)`; skip: tokens before the patches (1 with a class token).
      titles: of the columns after the first.
    """
    shown = _as_rgb(images)
    figure = Figure(figsize=(1.9 * (len(origins) + 1), 1.95 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(origins) + 1, squeeze=False)
    for row, image in enumerate(shown):
        axes[row][0].imshow(image, interpolation="nearest")
        for column, origin in enumerate(origins, start=1):
            slots = origin[row][skip:].reshape(grid)
            axes[row][column].imshow(_painted(image, slots), interpolation="nearest")
            _outline(axes[row][column], slots, image.shape[0] // grid[0])
    for axis, title in zip(axes[0], ("image", *titles), strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def maps_over_images(images: np.ndarray, maps: np.ndarray) -> Figure:
    """Images `[B, H, W, C]` above maps `[B, h, w]` of values in 0..1, dark for low."""
    figure = Figure(figsize=(1.5 * len(images), 3.2), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (image, values) in enumerate(zip(_as_rgb(images), maps, strict=True)):
        axes[0][column].imshow(image, interpolation="nearest")
        shown = axes[1][column].imshow(values, vmin=maps.min(), vmax=maps.max(), cmap="viridis")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=list(axes[1]), shrink=0.8)
    return figure


def shaded_bytes(lines: Sequence[tuple[str, bytes, np.ndarray]], *, width: int = 64) -> Figure:
    """Text on a ground that is the darker the higher each byte's value, one block for each `(title, bytes, values)`."""
    blocks = [
        (title, text[i : i + width], values[i : i + width])
        for title, text, values in lines
        for i in range(0, len(text), width)
    ]
    low = min(float(values.min()) for _, _, values in lines)
    high = max(float(values.max()) for _, _, values in lines)
    figure = Figure(figsize=(0.12 * width, 0.3 * len(blocks) + 0.3))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    grid = np.full((len(blocks), width), low)
    for row, (_, _, values) in enumerate(blocks):
        grid[row, : len(values)] = values
    axis.imshow(grid, cmap="Oranges", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    for row, (_, text, _) in enumerate(blocks):
        for x, byte in enumerate(text):
            shown = chr(byte) if 32 <= byte < 127 else ("\u00b6" if byte == 10 else "\u00b7")
            axis.text(x, row, shown, fontsize=7.5, family="monospace", ha="center", va="center")
    return figure


def _as_rgb(images: np.ndarray) -> np.ndarray:
    """`[B, H, W, 3]` in 0..1 from normalised images of one or three channels."""
    low = images.min(axis=(1, 2, 3), keepdims=True)
    high = images.max(axis=(1, 2, 3), keepdims=True)
    scaled = (images - low) / np.maximum(high - low, 1e-6)
    return np.repeat(scaled, 3, axis=-1) if scaled.shape[-1] == 1 else scaled


def _painted(image: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The image with each token's patches in their mean colour, dropped ones dark."""
    size = image.shape[0] // slots.shape[0]
    spread = np.repeat(np.repeat(slots, size, axis=0), size, axis=1)
    out = np.zeros_like(image)
    for slot in np.unique(slots[slots >= 0]):
        alone = (slots == slot).sum() == 1
        # A token of a single patch still carries all of it, so it is shown as it is.
        out[spread == slot] = image[spread == slot] if alone else image[spread == slot].mean(axis=0)
    return out


def _outline(axis: Any, slots: np.ndarray, size: int) -> None:
    """Lines between neighbouring patches of different tokens."""
    height, width = slots.shape
    for y in range(height):
        for x in range(width):
            if x + 1 < width and slots[y, x] != slots[y, x + 1]:
                edge = (x + 1) * size - 0.5
                axis.plot([edge, edge], [y * size - 0.5, (y + 1) * size - 0.5], color="tab:orange", linewidth=0.7)
            if y + 1 < height and slots[y, x] != slots[y + 1, x]:
                edge = (y + 1) * size - 0.5
                axis.plot([x * size - 0.5, (x + 1) * size - 0.5], [edge, edge], color="tab:orange", linewidth=0.7)


def deleted_bytes(lines: Sequence[tuple[str, bytes, np.ndarray]], *, width: int = 96) -> Figure:
    """Text with its deleted bytes struck in red and its kept bytes in black, one block for each `(title, bytes, kept)`."""
    rows = [
        (title, text[i : i + width], kept[i : i + width])
        for title, text, kept in lines
        for i in range(0, len(text), width)
    ]
    figure = Figure(figsize=(0.088 * width + 0.4, 0.23 * (len(rows) + len(lines)) + 0.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, width + 1)
    y, last = 0.0, None
    for title, text, kept in rows:
        if title != last:
            y -= 1.1
            axis.text(0.5, y, title, fontsize=8, weight="bold", family="sans-serif")
            last = title
        y -= 1.0
        for x, (byte, stays) in enumerate(zip(text, kept, strict=True)):
            shown = chr(byte) if 32 <= byte < 127 else ("¶" if byte == 10 else "·")
            axis.text(x + 0.5, y, shown, fontsize=7.5, family="monospace", color="black" if stays else "tab:red")
            if not stays:
                axis.plot([x + 0.45, x + 1.25], [y + 0.22] * 2, color="tab:red", linewidth=0.5)
    axis.set_ylim(y - 0.6, 0.3)
    return figure


def text_heat(lines: Sequence[tuple[str, bytes, np.ndarray]], *, width: int = 96) -> Figure:
    """Text whose bytes are shaded by a value each, one block for each `(title, bytes, values)`, with a scale of its own."""
    count = sum(-(-len(text) // width) for _, text, _ in lines)
    figure = Figure(figsize=(0.088 * width + 1.2, 0.23 * (count + 1.4 * len(lines)) + 0.2), layout="constrained")
    heights = [-(-len(text) // width) for _, text, _ in lines]
    axes = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, text, values) in zip(axes, lines, strict=True):
        rows = -(-len(text) // width)
        grid = np.full(rows * width, np.nan)
        grid[: len(text)] = values
        image = axis.imshow(grid.reshape(rows, width), cmap="YlOrRd", aspect="auto", vmin=0.0, interpolation="nearest")
        for place, byte in enumerate(text):
            shown = chr(byte) if 32 <= byte < 127 else ("¶" if byte == 10 else "·")
            row, column = divmod(place, width)
            axis.text(column, row, shown, fontsize=7, family="monospace", ha="center", va="center")
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(image, ax=axis, pad=0.01)
    return figure
