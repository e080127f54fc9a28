# SPDX-License-Identifier: Apache-2.0
"""What every family of checkpoints asks of config.json before it makes a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn


def sizes(
    module: type[nn.Module],
    config: Mapping[str, Any],
    overrides: Iterable[str],
    keys: Mapping[str, str],
    needed: Iterable[str] = (),
) -> dict[str, Any]:
    """Attributes of `module` that a config must give, by the keys that it gives them under.

    Args:
      module: the Linen class.
      config: of config.json.
      overrides: names of attributes that the caller sets.
      keys: attribute to key; needed: further keys that must be there.

    Raises:
      ValueError: an override that is no attribute, or a missing key.
    """
    known = {field.name for field in dataclasses.fields(module)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"{module.__name__} has no attribute {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if missing := [key for key in (*keys.values(), *needed) if key not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    return {name: config[key] for name, key in keys.items()}
