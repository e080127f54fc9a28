# SPDX-License-Identifier: Apache-2.0
"""From the `model` section of a config to a module of `layers/`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from adaptive import budgets, registry
from layers.decoder_lm import DecoderLM
from layers.duo_lm import DuoLM
from layers.early_exit import SkipSchedule
from layers.hooks import Reduce
from layers.mixture_of_depths import MixtureOfDepths
from layers.rotary import Llama3Scaling
from layers.t5 import T5
from layers.vit import ViT

# Tokens to remove at each layer: `schedule` as it stands, else `r` everywhere, ramped when `inflection` is not 0.
REDUCTION = {
    "method": "",
    "r": 0,
    "inflection": 0.0,
    "schedule": (),
    "clamp": False,
    "place": "between",
    "hyper": {},
}


# Attributes that are set elsewhere: by the task, by Flax, or for training alone (`config.model.deletion`).
NOT_OF_A_SECTION = {
    "parent", "name", "hooks", "dtype", "param_dtype", "hard_probability", "score_excess", "feed_forward",
    "policy",
}  # fmt: skip


def reduction_section(**values: Any) -> dict[str, Any]:
    """The `reduction` section of a ViT's model config, with `values` in place of the defaults ("" is no reduction)."""
    check_keys("model.reduction", values, REDUCTION)
    return {**REDUCTION, **values}


def check_keys(section: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for a key of `given` that is not known, with the nearest known ones."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}."
            raise ValueError(f"config.{section}.{key} does not exist; {hint}")


def _plain(value: Any) -> Any:
    """Lists and mappings of a config as the hashable values that modules take."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _attributes(module: type, section: Mapping[str, Any], taken: Iterable[str]) -> dict[str, Any]:
    """The entries of a model section that are attributes of the module.

    Raises:
      ValueError: an entry is neither an attribute nor in `taken`.
    """
    fields = {field.name for field in dataclasses.fields(module)} - NOT_OF_A_SECTION
    taken = set(taken)
    check_keys("model", section, fields | taken)
    return {key: _plain(value) for key, value in section.items() if key not in taken}


def reduce_hooks(reduction: Mapping[str, Any], *, layers: int, tokens: int, protected: int) -> tuple[Reduce, ...]:
    """The hook that a `reduction` section describes; none when its method is empty.

    Raises:
      ValueError, KeyError: unknown keys or methods, or a schedule that the tokens do not allow.
    """
    check_keys("model.reduction", reduction, REDUCTION)
    settings = {**REDUCTION, **reduction}
    if not settings["method"]:
        return ()
    record = registry.describe(settings["method"])
    schedule = budgets.removal_schedule(_schedule(settings), layers)
    counts = budgets.token_counts(
        schedule, tokens, protected=protected, clamp=settings["clamp"], halving=record.removes_half
    )
    return (Reduce(record.name, counts, tuple(sorted(dict(settings["hyper"]).items())), settings["place"]),)


def _schedule(settings: Mapping[str, Any]) -> Any:
    if settings["schedule"]:
        return tuple(settings["schedule"])
    return (settings["r"], float(settings["inflection"])) if settings["inflection"] else settings["r"]


def build_vit(section: Mapping[str, Any], *, image_size: int, channels: int, dtype: str) -> ViT:
    """The ViT of a model section; `variant="B/16"` stands for a published shape.

    Raises:
      ValueError: unknown keys, or a reduction that does not fit.
    """
    attributes = _attributes(ViT, section, ("variant", "reduction", "image_size", "channels"))
    attributes |= dict(image_size=(image_size, image_size), channels=channels, dtype=jnp.dtype(dtype))
    variant = section.get("variant", "")
    model = ViT.named(variant, **attributes) if variant else ViT(**attributes)
    return model.clone(hooks=with_reduction(model, section.get("reduction", {})).hooks)


def with_reduction(model: ViT, reduction: Mapping[str, Any]) -> ViT:
    """The same ViT under another reduction; its parameters fit, since reductions of the registry have none."""
    hooks = reduce_hooks(reduction, layers=model.depth, tokens=model.num_tokens, protected=int(model.has_class_token))
    return model.clone(hooks=hooks)


def build_t5(section: Mapping[str, Any], *, dtype: str) -> T5:
    """The T5 of a model section; `gate=""` and `chunker=""` are none, and empty `rungs` no ladder.

    Raises:
      ValueError: unknown keys.
    """
    attributes = _attributes(T5, section, ("deletion", "chunking"))
    for name in ("gate", "chunker", "rungs"):
        attributes[name] = attributes.get(name) or None
    for name in ("gate_hyper", "chunk_hyper"):
        attributes[name] = tuple(sorted(dict(section.get(name, {})).items()))
    return T5(**attributes, dtype=jnp.dtype(dtype))


def build_duo_lm(section: Mapping[str, Any], *, dtype: str) -> DuoLM:
    """The `DuoLM` of a model section; its entry `duo` is the task's.

    Raises:
      ValueError: unknown keys.
    """
    return DuoLM(**_attributes(DuoLM, section, ("duo",)), dtype=jnp.dtype(dtype))


def build_decoder(section: Mapping[str, Any], *, dtype: str) -> DecoderLM:
    """The decoder of a model section, with its parts `rotary_scaling`, `routing` and `skip`.

    `routing` holds the attributes of `layers.mixture_of_depths.MixtureOfDepths`, `skip` those of
    `layers.early_exit.SkipSchedule`; a part whose first attribute is 0 or empty is none.

    Raises:
      ValueError: unknown keys, and what those refuse.
    """
    parts = {"rotary_scaling": Llama3Scaling, "routing": MixtureOfDepths, "skip": SkipSchedule}
    attributes = _attributes(DecoderLM, section, ("losses", "exit_losses", "skip_training", *parts))
    built = {name: _part(name, kind, dict(section.get(name, {}))) for name, kind in parts.items()}
    attributes |= dict(rotary_scaling=built["rotary_scaling"], routing=built["routing"], policy=built["skip"])
    return DecoderLM(**attributes, dtype=jnp.dtype(dtype))


def routing_section(**values: Any) -> dict[str, Any]:
    """The `routing` section of a decoder's model config, with `values` in place of the defaults (a share of 0 is none)."""
    defaults = {field.name: field.default for field in dataclasses.fields(MixtureOfDepths)} | {"share": 0.0}
    check_keys("model.routing", values, defaults)
    return {**defaults, **values}


def _part(name: str, kind: type, section: Mapping[str, Any]) -> Any:
    """`kind` with the values of a section, or None where its first attribute is 0, empty or not there."""
    fields = [field.name for field in dataclasses.fields(kind)]
    check_keys(f"model.{name}", section, fields)
    if not section.get(fields[0]):
        return None
    return kind(**{key: _plain(value) for key, value in section.items()})
