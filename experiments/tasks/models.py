# SPDX-License-Identifier: Apache-2.0
"""From the `model` section of a config to a module of `layers/`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from adaptive import budgets, registry
from adaptive.rates.schedules import Schedule, Space, cost_of
from adaptive.sparsity.decoding import SinkWindow
from layers.cropr import Cropr
from layers.decoder_lm import DecoderLM
from layers.duo_lm import DuoLM
from layers.early_exit import SkipSchedule
from layers.hooks import Hook, Reduce
from layers.learned_rates import LearnedRates
from layers.mixture_of_depths import MixtureOfDepths
from layers.rotary import Llama3Scaling
from layers.t5 import T5
from layers.vit import ViT

# Tokens to remove at each layer: `schedule` as it stands, else `r` everywhere, ramped when `inflection` is not 0; or `counts`,
# the tokens left after each layer. `layered` holds hyper-parameters with one value a layer.
REDUCTION = {
    "method": "",
    "r": 0,
    "inflection": 0.0,
    "schedule": (),
    "counts": (),
    "layered": {},
    "clamp": False,
    "place": "between",
    "hyper": {},
}

# Reductions whose hook is a module with parameters.
LEARNED = {"cropr": Cropr}

# Learned rates of a ViT: share of the dense model's MACs to reach, the weight of that loss, patches between two
# candidates, the layers at both ends that stay whole, whom the price of tokens goes to; `start="uniform"` starts at
# the uniform schedule of the target, of whose removed tokens the share `start_pruned` is pruned ("": every number is
# as likely, as published). A section may also have the `order` in which tokens go; without it that is class
# attention, as published.
RATES = {
    "target": 0.6,
    "weight": 100.0,
    "granularity": 1,
    "first": 1,
    "last": 0,
    "price": "both",
    "start": "",
    "start_pruned": 0.5,
}

# Attributes that are set elsewhere: by the task, by Flax, or for training alone (`config.model.deletion`).
NOT_OF_A_SECTION = {
    "parent", "name", "hooks", "parts", "dtype", "param_dtype", "hard_probability", "score_excess", "feed_forward",
    "policy",
}  # fmt: skip


def reduction_section(**values: Any) -> dict[str, Any]:
    """The `reduction` section of a ViT's model config, with `values` in place of the defaults ("" is no reduction)."""
    check_keys("model.reduction", values, REDUCTION)
    return {**REDUCTION, **values}


def rates_section(**values: Any) -> dict[str, Any]:
    """The `rates` section of a ViT's model config, with `values` in place of the defaults."""
    check_keys("model.rates", values, RATES)
    return {**RATES, **values}


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


def reduce_hooks(
    reduction: Mapping[str, Any], *, layers: int, tokens: int, protected: int, num_classes: int = 0
) -> tuple[Hook, ...]:
    """The hook that a `reduction` section describes; none when its method is empty.

    The hyper-parameters of a learned one are attributes of its module, which also classifies images into `num_classes`.

    Raises:
      ValueError, KeyError: unknown keys or methods, or a schedule that the tokens do not allow.
    """
    check_keys("model.reduction", reduction, REDUCTION)
    settings = {**REDUCTION, **reduction}
    if not settings["method"]:
        return ()
    record = registry.describe(settings["method"])
    counts = _counts(settings, layers, tokens, protected, record.removes_half)
    hyper = dict(settings["hyper"])
    if record.name in LEARNED:
        return (LEARNED[record.name](counts, num_classes, place=settings["place"], **hyper),)
    layered = tuple(sorted((name, _plain(values)) for name, values in dict(settings["layered"]).items()))
    return (Reduce(record.name, counts, tuple(sorted(hyper.items())), settings["place"], layered),)


