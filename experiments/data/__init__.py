# SPDX-License-Identifier: Apache-2.0
"""Data: what is trained and evaluated on, real by default and without a download.

`build(config.data, split=..., batch_size=..., seed=...)` returns a `Dataset`; `resolve(config.data)` fills defaults in;
`lengths` and `groups` say, before anything is read, how long sequences are and what examples are reported apart;
`vocabulary(config.data)` is what its ids stand for.
"""

from experiments.data.grouping import Group, groups
from experiments.data.pipeline import Dataset, build
from experiments.data.schema import NEXT_TOKEN, OBJECTIVES, SOURCES, TEXTS, lengths, resolve
from experiments.data.splits import SPLITS
from experiments.data.vocabulary import vocabulary

__all__ = [
    "NEXT_TOKEN",
    "OBJECTIVES",
    "SOURCES",
    "SPLITS",
    "TEXTS",
    "Dataset",
    "Group",
    "build",
    "groups",
    "lengths",
    "resolve",
    "vocabulary",
]
