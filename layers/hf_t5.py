# SPDX-License-Identifier: Apache-2.0
"""Names and settings of T5 1.1, ByT5, mT5 and MrT5 checkpoints, for `layers.hf`. Reads no files.

`config.json` decides how the output head works, and the libraries that wrote it disagree on how:

- untied (`tie_word_embeddings` false; all published ByT5, mT5 and T5 1.1): `lm_head.weight`, logits unscaled;
- tied (true or absent in a T5): logits are `embedding . (x width**-0.5)`, and an `lm_head.weight` in the file must repeat
  the embedding;
- transformers 5 writes true for every model: there `scale_decoder_outputs` says whether logits are scaled, and an mT5 never
  scales. Unscaled logits from the embedding itself become an untied head that starts as its copy.

An MrT5 is a T5 with `deletion_type`: the gate stands at the start of encoder block `delete_gate_layer`, so that many layers
come before it. Its norm has epsilon 1e-6 whatever `layer_norm_epsilon` says. `use_softmax1` holds for all attention of
encoder and decoder. Hard deletion drops gate values at or below `deletion_threshold`; here that is always half of the scale,
as in all published runs. With `attention_mask=None` the public models attend to padding, where `T5` masks id 0.

Source: parameter names and settings of transformers 4.39 to 5.23, and of the public MrT5 code (Kallini et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax.numpy as jnp

from adaptive import registry
from adaptive.deletion import gate as deletion_gate
from layers.hf_config import sizes
from layers.hf_leaf import Leaf
from layers.t5 import T5

MODULE = T5
MODEL_TYPES = ("t5", "mt5", "mrt5")
ARCHITECTURES = {
    "T5ForConditionalGeneration": "t5",
    "T5Model": "t5",
    "T5EncoderModel": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "MT5Model": "mt5",
    "MT5EncoderModel": "mt5",
    "MrT5ForConditionalGeneration": "mrt5",
}

# Sizes that every config.json states, by attribute of T5.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "mlp_dim": "d_ff",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "encoder_layers": "num_layers",
}
# Settings with defaults, by attribute of T5.
_SETTINGS = {
    "num_buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
    "epsilon": ("layer_norm_epsilon", 1e-6),
    "dropout": ("dropout_rate", 0.1),
}
# Gates by `deletion_type`: the registered method, and its keyword arguments by their keys in config.json, with defaults.
_GATES = {
    "scaled_sigmoid": ("mrt5", {"gumbel": ("use_gumbel_noise", False)}),
    "random": ("random_deletion", {"rate": ("random_deletion_probability", 0.5)}),
    "fixed": ("fixed_deletion", {"rate": ("fixed_deletion_amount", 0.5)}),
}
_EMBEDDING = "shared.weight"
_HEAD = "lm_head.weight"
# Old conversions hold a bias that no cross-attention ever had.
_STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


# ---- From config.json to a module ------------------------------------------------------------------------------------


def build(config: Mapping[str, Any], **overrides: Any) -> T5:
    """The module that a config describes.

    Args:
      config: of config.json, with a known `model_type`.
      overrides: attributes of `T5`, in place of what the config says.

    Raises:
      ValueError: a setting that T5 cannot express, a missing size, or an override that is no attribute.
    """
    attributes = sizes(T5, config, overrides, _SIZES)
    _check_supported(config)
    attributes |= {name: config.get(key, default) for name, (key, default) in _SETTINGS.items()}
    attributes["softmax"] = "off_by_one" if config.get("use_softmax1") else "standard"
    attributes["decoder_layers"] = (
        0 if _encoder_only(config) else config.get("num_decoder_layers") or config["num_layers"]
    )
    attributes["tie_embeddings"] = _scaled(config)
    return T5(**(attributes | _gate(config) | overrides))


def _check_supported(config: Mapping[str, Any]) -> None:
    projection = config.get("feed_forward_proj", "gated-gelu" if config["model_type"] == "mt5" else "relu")
    if projection != "gated-gelu":
        raise ValueError(
            f"feed_forward_proj is {projection!r}; only 'gated-gelu' is supported: ByT5, mT5, T5 1.1 and Flan-T5, "
            "not the first T5 (relu)"
        )
    if config.get("has_absolute_position_embeddings"):
        raise ValueError("has_absolute_position_embeddings is true; only relative positions are supported")


def _encoder_only(config: Mapping[str, Any]) -> bool:
    return any(name.endswith("EncoderModel") for name in config.get("architectures") or ())


def _scaled(config: Mapping[str, Any]) -> bool:
    """Whether logits are scaled products with the embedding; see the head of this module."""
    if config["model_type"] == "mt5":
        return False
    return bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False))


def _gate(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("deletion_type")
    if kind is None:
        return {}
    if kind not in _GATES:
        raise ValueError(f"deletion_type is {kind!r}; supported: {', '.join(_GATES)}")
    if not config.get("gate_layer_norm", True):
        raise ValueError("gate_layer_norm is false; the delete gate here always has its norm")
    scale = float(config.get("sigmoid_mask_scale", -10.0))
    threshold = config.get("deletion_threshold")
    if threshold is not None and threshold != scale / 2:
        raise ValueError(
            f"deletion_threshold is {threshold}; hard deletion here has it at half of sigmoid_mask_scale, {scale / 2}. Set it "
            "to that value, or to null, in config.json to accept this"
        )
    method, keys = _GATES[kind]
    hyper = {name: config.get(key, default) for name, (key, default) in keys.items()}
    # False is the default of every switch, and then says nothing.
    hyper = {name: value for name, value in hyper.items() if value is not False} | {"scale": scale}
    return dict(gate=method, gate_layer=config.get("delete_gate_layer", 2), gate_hyper=tuple(sorted(hyper.items())))


# ---- From a module to config.json ------------------------------------------------------------------------------------


def describe(module: T5, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a module: what the module says, and from `config` all else.

    Raises:
      ValueError: the module has something that these checkpoints cannot express.
    """
    result = dict(config or {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0})
    result |= {key: getattr(module, name) for name, key in _SIZES.items()}
    result |= {key: getattr(module, name) for name, (key, _) in _SETTINGS.items()}
    result |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": module.decoder_layers > 0}
    if module.decoder_layers:
        result["num_decoder_layers"] = module.decoder_layers
    gated = module.gate not in (None, "no_deletion")
    family = "mrt5" if gated or module.softmax == "off_by_one" else _plain_type(module, config)
    result["model_type"] = family
    result["tie_word_embeddings"] = module.tie_embeddings
    if result.get("scale_decoder_outputs") not in (None, module.tie_embeddings):
        del result["scale_decoder_outputs"]
    if config.get("model_type") != family:
        # It names code for the family that this was.
        result.pop("auto_map", None)
    if family == "mrt5":
        result |= _describe_gate(module, gated)
    else:
        result = {key: value for key, value in result.items() if key not in _GATE_KEYS}
    return result | {"architectures": [_architecture(module, family)]}