def _counts(settings: Mapping[str, Any], layers: int, tokens: int, protected: int, halving: bool) -> tuple[int, ...]:
    """Tokens after each layer: given, or from the tokens to remove."""
    if settings["counts"]:
        return Schedule.of_counts(settings["counts"]).check(layers, tokens).counts
    schedule = budgets.removal_schedule(_schedule(settings), layers)
    return budgets.token_counts(schedule, tokens, protected=protected, clamp=settings["clamp"], halving=halving)


def _schedule(settings: Mapping[str, Any]) -> Any:
    if settings["schedule"]:
        return tuple(settings["schedule"])
    return (settings["r"], float(settings["inflection"])) if settings["inflection"] else settings["r"]


def build_vit(
    section: Mapping[str, Any], *, image_size: int, channels: int, dtype: str, module: type[ViT] = ViT
) -> ViT:
    """The ViT of a model section, of the class `module`; `variant="B/16"` stands for a published shape.

    Raises:
      ValueError: unknown keys, or a reduction that does not fit.
    """
    attributes = _attributes(module, section, ("variant", "reduction", "rates", "image_size", "channels"))
    attributes |= dict(image_size=(image_size, image_size), channels=channels, dtype=jnp.dtype(dtype))
    variant = section.get("variant", "")
    model = module.named(variant, **attributes) if variant else module(**attributes)
    if "rates" in section:
        return model.clone(hooks=(_learned_rates(model, section),))
    return model.clone(hooks=with_reduction(model, section.get("reduction", {})).hooks)


def _learned_rates(model: ViT, section: Mapping[str, Any]) -> LearnedRates:
    """The hook of a `rates` section; `target` and `weight` are the task's."""
    if section.get("reduction", {}).get("method"):
        raise ValueError("config.model has both a reduction and rates; rates are learned alone, so set one of them")
    rates = {"order": "cls_attention", **RATES, **section["rates"]}
    check_keys("model.rates", rates, (*RATES, "order"))
    patches = model.num_tokens - model.has_class_token
    start = _start(model, rates)
    return LearnedRates(
        model.depth, patches, rates["granularity"], rates["first"], rates["last"], start, rates["order"]
    )


def _start(model: ViT, rates: Mapping[str, Any]) -> Schedule | None:
    """The schedule that rates start around."""
    if rates["start"] not in ("", "uniform"):
        raise ValueError(f"config.model.rates.start={rates['start']!r} is neither 'uniform' nor empty")
    if not rates["start"]:
        return None
    cost, whole = cost_of(model.spec()), (model.num_tokens,) * model.depth
    space = Space(
        model.depth, model.num_tokens, cost, rates["target"] * cost(whole), first=rates["first"], halving=True
    )
    return Schedule.split(space.linear(), model.num_tokens, rates["start_pruned"])


def with_reduction(model: ViT, reduction: Mapping[str, Any]) -> ViT:
    """The same ViT under another reduction; its parameters fit, and a learned reduction has more of its own."""
    protected = int(model.has_class_token)
    hooks = reduce_hooks(
        reduction, layers=model.depth, tokens=model.num_tokens, protected=protected, num_classes=model.num_classes
    )
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
    """The decoder of a model section, with its parts `rotary_scaling`, `routing`, `skip` and `reads`.

    `routing` holds the attributes of `layers.mixture_of_depths.MixtureOfDepths`, `skip` those of
    `layers.early_exit.SkipSchedule`, `reads` those of `adaptive.sparsity.decoding.SinkWindow`; a part whose first attribute is
    0 or empty is none.

    Raises:
      ValueError: unknown keys, and what those refuse.
    """
    parts = {"rotary_scaling": Llama3Scaling, "routing": MixtureOfDepths, "skip": SkipSchedule, "reads": SinkWindow}
    attributes = _attributes(DecoderLM, section, ("losses", "exit_losses", "skip_training", *parts))
    built = {name: _part(name, kind, dict(section.get(name, {}))) for name, kind in parts.items()}
    return DecoderLM(**attributes, policy=built.pop("skip"), **built, dtype=jnp.dtype(dtype))


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
