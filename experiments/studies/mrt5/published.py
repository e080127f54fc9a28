# SPDX-License-Identifier: Apache-2.0
"""Figures of the MrT5 paper, to stand beside ours: another model, other data, another machine.

ByT5-small scale (300 M parameters), span corruption of mC4 in 15 languages, 1,024 bytes in and 189 out, hard deletion.

Source: Kallini et al. 2025 (MrT5); bits per byte, deletion and placements are read off its figures (+-0.003 bits, +-0.3 %),
times and accuracies are those of the authors' notebooks.
"""

from __future__ import annotations

from typing import Any

# method, rate asked for, bytes deleted %, bits per byte, milliseconds an example (None: not given).
_TRADE_OFF = (
    ("byt5", None, 0.0, 0.961, 44.29),
    ("mrt5", 0.3, 33.7, 0.992, 34.99),
    ("mrt5", 0.4, 41.0, 1.000, 31.95),
    ("mrt5", 0.5, 49.5, 1.020, 29.99),
    ("mrt5", 0.6, 57.4, 1.044, 28.24),
    ("mrt5", 0.7, 68.0, 1.090, 24.48),
    ("random_deletion", 0.3, 30.0, 1.105, None),
    ("random_deletion", 0.5, 50.0, 1.235, None),
    ("random_deletion", 0.7, 70.0, 1.435, None),
    ("fixed_deletion", 0.3, 25.8, 1.192, None),
    ("fixed_deletion", 0.5, 44.6, 1.363, None),
    ("fixed_deletion", 0.7, 64.5, 1.570, None),
    ("boundary_predictor", 0.3, 32.7, 1.257, None),
    ("boundary_predictor", 0.5, 52.3, 1.343, None),
    ("boundary_predictor", 0.7, 72.0, 1.431, None),
    ("strided r=2", None, 50.0, 1.257, None),
    ("strided r=3", None, 66.7, 1.384, None),
    ("strided r=4", None, 75.0, 1.415, None),
)

# Gate after layer: (bits per byte, milliseconds), at a target of 50 %.
_PLACEMENT = {1: (1.042, 29.4), 2: (1.027, 28.5), 3: (1.020, 30.0), 4: (1.020, 30.7), 5: (1.017, 32.0)}

# Task: (accuracy % of the dense model, of MrT5, bytes deleted %).
_TASKS = {
    "vowel removal": (99.93, 99.92, 18.6),
    "contextual vowel removal": (99.91, 99.72, 19.0),
    "sequence merge": (99.84, 99.19, 17.4),
    "spelling correction": (66.73, 63.18, 50.5),
    "word search": (76.61, 72.02, 74.5),
}

# Bytes deleted % by language, at a target of 50 %.
LANGUAGES = dict(
    zh=36, sw=40, tr=42, vi=42, de=43, fr=48, es=49, ur=52, el=53, ar=53, bg=54, ru=55, hi=55, en=56, th=58
)

_SOURCE = {"config_hash": "-", "seed": "-", "command": "arXiv:2410.20771", "published": True}


def trade_off() -> list[dict[str, Any]]:
    """Rows of the trade-off table, in our units; realised speedup is the paper's ByT5 time over the method's."""
    dense = _TRADE_OFF[0][-1]
    return [
        {
            "group": f"paper/{method}-{rate}",
            "method": f"paper: {method}",
            "rate": rate,
            "kept": 1 - deleted / 100,
            "bits_per_byte": bits,
            "gmacs": "-",
            "implied": "-",
            "realised": dense / time if time else "-",
            "milliseconds_per_example": time or "-",
            **_SOURCE,
        }
        for method, rate, deleted, bits, time in _TRADE_OFF
    ]


def placement() -> list[dict[str, Any]]:
    """Rows of the table of gate placements."""
    return [
        {
            "group": f"paper/layer{layer}",
            "method": "paper: mrt5",
            "layer": layer,
            "kept": 0.5,
            "bits_per_byte": bits,
            "implied": "-",
            "realised": _TRADE_OFF[0][-1] / time,
            **_SOURCE,
        }
        for layer, (bits, time) in _PLACEMENT.items()
    ]


def tasks() -> list[dict[str, Any]]:
    """Rows of the table of diagnostics and character tasks."""
    rows = []
    for task, (dense, learned, deleted) in _TASKS.items():
        for method, accuracy, kept in (("byt5", dense, 1.0), ("mrt5", learned, 1 - deleted / 100)):
            rows.append(
                {
                    "group": f"paper/{task}/{method}",
                    "task": task,
                    "method": f"paper: {method}",
                    "kept": kept,
                    "sequence_accuracy": accuracy / 100,
                    "realised": "-",
                    **_SOURCE,
                }
            )
    return rows
