# SPDX-License-Identifier: Apache-2.0
"""Names and settings of ViT, DeiT and ViT-MAE checkpoints, for `layers.hf`. Reads no files.

- "vit" (`google/vit-*`, AugReg weights among them, and `facebook/deit-*` without a distillation token): a classifier of the
  class token, or, as `ViTModel`, the tanh pooler of the in21k models, whose output are the features;
- "deit" (`facebook/deit-*-distilled-*`): a distillation token in slot 1 with a classifier of its own;
- "vit_mae" (`facebook/vit-mae-*`): the encoder with its fixed positions as they are stored, without the masking; the decoder is
  left out. A classifier starts anew: `hf.load(directory, num_classes=10, pool="mean")`.

`num_classes` other than that of the checkpoint leaves its classifier out, and the new one starts from its initialiser.
Dropout of attention weights is not applied in training. Images are `[B, height, width, c]` here.

Source: parameter names and settings of transformers 4.39 to 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax.numpy as jnp

from layers.hf_config import sizes
from layers.hf_leaf import Leaf, PatchLeaf
from layers.vit import ViT

MODULE = ViT
MODEL_TYPES = ("vit", "deit", "vit_mae")
_TEACHER = "DeiTForImageClassificationWithTeacher"
ARCHITECTURES = {
    "ViTForImageClassification": "vit",
    "ViTModel": "vit",
    _TEACHER: "deit",
    "ViTMAEForPreTraining": "vit_mae",
    "ViTMAEModel": "vit_mae",
}
# What stands before the names of the backbone's tensors.
_PREFIXES = {"ViTForImageClassification": "vit.", _TEACHER: "deit.", "ViTMAEForPreTraining": "vit."}
_SIZES = {
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
# Settings with defaults, by attribute of ViT.
_SETTINGS = {
    "channels": ("num_channels", 3),
    "norm_epsilon": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.0),
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
_HEADS = {"head": "classifier", "distillation_head": "distillation_classifier"}


# ---- From config.json to a module ------------------------------------------------------------------------------------


def build(config: Mapping[str, Any], **overrides: Any) -> ViT:
    """The module that a config describes.

    Args:
      config: of config.json, with a known `model_type`.
      overrides: attributes of `ViT`, in place of what the config says.

    Raises:
      ValueError: a setting that ViT cannot express, a missing size, or an override that is no attribute.
    """
    attributes = sizes(ViT, config, overrides, _SIZES, ("image_size",))
    architecture = _architecture(config)
    attributes |= {name: config.get(key, default) for name, (key, default) in _SETTINGS.items()}
    attributes |= {
        "patch_size": _side(config["patch_size"]),
        "image_size": _pair(config["image_size"]),
        "activation": _activation(config),
        "num_classes": _classes(config) if "Classification" in architecture else 0,
        "representation": _pooler_width(config) if architecture == "ViTModel" else None,
        "distillation_token": architecture == _TEACHER,
        "class_token": True,
    }
    return ViT(**(attributes | overrides))


def _architecture(config: Mapping[str, Any]) -> str:
    """The first known architecture that the config names; where it names none, that of the published checkpoints."""
    usual = {"vit": "ViTForImageClassification", "deit": _TEACHER, "vit_mae": "ViTMAEForPreTraining"}
    named = [name for name in config.get("architectures") or () if name in ARCHITECTURES]
    return named[0] if named else usual[config["model_type"]]


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_act", "gelu")
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    if not config.get("qkv_bias", True):
        raise ValueError("qkv_bias is false; attention here has a bias in all of its projections or in none")
    if config.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act is {config['pooler_act']!r}; only 'tanh' is supported")
    return _ACTIVATIONS[name]


def _side(size: Any) -> int:
    height, width = _pair(size)
    if height != width:
        raise ValueError(f"patch_size is {size}; only square patches are supported")
    return height


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _classes(config: Mapping[str, Any]) -> int:
    """Number of classes; transformers has two where a config does not say."""
    return len(config.get("id2label") or ()) or config.get("num_labels") or 2


def _pooler_width(config: Mapping[str, Any]) -> int:
    return config.get("pooler_output_size") or config["hidden_size"]


# ---- From a module to config.json ------------------------------------------------------------------------------------


def describe(module: ViT, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a module: what the module says, and from `config` all else.

    Raises:
      ValueError: the module has something that these checkpoints cannot express.
    """
    _check_expressible(module)
    height, width = module.image_size
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == module.activation)
    if _ACTIVATIONS.get(config.get("hidden_act", "gelu")) == module.activation:
        activation = config.get("hidden_act", "gelu")
    result = dict(config)
    result |= {key: getattr(module, name) for name, key in _SIZES.items()}
    result |= {key: getattr(module, name) for name, (key, _) in _SETTINGS.items()}
    result |= {"image_size": height if height == width else [height, width], "hidden_act": activation, "qkv_bias": True}
    architecture = _written_architecture(module, config)
    if module.num_classes and module.num_classes != _classes(config):
        result["id2label"] = {str(index): f"LABEL_{index}" for index in range(module.num_classes)}
        result["label2id"] = {label: int(index) for index, label in result["id2label"].items()}
    if module.representation is not None and module.representation != module.width:
        result["pooler_output_size"] = module.representation
    return result | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]}


