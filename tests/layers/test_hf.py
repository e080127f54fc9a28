# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints: outputs of the libraries that wrote them, the way back, and what is refused.

The checkpoints under tests/data/hf are written by tests/make_hf_references.py.
"""

import functools
import json
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from layers import hf
from layers.t5 import T5

DATA = pathlib.Path(__file__).parents[1] / "data" / "hf"
NAMES = sorted(folder.name for folder in DATA.iterdir() if "t5" in folder.name)
GATED = [name for name in NAMES if name.startswith("mrt5")]
TINY = dict(vocab_size=11, width=6, mlp_dim=5, heads=2, head_dim=4, encoder_layers=2, decoder_layers=1)


def references(name):
    """`(arguments of apply, {mode: output}, delete gate or None)`."""
    arrays = dict(np.load(DATA / name / "references.npz"))
    arguments = [arrays.pop(key, None) for key in ("input_ids", "attention_mask", "decoder_input_ids")]
    return arguments, {key: arrays[key] for key in arrays if key != "delete_gate"}, arrays.get("delete_gate")


@functools.cache
def loaded(name, **overrides):
    return hf.load(DATA / name, **overrides)


def apply(module, variables, arguments, deletion=None):
    return jax.jit(lambda variables, arguments: module.apply(variables, *arguments, deletion=deletion))(
        variables, arguments
    )


def tensors_of(folder):
    """All tensors of all files of a checkpoint."""
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def altered(folder, name, *, remove=(), tensors=None, **settings):
    """A copy of a stored checkpoint as one file, with other tensors and settings; a setting of `...` goes."""
    config = json.loads((DATA / name / "config.json").read_text()) | settings
    config = {key: value for key, value in config.items() if value is not ...}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {key: array for key, array in tensors_of(DATA / name).items() if key not in remove}
    save_file({**kept, **(tensors or {})}, folder / "model.safetensors")
    return folder


def drawn(module):
    """Boxed random variables of a module."""
    ids = jnp.ones((1, 2), jnp.int32)
    keys = {"params": jax.random.key(0), "deletion": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: module.init(keys, ids, None, ids if module.decoder_layers else None))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def assert_same(tree, other):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, twin in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == twin.dtype
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), np.asarray(twin).view(np.uint8))


# ---- Outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_library(name, scan_layers):
    module, variables, _ = loaded(name, scan_layers=scan_layers)
    arguments, outputs, gate = references(name)
    assert outputs.keys() == ({"soft", "hard"} if name in GATED else outputs.keys() & {"logits", "features"}) != set()
    for mode, expected in outputs.items():
        output, aux = apply(module, variables, arguments, mode if name in GATED else None)
        np.testing.assert_allclose(output, expected, atol=1e-4, rtol=0)
        if gate is not None:
            np.testing.assert_allclose(aux["delete_gate"], gate, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GATED)
def test_the_stored_gates_delete_some_tokens_so_that_the_modes_differ(name):
    arguments, outputs, gate = references(name)
    deleted = ((gate <= -15) & (arguments[1] == 1)).sum(1)
    assert deleted[0] > 0 and deleted[1] > 0
    assert np.abs(outputs["soft"] - outputs["hard"]).max() > 1e-2


@pytest.mark.parametrize("name", GATED)
def test_a_ladder_gives_the_same_hard_outputs(name):
    module, variables, _ = loaded(name, rungs=(4, 6, 8))
    arguments, outputs, _ = references(name)
    output, _ = apply(module, variables, arguments, "hard")
    np.testing.assert_allclose(output, outputs["hard"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t5_tied_small", {"tie_word_embeddings": False}),
        ("t5_tied_small", {"tie_word_embeddings": True, "scale_decoder_outputs": False}),
        ("t5_tied_small", {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}),
    ],
)
def test_without_a_head_unscaled_logits_come_from_a_copy_of_the_embedding(tmp_path, name, settings):
    arguments, outputs, _ = references(name)
    module, variables, _ = hf.load(altered(tmp_path, name, **settings))
    assert not module.tie_embeddings
    expected = outputs["logits"] * np.sqrt(module.width)
    np.testing.assert_allclose(apply(module, variables, arguments)[0], expected, atol=4e-4, rtol=0)


def test_scaling_follows_the_key_of_newer_configs(tmp_path):
    newer = altered(tmp_path, "byt5_small", tie_word_embeddings=True, scale_decoder_outputs=False)
    assert hf.load(newer)[0] == loaded("byt5_small")[0]


def test_the_dtype_is_that_of_parameters_and_computation():
    module, variables, config = loaded("byt5_wide", dtype=jnp.bfloat16)
    assert module.dtype == jnp.bfloat16 and config["torch_dtype"] == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    arguments, outputs, _ = references("byt5_wide")
    output, _ = apply(module, variables, arguments)
    # Half precision through four layers; a wrong tensor would be off by the size of the logits, about 4.
    assert 1e-4 < np.abs(np.asarray(output) - outputs["logits"]).max() < 0.3


# ---- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_the_tensors_and_the_config_that_were_loaded(tmp_path, name, scan_layers):
    kind = json.loads((DATA / name / "config.json").read_text())["torch_dtype"]
    module, variables, config = hf.load(DATA / name, dtype=kind, scan_layers=scan_layers)
    described = hf.save(tmp_path / "out", module, variables, config)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(DATA / name))
    again = hf.load(tmp_path / "out", dtype=kind, scan_layers=scan_layers)
    assert again[0] == module and again[2] == described
    assert_same(again[1], variables)
    assert {key: described[key] for key in config} == config


def test_the_file_says_that_it_is_for_pytorch_as_older_readers_ask(tmp_path):
    module, variables, config = loaded("t5_encoder_small")
    hf.save(tmp_path, module, variables, config)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_half_precision_loaded_in_full_is_saved_in_full(tmp_path):
    module, variables, config = loaded("mt5_wide")
    described = hf.save(tmp_path, module, variables, config)
    assert described["torch_dtype"] == "float32" and config["torch_dtype"] == "bfloat16"
    for name, tensor in tensors_of(DATA / "mt5_wide").items():
        found = tensors_of(tmp_path)[name]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.astype(np.float32))


def test_large_models_are_saved_in_shards_with_an_index(tmp_path):
    limit = 3000
    module, variables, config = loaded("byt5_small")
    hf.save(tmp_path, module, variables, config, shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (
        files == sorted(set(index["weight_map"].values())) and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    )
    sizes = [[array.nbytes for array in load_file(tmp_path / file).values()] for file in files]
    assert max(map(sum, sizes)) > limit  # the embedding alone
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_same(hf.load(tmp_path)[1], variables)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_embeddings=True, epsilon=1e-5, num_buckets=8, max_distance=20, dropout=0.25),
        dict(decoder_layers=0),
        dict(softmax="off_by_one"),
        dict(softmax="off_by_one", gate="mrt5", gate_layer=1, gate_hyper=(("gumbel", True), ("scale", -20.0))),
        dict(gate="random_deletion", gate_layer=1, gate_hyper=(("rate", 0.25), ("scale", -30.0))),
        dict(gate="fixed_deletion", gate_layer=1, gate_hyper=(("rate", 0.75), ("scale", -30.0)), scan_layers=True),
    ],
)
def test_a_model_that_never_was_a_checkpoint_comes_back_as_it_was(tmp_path, changes):
    module = T5(**{**TINY, "dropout": 0.1, "dtype": jnp.dtype("float32"), **changes})
    variables = drawn(module)
    described = hf.save(tmp_path, module, variables)
    found, again, config = hf.load(tmp_path, scan_layers=module.scan_layers)
    assert found == module and config == described
    assert_same(again, nn.unbox(variables))


def test_a_gate_that_keeps_everything_is_saved_as_no_gate(tmp_path):
    module = T5(**TINY, gate="no_deletion", gate_layer=1)
    hf.save(tmp_path, module, drawn(module))
    assert hf.load(tmp_path)[0].gate is None


@pytest.mark.parametrize(("name", "tied"), [("t5_tied_small", False), ("byt5_small", True)])
def test_a_config_whose_head_is_changed_says_so(tmp_path, name, tied):
    """Also to readers of `scale_decoder_outputs`, which goes before `tie_word_embeddings`."""
    settings = {"tie_word_embeddings": True, "scale_decoder_outputs": not tied}
    module, variables, config = hf.load(altered(tmp_path / "in", name, **settings))
    assert module.tie_embeddings != tied
    other = module.clone(tie_embeddings=tied)
    params = dict(variables["params"])
    params = (
        {k: v for k, v in params.items() if k != "head"} if tied else params | {"head": {"kernel": jnp.ones((12, 72))}}
    )
    hf.save(tmp_path / "out", other, {"params": params}, config)
    found, again, _ = hf.load(tmp_path / "out")
    assert found == other
    assert_same(again, {"params": params})


def test_the_public_baseline_with_the_same_softmax_is_read_and_rewritten(tmp_path):
    source = altered(tmp_path / "in", "byt5_small", use_softmax1=True)
    assert hf.load(source)[0].softmax == "off_by_one"
    module, variables, config = hf.load(source, softmax="standard")
    hf.save(tmp_path / "out", module, variables, config)
    assert hf.load(tmp_path / "out")[0].softmax == "standard"


def test_a_model_without_its_gate_is_no_longer_an_mrt5(tmp_path):
    module, variables, config = hf.load(DATA / "mrt5_small", gate=None, softmax="standard")
    assert "delete_gate" not in variables["params"]
    described = hf.save(tmp_path, module, variables, config)
    assert described["model_type"] == "t5" and not {key for key in described if "delet" in key or "gate_" in key}
    assert hf.load(tmp_path)[0] == module.clone(gate_layer=T5.gate_layer, gate_hyper=())


# ---- What config.json and the tensors may say ------------------------------------------------------------------------


def test_the_gate_of_an_mrt5_is_read_from_its_settings():
    module, variables, config = loaded("mrt5_wide")
    assert (module.gate, module.gate_layer, module.gate_hyper) == ("mrt5", 2, (("scale", -30.0),))
    assert module.softmax == "off_by_one" and config["model_type"] == "mrt5"
    stored = tensors_of(DATA / "mrt5_wide")
    gate = variables["params"]["delete_gate"]
    prefix = "encoder.block.2.delete_gate"
    np.testing.assert_array_equal(gate["logit"]["kernel"][:, 0], stored[f"{prefix}.feed_forward.weight"][0])
    np.testing.assert_array_equal(gate["logit"]["bias"], stored[f"{prefix}.feed_forward.bias"])
    np.testing.assert_array_equal(gate["norm"]["scale"], stored[f"{prefix}.layer_norm.weight"])


def test_a_threshold_that_is_not_said_is_half_of_the_scale(tmp_path):
    assert hf.load(altered(tmp_path, "mrt5_small", deletion_threshold=None))[0] == loaded("mrt5_small")[0]


def test_the_scale_has_the_default_of_the_public_code(tmp_path):
    folder = altered(tmp_path, "mrt5_small", sigmoid_mask_scale=..., deletion_threshold=-5.0, delete_gate_layer=...)
    stored = tensors_of(folder)
    moved = {name.replace("block.1.delete", "block.2.delete"): array for name, array in stored.items()}
    save_file(moved, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"block\.1\.delete_gate|gate_layer"):
        hf.load(folder, gate_layer=1)
    module, _, _ = hf.load(folder)
    assert module.gate_hyper == (("scale", -10.0),) and module.gate_layer == 2


def test_the_kind_of_model_may_be_said_by_the_architecture_alone(tmp_path):
    module, _, config = hf.load(altered(tmp_path, "mt5_small", model_type=...))
    assert module == loaded("mt5_small")[0] and config["model_type"] == "mt5"


def test_missing_settings_have_the_defaults_of_the_library(tmp_path):
    keys = ("num_decoder_layers", "dropout_rate", "layer_norm_epsilon", "relative_attention_max_distance")
    folder = altered(tmp_path, "byt5_small", **dict.fromkeys(keys, ...))
    module, _, _ = hf.load(folder)
    assert (module.decoder_layers, module.dropout, module.epsilon, module.max_distance) == (2, 0.1, 1e-6, 128)


@pytest.mark.parametrize("only", [False, True])
def test_repeated_embeddings_are_the_embedding(tmp_path, only):
    table = tensors_of(DATA / "t5_tied_small")["shared.weight"]
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    folder = altered(
        tmp_path, "t5_tied_small", tensors=dict.fromkeys(names, table), remove=["shared.weight"] if only else []
    )
    assert_same(hf.load(folder)[1], loaded("t5_tied_small")[1])


def test_a_stray_bias_of_old_conversions_is_passed_over(tmp_path):
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = altered(tmp_path, "byt5_small", tensors={stray: np.zeros((32, 2), np.float32)})
    assert_same(hf.load(folder)[1], loaded("byt5_small")[1])


# ---- Overrides -------------------------------------------------------------------------------------------------------


def test_the_encoder_alone_gives_the_features_of_the_whole_model():
    whole, variables, _ = loaded("byt5_small")
    encoder, parts, _ = loaded("byt5_small", decoder_layers=0)
    assert not [name for name in parts["params"] if name.startswith(("decoder", "head"))]
    ids = references("byt5_small")[0][:2]
    np.testing.assert_array_equal(apply(encoder, parts, [*ids, None])[0], apply(whole, variables, [*ids, None])[0])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_gate_put_on_a_model_without_one_starts_anew_and_keeps_every_byte(scan_layers):
    new = dict(gate="mrt5", gate_layer=1, scan_layers=scan_layers)
    module, variables, _ = loaded("byt5_small", **new)
    gate = variables["params"]["delete_gate"]
    assert gate["norm"]["scale"].tolist() == [1.0] * 12 and gate["logit"]["bias"].tolist() == [1.0]
    assert np.abs(gate["logit"]["kernel"]).max() > 0
    assert_same(loaded("byt5_small", **new)[1], variables)
    arguments, outputs, _ = references("byt5_small")
    output, _ = apply(module, variables, arguments)
    np.testing.assert_allclose(output, outputs["logits"], atol=1e-4, rtol=0)


def test_an_override_that_is_no_attribute_is_refused():
    with pytest.raises(ValueError, match=r"T5 has no attribute scan_layer; it has .*scan_layers"):
        hf.load(DATA / "byt5_small", scan_layer=True)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("byt5_small", {"model_type": "umt5"}, r"model_type 'umt5'.*known: t5, mt5, mrt5"),
        ("byt5_small", {"model_type": ..., "architectures": ...}, r"model_type None"),
        (
            "byt5_small",
            {"architectures": ["T5ForSequenceClassification"]},
            r"T5ForSequenceClassification.*known: T5For",
        ),
        ("byt5_small", {"feed_forward_proj": "relu"}, r"feed_forward_proj is 'relu'; only 'gated-gelu'"),
        ("byt5_small", {"feed_forward_proj": ...}, r"feed_forward_proj is 'relu'"),
        ("byt5_small", {"d_kv": ..., "d_ff": ...}, r"config.json lacks d_ff, d_kv"),
        ("byt5_small", {"num_heads": 4}, r"SelfAttention.q.weight: found \[16, 12\], expected \[32, 12\]"),
        ("byt5_small", {"vocab_size": 385}, r"shared.weight: found \[384, 12\], expected \[385, 12\]"),
        (
            "byt5_small",
            {"num_layers": 3},
            r"encoder.block.2.layer.0.SelfAttention.o.weight: missing, expected \[12, 16\]",
        ),
        ("byt5_small", {"num_layers": 1}, r"encoder.block.1.layer.0.layer_norm.weight: unexpected, found \[12\]"),
        (
            "byt5_small",
            {"tie_word_embeddings": True},
            r"lm_head.weight \[384, 12\].*differs from shared.weight \[384, 12\]",
        ),
        ("mrt5_small", {"deletion_type": None}, r"delete_gate.feed_forward.bias: unexpected, found \[1\]"),
        ("mrt5_small", {"deletion_type": "log_sigmoid"}, r"deletion_type is 'log_sigmoid'; supported: scaled_sigmoid"),
        (
            "mrt5_small",
            {"deletion_threshold": -3.0},
            r"deletion_threshold is -3.0; .*half of sigmoid_mask_scale, -15.0",
        ),
        ("mrt5_small", {"gate_layer_norm": False}, r"gate_layer_norm is false"),
        ("mrt5_small", {"has_absolute_position_embeddings": True}, r"only relative positions"),
        ("mrt5_small", {"delete_gate_layer": 0}, r"gate_layer must lie in 1..2"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, name, settings, message):
    with pytest.raises(ValueError, match=message):
        hf.load(altered(tmp_path, name, **settings))


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    bad = {"encoder.final_layer_norm.weight": np.ones(7, np.float32), "what.weight": np.ones((2, 3), np.float32)}
    bad["shared.weight"] = np.ones((384, 12), np.int8)
    folder = altered(tmp_path, "byt5_small", tensors=bad, remove=["decoder.final_layer_norm.weight"])
    with pytest.raises(ValueError, match=r"do not fit config\.json") as error:
        hf.load(folder)
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "encoder.final_layer_norm.weight: found [7], expected [12]",
        "decoder.final_layer_norm.weight: missing, expected [12]",
        "what.weight: unexpected, found [2, 3]",
        "shared.weight: dtype I8, expected F32 or BF16 or F16",
    }


def test_a_checkpoint_of_pytorch_alone_comes_with_the_way_to_convert_it(tmp_path):
    shutil.copy(DATA / "byt5_small" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        hf.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no model.safetensors.*convert(.|\n)*torch.load(.|\n)*save_file"):
        hf.load(tmp_path)


def test_directories_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf.load(tmp_path / "nowhere")
    folder = altered(tmp_path, "byt5_small")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"model.safetensors \({len(whole) - 10} bytes\) cannot be read"):
        hf.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds a list"):
        hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        hf.load(folder)


def test_a_shard_that_is_missing_or_lacks_its_tensors_is_named(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(DATA / "mt5_wide", folder)
    second = folder / "model-00002-of-00002.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", second)
    with pytest.raises(ValueError, match=r"places \S+ in model-00002-of-00002.safetensors, which does not hold it"):
        hf.load(folder)
    second.unlink()
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002.safetensors is missing, a file that .*index.json names"
    ):
        hf.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gate="mrt5", gate_layer=2), "gate_layer=2 is after the last encoder layer"),
        (
            dict(gate="random_deletion", gate_layer=1, gate_hyper=(("deviation", 0.1),)),
            "deviation of 'random_deletion'",
        ),
        (dict(decoder_layers=0, softmax="off_by_one"), "an MrT5 checkpoint has a decoder"),
    ],
)
def test_a_module_without_a_form_is_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        hf.save(tmp_path / "out", T5(**{**TINY, **changes}), {"params": {}})
    assert not (tmp_path / "out").exists()


def test_variables_that_do_not_fit_the_module_are_not_saved(tmp_path):
    module, variables, config = loaded("t5_encoder_small")
    params = variables["params"]
    cases = [
        (params | {"spare": {"bias": jnp.ones(3)}}, r"spare/bias: found \[3\], expected nothing"),
        (
            {k: v for k, v in params.items() if k != "encoder_norm"},
            r"encoder_norm/scale: found nothing, expected \[12\]",
        ),
        (params | {"encoder_norm": {"scale": jnp.ones(5)}}, r"encoder_norm/scale: found \[5\], expected \[12\]"),
        (params | {"encoder_norm": {"scale": jnp.ones(12, jnp.bfloat16)}}, r"share one dtype.*found bfloat16, float32"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            hf.save(tmp_path / "out", module, {"params": wrong}, config)
    with pytest.raises(ValueError, match=r"a Dense has no Hugging Face form; those with one: T5, DecoderLM, ViT"):
        hf.save(tmp_path / "out", nn.Dense(2), variables)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over(tmp_path):
    module, variables, config = loaded("t5_encoder_small")
    hf.save(tmp_path, module, variables, config)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds config.json, model.safetensors"):
        hf.save(tmp_path, module, jax.tree.map(jnp.zeros_like, variables), config)
    assert (tmp_path / "model.safetensors").read_bytes() == before