_GATE_KEYS = (
    "deletion_type",
    "delete_gate_layer",
    "deletion_threshold",
    "sigmoid_mask_scale",
    "gate_layer_norm",
    "use_softmax1",
    "use_gumbel_noise",
    "random_deletion_probability",
    "fixed_deletion_amount",
    "has_absolute_position_embeddings",
)


def _plain_type(module: T5, config: Mapping[str, Any]) -> str:
    # An mT5 never scales its logits, so a tied module is a T5.
    return "mt5" if config.get("model_type") == "mt5" and not module.tie_embeddings else "t5"


def _architecture(module: T5, family: str) -> str:
    head = {"t5": "T5", "mt5": "MT5", "mrt5": "MrT5"}[family]
    if module.decoder_layers:
        return f"{head}ForConditionalGeneration"
    if family == "mrt5":
        raise ValueError("an MrT5 checkpoint has a decoder; this module has decoder_layers=0")
    return f"{head}EncoderModel"


def _describe_gate(module: T5, gated: bool) -> dict[str, Any]:
    common = {"use_softmax1": module.softmax == "off_by_one", "has_absolute_position_embeddings": False}
    if not gated:
        # The public code makes a gate at the block of this index, so there is none.
        return common | {"deletion_type": None, "delete_gate_layer": -1}
    kind = next((kind for kind, (method, _) in _GATES.items() if method == module.gate), None)
    if kind is None:
        raise ValueError(f"gate={module.gate!r} has no form in an MrT5 checkpoint; those with one: {_methods()}")
    if module.gate_layer == module.encoder_layers:
        raise ValueError(
            f"gate_layer={module.gate_layer} is after the last encoder layer; an MrT5 needs a layer behind it"
        )
    hyper = dict(module.gate_hyper)
    scale = float(hyper.pop("scale", deletion_gate.SCALE))
    keys = _GATES[kind][1]
    if unknown := sorted(set(hyper) - set(keys)):
        raise ValueError(f"gate_hyper {', '.join(unknown)} of {module.gate!r} has no form in an MrT5 checkpoint")
    return common | {
        "deletion_type": kind,
        "delete_gate_layer": module.gate_layer,
        "sigmoid_mask_scale": scale,
        "deletion_threshold": scale / 2,
        "gate_layer_norm": True,
        **{key: hyper.get(name, default) for name, (key, default) in keys.items()},
    }


def _methods() -> str:
    return ", ".join(method for method, _ in _GATES.values())


# ---- Names -----------------------------------------------------------------------------------------------------------


