# SPDX-License-Identifier: Apache-2.0
"""Llama and Qwen2 checkpoints of Hugging Face: their names, and the settings that `DecoderLM` can express.

Sliding windows, biases outside of Qwen2's queries, keys and values, and stretched positions other than Llama 3's are refused.

Source: parameter names and settings of transformers 4.39 to 5.23, which moved `rope_theta` and `rope_scaling` into
`rope_parameters`; both forms are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax.numpy as jnp

from layers.decoder_lm import DecoderLM
from layers.hf_config import sizes
from layers.hf_leaf import Leaf
from layers.rotary import Llama3Scaling

MODULE = DecoderLM
MODEL_TYPES = ("llama", "qwen2")
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

# Sizes that every config.json states, by attribute of DecoderLM.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "heads": "num_attention_heads",
    "depth": "num_hidden_layers",
}
_SCALING = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# Old conversions hold the frequencies of the rotation, which follow from the config.
_FREQUENCIES = "rotary_emb.inv_freq"


# ---- From config.json to a module ------------------------------------------------------------------------------------


def build(config: Mapping[str, Any], **overrides: Any) -> DecoderLM:
    """The module that a config describes.

    Args:
      config: of config.json, with a known `model_type`.
      overrides: attributes of `DecoderLM`, in place of what the config says.

    Raises:
      ValueError: a setting that DecoderLM cannot express, a missing size, or an override that is no attribute.
    """
    attributes = sizes(DecoderLM, config, overrides, _SIZES)
    _check_supported(config)
    rope = _rope(config)
    attributes |= {
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": config["model_type"] == "qwen2",
        "rotary_base": float(rope.get("rope_theta", 10_000.0)),
        "rotary_scaling": _scaling(rope),
    }
    return DecoderLM(**(attributes | overrides))


def _check_supported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act is {activation!r}; only 'silu' is supported")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise ValueError(f"{key} is {config[key]!r}; only false is supported")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of rotation, in the form of `rope_parameters`."""
    old = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return old | dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})


def _scaling(rope: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"the rope_type is {kind!r}; supported: 'default', 'llama3'")
    if missing := [key for key in _SCALING.values() if key not in rope]:
        raise ValueError(f"the rope_type 'llama3' lacks {', '.join(missing)}")
    return Llama3Scaling(**{name: rope[key] for name, key in _SCALING.items()})


# ---- From a module to config.json ------------------------------------------------------------------------------------


def describe(module: DecoderLM, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a module: what the module says, and from `config` all else.

    Raises:
      ValueError: the module has something that these checkpoints cannot express.
    """
    for name in ("feed_forward", "routing", "exit_classifier"):
        if getattr(module, name):
            raise ValueError(f"{name}={getattr(module, name)!r} has no form in a Llama or Qwen2 checkpoint")
    if module.activation != "silu":
        raise ValueError(f"activation={module.activation!r} has no form in these checkpoints; only 'silu'")
    kind = "qwen2" if module.qkv_bias else "llama"
    result = dict(config)
    result |= {key: getattr(module, name) for name, key in _SIZES.items()}
    result |= {
        "num_key_value_heads": module.kv_heads or module.heads,
        "head_dim": module.head_dim or module.width // module.heads,
        "rms_norm_eps": module.epsilon,
        "tie_word_embeddings": module.tie_embeddings,
        "hidden_act": "silu",
        "model_type": kind,
        "architectures": [next(name for name, own in ARCHITECTURES.items() if own == kind)],
    }
    return result | _describe_rope(module, "rope_parameters" in config)


def _describe_rope(module: DecoderLM, as_parameters: bool) -> dict[str, Any]:
    """In the form that the config had, or else in the old one, which all readers know."""
    scaling = None
    if module.rotary_scaling is not None:
        scaling = {key: getattr(module.rotary_scaling, name) for name, key in _SCALING.items()}
        scaling["rope_type"] = "llama3"
    if as_parameters:
        return {"rope_parameters": {"rope_theta": module.rotary_base, **(scaling or {"rope_type": "default"})}}
    return {"rope_theta": module.rotary_base, "rope_scaling": scaling}


# ---- Names -----------------------------------------------------------------------------------------------------------


def leaves(module: DecoderLM, config: Mapping[str, Any], tensors: Set[str] | None = None) -> list[Leaf]:
    """Every parameter of the module that a checkpoint has; `config` and `tensors` make no difference."""
    del config, tensors
    found = [Leaf("embedding/embedding", (_EMBEDDING,)), Leaf("norm/scale", ("model.norm.weight",))]
    if not module.tie_embeddings:
        found.append(Leaf("head/kernel", (_HEAD,), inputs=1))
    for layer in range(module.depth):
        found += _block(f"block_{layer}", f"model.layers.{layer}", module.qkv_bias)
    return found


def _block(own: str, theirs: str, qkv_bias: bool) -> Iterator[Leaf]:
    yield Leaf(f"{own}/attention_norm/scale", (f"{theirs}.input_layernorm.weight",))
    yield Leaf(f"{own}/mlp_norm/scale", (f"{theirs}.post_attention_layernorm.weight",))
    for name, letter, inputs in (("query", "q", 1), ("key", "k", 1), ("value", "v", 1), ("out", "o", 2)):
        projection = f"{theirs}.self_attn.{letter}_proj"
        yield Leaf(f"{own}/attention/{name}/kernel", (f"{projection}.weight",), inputs=inputs)
        if qkv_bias and name != "out":
            yield Leaf(f"{own}/attention/{name}/bias", (f"{projection}.bias",), flat=True)
    for name, letter in (("gate", "gate"), ("hidden", "up"), ("out", "down")):
        yield Leaf(f"{own}/mlp/{name}/kernel", (f"{theirs}.mlp.{letter}_proj.weight",), inputs=1)


def aliases(module: DecoderLM) -> dict[str, str]:
    """A tied head, which a checkpoint may hold beside the embedding that it repeats, or in its place."""
    return {_HEAD: _EMBEDDING} if module.tie_embeddings else {}


def skipped(module: DecoderLM, config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is left out on purpose: frequencies of the rotation, and layers above a smaller `depth`."""
    if name.endswith(_FREQUENCIES):
        return True
    first, _, rest = name.removeprefix("model.layers.").partition(".")
    return bool(rest) and first.isdigit() and module.depth <= int(first) < config["num_hidden_layers"]


def init(module: DecoderLM, key: Any) -> Any:
    """Boxed variables of the module, for the shapes of its parameters and for those that a checkpoint does not have."""
    return module.init(key, jnp.zeros((1, 2), jnp.int32))