def _check_expressible(module: ViT) -> None:
    wrong = {
        f"pool={module.pool!r} with classes": module.pool != "cls" and module.num_classes > 0,
        f"positions={module.positions!r}": module.positions != "learned",
        f"stem={module.stem}": bool(module.stem),
        "no class token": not module.has_class_token,
        f"representation={module.representation} with classes": module.representation is not None
        and module.num_classes > 0,
    }
    if found := [what for what, there in wrong.items() if there]:
        raise ValueError(f"a ViT, DeiT or ViT-MAE checkpoint cannot express {', '.join(found)}")


def _written_architecture(module: ViT, config: Mapping[str, Any]) -> str:
    if module.distillation_token:
        return _TEACHER
    if module.num_classes:
        return "ViTForImageClassification"
    return "ViTMAEModel" if config.get("model_type") == "vit_mae" and module.representation is None else "ViTModel"


# ---- Names -----------------------------------------------------------------------------------------------------------


def leaves(module: ViT, config: Mapping[str, Any], tensors: Set[str] | None = None) -> list[Leaf]:
    """Where each parameter lies in a checkpoint with this config; a classifier that is new has no place.

    Args:
      module, config: as from `build`, or as `describe` takes and gives them.
      tensors: names in the checkpoint; no name depends on them.
    """
    del tensors
    architecture = _architecture(config)
    prefix = _PREFIXES.get(architecture, "")
    embeddings = f"{prefix}embeddings"
    convolution = f"{embeddings}.patch_embeddings.projection"
    found = [
        PatchLeaf("patch_embed/projection/kernel", (f"{convolution}.weight",), size=module.patch_size),
        Leaf("patch_embed/projection/bias", (f"{convolution}.bias",)),
        *_norm("final_norm", (f"{prefix}layernorm",)),
    ]
    # A module without one of these has no room for its tensor, which is then reported.
    if module.has_class_token:
        found.append(Leaf("class_token", (f"{embeddings}.cls_token",), ones=2))
    if module.positions == "learned":
        found.append(Leaf("positions/embedding", (f"{embeddings}.position_embeddings",), ones=1))
    if module.distillation_token:
        found.append(Leaf("distillation_token", (f"{embeddings}.distillation_token",), ones=2))
    if module.representation is not None and architecture == "ViTModel":
        found += _linear("representation", ("pooler.dense",))
    if "Classification" in architecture and module.num_classes == _classes(config):
        for name in ("head", "distillation_head")[: 1 + module.distillation_token]:
            found += _linear(name, (_head(name, architecture),))
    for path, blocks in _blocks(module):
        layers = tuple(f"{prefix}encoder.layer.{block}." for block in blocks)
        found += _block(path, layers, module.scan_layers)
    return found


def aliases(module: ViT) -> dict[str, str]:
    """No tensor of these checkpoints repeats another."""
    del module
    return {}


def skipped(module: ViT, config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is left out on purpose: MAE's decoder, a pooler or a classifier that the module is made without."""
    architecture = _architecture(config)
    if name.startswith("decoder."):
        return ARCHITECTURES[architecture] == "vit_mae"
    if "pooler.dense." in name:
        return module.representation is None
    own = {_head(head, architecture) for head in _HEADS}
    return name.rpartition(".")[0] in own and module.num_classes != _classes(config)


def init(module: ViT, key: Any) -> Any:
    """Boxed variables of the module, for the shapes of its parameters and for those that a checkpoint does not have."""
    image = jnp.zeros((1, *module.image_size, module.channels), jnp.float32)
    return module.init({"params": key, "reduction": key, "dropout": key}, image)


def _head(name: str, architecture: str) -> str:
    return "cls_classifier" if name == "head" and architecture == _TEACHER else _HEADS[name]


def _blocks(module: ViT) -> Iterator[tuple[str, range]]:
    """`(path, layers)` of each module that holds blocks."""
    if module.scan_layers:
        yield "blocks", range(module.depth)
        return
    yield from ((f"block_{index}", range(index, index + 1)) for index in range(module.depth))


def _block(path: str, layers: tuple[str, ...], stacked: bool) -> Iterator[Leaf]:
    """The leaves of one block, or of all of them stacked."""

    def named(name: str) -> tuple[str, ...]:
        return tuple(layer + name for layer in layers)

    yield from _norm(f"{path}/attention_norm", named("layernorm_before"), stacked)
    yield from _norm(f"{path}/mlp_norm", named("layernorm_after"), stacked)
    for name in ("query", "key", "value"):
        yield from _linear(f"{path}/attention/{name}", named(f"attention.attention.{name}"), stacked, outputs=2)
    yield from _linear(f"{path}/attention/out", named("attention.output.dense"), stacked, inputs=2)
    yield from _linear(f"{path}/mlp/hidden", named("intermediate.dense"), stacked)
    yield from _linear(f"{path}/mlp/out", named("output.dense"), stacked)


def _norm(path: str, names: tuple[str, ...], stacked: bool = False) -> Iterator[Leaf]:
    yield Leaf(f"{path}/scale", tuple(f"{name}.weight" for name in names), stacked=stacked)
    yield Leaf(f"{path}/bias", tuple(f"{name}.bias" for name in names), stacked=stacked)


def _linear(
    path: str, names: tuple[str, ...], stacked: bool = False, *, inputs: int = 1, outputs: int = 1
) -> Iterator[Leaf]:
    yield Leaf(f"{path}/kernel", tuple(f"{name}.weight" for name in names), inputs, stacked)
    yield Leaf(f"{path}/bias", tuple(f"{name}.bias" for name in names), stacked=stacked, flat=outputs > 1)