def leaves(module: T5, config: Mapping[str, Any], tensors: Set[str] | None = None) -> list[Leaf]:
    """Every parameter of the module that a checkpoint with this config has.

    Args:
      module: parameters that only an override gave it, such as a gate, are not in the result.
      config: of config.json.
      tensors: names in the checkpoint; an untied head that is not among them is the embedding's copy. None to write one.
    """
    found = [
        Leaf("embedding/embedding", (_EMBEDDING,)),
        Leaf("encoder_bias/embedding", (_relative_bias("encoder"),)),
        Leaf("encoder_norm/scale", ("encoder.final_layer_norm.weight",)),
    ]
    for prefix, blocks, stacked in _stacks(module, "encoder"):
        found += _attention(prefix, "attention", "encoder", blocks, stacked, "0", "SelfAttention")
        found += _mlp(prefix, "encoder", blocks, stacked, "1")
    if _learned(module) and config.get("deletion_type") == "scaled_sigmoid":
        gate = f"encoder.block.{module.gate_layer}.delete_gate"
        found += [
            Leaf("delete_gate/norm/scale", (f"{gate}.layer_norm.weight",)),
            Leaf("delete_gate/logit/kernel", (f"{gate}.feed_forward.weight",), inputs=1),
            Leaf("delete_gate/logit/bias", (f"{gate}.feed_forward.bias",)),
        ]
    if not module.decoder_layers:
        return found
    found += [
        Leaf("decoder_bias/embedding", (_relative_bias("decoder"),)),
        Leaf("decoder_norm/scale", ("decoder.final_layer_norm.weight",)),
    ]
    if not module.tie_embeddings:
        source = _HEAD if tensors is None or _HEAD in tensors else _EMBEDDING
        found.append(Leaf("head/kernel", (source,), inputs=1))
    for prefix, blocks, stacked in _stacks(module, "decoder"):
        found += _attention(prefix, "attention", "decoder", blocks, stacked, "0", "SelfAttention")
        found += _attention(prefix, "cross_attention", "decoder", blocks, stacked, "1", "EncDecAttention")
        found += _mlp(prefix, "decoder", blocks, stacked, "2")
    return found


def _learned(module: T5) -> bool:
    return module.gate is not None and "gate_logits" in registry.describe(module.gate).signals


def aliases(module: T5) -> dict[str, str]:
    """Tensors that a checkpoint may hold beside the one that they repeat, or in its place."""
    names = ["encoder.embed_tokens.weight"]
    if module.decoder_layers:
        names += ["decoder.embed_tokens.weight", *([_HEAD] if module.tie_embeddings else [])]
    return dict.fromkeys(names, _EMBEDDING)


def skipped(module: T5, config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is left out on purpose: the decoder for an encoder, the gate for a module made without it."""
    if name == _STRAY:
        return True
    if not module.decoder_layers and (name.startswith("decoder.") or name == _HEAD):
        return True
    return config.get("deletion_type") is not None and not _learned(module) and ".delete_gate." in name


def init(module: T5, key: Any) -> Any:
    """Boxed variables of the module, for the shapes of its parameters and for those that a checkpoint does not have."""
    ids = jnp.zeros((1, 2), jnp.int32)
    keys = {"params": key, "deletion": key, "reduction": key, "dropout": key}
    return module.init(keys, ids, None, ids if module.decoder_layers else None)


def _relative_bias(side: str) -> str:
    return f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _stacks(module: T5, side: str) -> Iterator[tuple[str, range, bool]]:
    """`(path prefix, blocks, stacked)` of each module that holds the layers of one side."""
    count = module.encoder_layers if side == "encoder" else module.decoder_layers
    if not module.scan_layers:
        yield from ((f"{side}_{index}", range(index, index + 1), False) for index in range(count))
        return
    split = module.gate_layer if side == "encoder" and module.gate else 0
    stacks = {"lower": range(split), "upper": range(split, count)} if side == "encoder" else {"decoder": range(count)}
    yield from ((f"{name}_stack/layer", blocks, True) for name, blocks in stacks.items() if blocks)


def _attention(
    prefix: str, name: str, side: str, blocks: range, stacked: bool, sublayer: str, hf_name: str
) -> Iterator[Leaf]:
    norm = {"attention": "attention_norm", "cross_attention": "cross_norm"}[name]
    yield _leaf(f"{prefix}/{norm}/scale", side, blocks, stacked, f"{sublayer}.layer_norm")
    for own, theirs, inputs in (("query", "q", 1), ("key", "k", 1), ("value", "v", 1), ("out", "o", 2)):
        path = f"{prefix}/{name}/{own}/kernel"
        yield _leaf(path, side, blocks, stacked, f"{sublayer}.{hf_name}.{theirs}", inputs)


def _mlp(prefix: str, side: str, blocks: range, stacked: bool, sublayer: str) -> Iterator[Leaf]:
    yield _leaf(f"{prefix}/mlp_norm/scale", side, blocks, stacked, f"{sublayer}.layer_norm")
    for own, theirs in (("gate", "wi_0"), ("hidden", "wi_1"), ("out", "wo")):
        yield _leaf(f"{prefix}/mlp/{own}/kernel", side, blocks, stacked, f"{sublayer}.DenseReluDense.{theirs}", 1)


def _leaf(path: str, side: str, blocks: range, stacked: bool, name: str, inputs: int = 0) -> Leaf:
    names = tuple(f"{side}.block.{block}.layer.{name}.weight" for block in blocks)
    return Leaf(path, names, inputs, stacked)
