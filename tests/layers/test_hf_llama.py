# SPDX-License-Identifier: Apache-2.0
"""Llama and Qwen2 checkpoints: outputs of the library that wrote them, cached decoding, the way back, and what is refused.

The checkpoints under tests/data/hf_llama are written by tests/make_hf_references.py.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers import generation, hf
from layers.decoder_lm import DecoderLM
from layers.mixture_of_depths import MixtureOfDepths
from layers.rotary import Llama3Scaling

DATA = pathlib.Path(__file__).parents[1] / "data" / "hf_llama"
NAMES = sorted(folder.name for folder in DATA.iterdir())


def references(name):
    """`(input_ids, attention_mask as bool, logits)`."""
    arrays = np.load(DATA / name / "references.npz")
    return jnp.asarray(arrays["input_ids"]), arrays["attention_mask"] == 1, arrays["logits"]


@functools.cache
def loaded(name):
    return hf.load(DATA / name)


def tensors_of(folder):
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def altered(folder, name, *, remove=(), tensors=None, **settings):
    """A copy of a stored checkpoint as one file, with other tensors and settings."""
    config = json.loads((DATA / name / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    kept = {key: array for key, array in tensors_of(DATA / name).items() if key not in remove}
    save_file({**kept, **(tensors or {})}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_library_with_padding_on_either_side(name):
    module, variables, config = loaded(name)
    assert (module.qkv_bias, module.tie_embeddings) == (config["model_type"] == "qwen2", "tied" in name)
    assert (module.rotary_scaling is not None) == ("scaled" in name)
    ids, mask, expected = references(name)
    apply = jax.jit(module.apply)
    logits, _ = apply(variables, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-4, rtol=0)
    logits, _ = apply(variables, _to_left(ids, mask), mask[:, ::-1])
    np.testing.assert_allclose(logits[mask[:, ::-1]], expected[mask], atol=1e-4, rtol=0)


def _to_left(ids, mask):
    """Rows with their real tokens first, in order."""
    return jnp.take_along_axis(ids, jnp.asarray(np.argsort(~mask, axis=1, kind="stable")), axis=1)


@pytest.mark.parametrize("name", ["llama_scaled_tied", "qwen2_small"])
def test_cached_decoding_gives_the_logits_of_the_library(name):
    module, variables, _ = loaded(name)
    ids, mask, expected = references(name)
    # The prompt of the longest row, then its other tokens one by one; of the shorter rows nothing comes before them.
    cache, first = generation.prefill(module, 5, variables, ids[:2, :4], jnp.asarray(mask[:2, :4]))
    step = jax.jit(functools.partial(module.apply, method="decode_step"))
    found = []
    for position in range(4):
        logits, cache = step(variables, cache, first, jnp.int32(position))
        found.append(logits[0])
        first = ids[:2, min(4 + position, 6)]
    np.testing.assert_allclose(jnp.stack(found), expected[0, 3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_saving_gives_the_same_tensors_and_settings(name, tmp_path):
    module, variables, config = hf.load(
        DATA / name, dtype={"llama_scaled_tied": jnp.float16, "qwen2_small": jnp.bfloat16}.get(name, jnp.float32)
    )
    described = hf.save(tmp_path / "out", module, variables, config, shard_bytes=4_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    want, found = tensors_of(DATA / name), tensors_of(tmp_path / "out")
    assert want.keys() == found.keys()
    for key, tensor in want.items():
        assert tensor.dtype == found[key].dtype
        np.testing.assert_array_equal(tensor.view(np.uint8), found[key].view(np.uint8), err_msg=key)
    assert {key: described[key] for key in config} == config


def test_a_new_model_has_a_checkpoint_and_comes_back(tmp_path):
    scaling = Llama3Scaling(2.0, 1.0, 8.0, 32)
    module = DecoderLM(11, 8, 1, 2, 12, kv_heads=1, rotary_scaling=scaling, rotary_base=77.0)
    ids = jnp.ones((1, 3), jnp.int32)
    variables = module.init(jax.random.key(0), ids)
    hf.save(tmp_path / "new", module, variables)
    again, found, config = hf.load(tmp_path / "new")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert again == module.clone(head_dim=4, parent=None)
    np.testing.assert_array_equal(again.apply(found, ids)[0], module.apply(variables, ids)[0])


def test_both_forms_of_the_rotation_settings_are_one_model(tmp_path):
    config = json.loads((DATA / "llama_scaled_tied" / "config.json").read_text())
    parameters = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    shutil.copytree(DATA / "llama_scaled_tied", tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"rope_parameters": parameters}))
    module, _, new = hf.load(tmp_path / "new")
    assert module == loaded("llama_scaled_tied")[0]
    written = hf.save(tmp_path / "out", module, loaded("llama_scaled_tied")[1], new)
    assert written["rope_parameters"] == parameters and "rope_theta" not in written


def test_the_first_layers_alone_and_the_head_that_repeats(tmp_path):
    module, variables, _ = hf.load(DATA / "llama_small", depth=1)
    assert module.depth == 1 and set(variables["params"]) == {"embedding", "block_0", "norm", "head"}
    table = tensors_of(DATA / "qwen2_tied")["model.embed_tokens.weight"]
    module, _, _ = hf.load(altered(tmp_path, "qwen2_tied", tensors={"lm_head.weight": table}))
    assert module.tie_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "the rope_type is 'yarn'; supported: 'default', 'llama3'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads; 3 does not divide 4"),
        ({"head_dim": 4}, r"q_proj.weight: found \[24, 12\], expected \[16, 12\]"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, r"k_proj.bias: missing, expected \[12\]"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*known: t5, mt5, mrt5, llama, qwen2"),
    ],
)
def test_what_the_module_cannot_express_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        hf.load(altered(tmp_path, "llama_small", **settings))


def test_what_a_checkpoint_cannot_express_is_refused(tmp_path):
    module, variables, config = loaded("llama_small")
    for attributes in (dict(routing=MixtureOfDepths()), dict(exit_classifier=True)):
        with pytest.raises(ValueError, match=f"{next(iter(attributes))}=.* has no form in a Llama or Qwen2 checkpoint"):
            hf.save(tmp_path / "out", module.clone(**attributes), variables, config)
    with pytest.raises(ValueError, match="DecoderLM has no attribute widht"):
        hf.load(DATA / "llama_small", widht=3)
