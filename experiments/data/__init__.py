# SPDX-License-Identifier: Apache-2.0
"""Data: what is trained and evaluated on, real by default and without a download.

`build(config.data, split=..., batch_size=..., seed=...)` returns a `Dataset`; `resolve(config.data)` fills defaults in.
"""

from experiments.data.pipeline import Dataset, build
from experiments.data.schema import OBJECTIVES, SOURCES, TEXTS, resolve
from experiments.data.splits import SPLITS

__all__ = ["OBJECTIVES", "SOURCES", "SPLITS", "TEXTS", "Dataset", "build", "resolve"]
