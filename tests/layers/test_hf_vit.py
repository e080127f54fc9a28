# SPDX-License-Identifier: Apache-2.0
"""ViT, DeiT and ViT-MAE checkpoints: outputs of transformers, the way back, what starts anew and what is refused.

The checkpoints under tests/data/hf are written by tests/make_hf_references.py.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers import hf
from layers.hooks import Reduce
from layers.vit import ViT

DATA = pathlib.Path(__file__).parents[1] / "data" / "hf"
NAMES = ("deit_distilled_small", "vit_in21k_small", "vit_mae_small", "vit_small")
# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def loaded(name, **overrides):
    return hf.load(DATA / name, **overrides)


def references(name):
    """`(pixel_values, name of the output, output)`."""
    arrays = dict(np.load(DATA / name / "references.npz"))
    return (arrays.pop("pixel_values"), *arrays.popitem())


def altered(folder, name, *, remove=(), tensors=None, **settings):
    """A copy of a stored checkpoint with other tensors and settings; a setting of `...` goes."""
    config = json.loads((DATA / name / "config.json").read_text()) | settings
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    kept = {key: array for key, array in load_file(DATA / name / "model.safetensors").items() if key not in remove}
    save_file({**kept, **(tensors or {})}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_library(name, scan_layers):
    module, variables, _ = loaded(name, scan_layers=scan_layers)
    pixels, kind, want = references(name)
    out, aux = _jit(module.apply)(variables, pixels)
    got = aux["token_set"].features if kind == "tokens" else out
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_the_tensors_and_the_config_that_were_loaded(tmp_path, name, scan_layers):
    tensors = load_file(DATA / name / "model.safetensors")
    module, variables, config = hf.load(DATA / name, dtype=next(iter(tensors.values())).dtype, scan_layers=scan_layers)
    described = hf.save(tmp_path / "out", module, variables, config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    if name == "vit_mae_small":
        # The encoder alone is written, which bears its names without a prefix.
        tensors = {key.removeprefix("vit."): array for key, array in tensors.items() if key.startswith("vit.")}
        config = config | {"architectures": ["ViTMAEModel"]}
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype and written[key].shape == tensor.shape
        np.testing.assert_array_equal(written[key].view(np.uint8), tensor.view(np.uint8), err_msg=key)
    assert {key: described[key] for key in config} == config
    again, _, _ = hf.load(tmp_path / "out", dtype=module.dtype, scan_layers=scan_layers)
    assert again == module


def test_a_module_that_never_was_a_checkpoint_comes_back_as_it_was(tmp_path):
    module = ViT(2, 8, 1, 2, 6, num_classes=3, image_size=(4, 6), channels=1, activation="relu")
    variables = _jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 6, 1)))
    described = hf.save(tmp_path / "out", module, variables)
    assert described["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    again, params, _ = hf.load(tmp_path / "out")
    assert again == module.clone(class_token=True)
    jax.tree.map(np.testing.assert_array_equal, params["params"], dict(hf.nn.unbox(variables)["params"]))


def test_a_reduction_runs_on_an_imported_model():
    module, variables, _ = loaded("vit_small", hooks=(Reduce("tome", (8, 6)),))
    logits, aux = _jit(module.apply)(variables, references("vit_small")[0])
    assert logits.shape == (2, 5) and aux["tokens"][:, 0].tolist() == [8, 6]


def test_another_number_of_classes_starts_a_new_classifier():
    module, variables, _ = loaded("vit_small", num_classes=3)
    assert variables["params"]["head"]["kernel"].shape == (12, 3)
    same = loaded("vit_small")[1]["params"]
    np.testing.assert_array_equal(variables["params"]["class_token"], same["class_token"])
    module, variables, _ = loaded("vit_mae_small", num_classes=4, pool="mean")
    logits, _ = _jit(module.apply)(variables, references("vit_mae_small")[0])
    assert logits.shape == (2, 4)


def test_features_come_without_classifier_or_pooler():
    for name in ("vit_small", "vit_in21k_small"):
        module, variables, _ = loaded(name, num_classes=0, representation=None)
        features, aux = _jit(module.apply)(variables, references(name)[0])
        np.testing.assert_array_equal(features, aux["token_set"].features[:, 0])


def test_a_distilled_model_takes_no_reduction():
    module, variables, _ = loaded("deit_distilled_small")
    assert module.num_tokens == 9 + 2 and module.spec().tokens == 11
    with pytest.raises(ValueError, match=r"distillation token needs pool='cls' and no hooks.*1 hook"):
        module.clone(hooks=(Reduce("tome", (9, 8)),)).apply(variables, references("deit_distilled_small")[0])


def test_the_kind_of_model_may_be_said_by_the_type_alone(tmp_path):
    for name in ("vit_small", "deit_distilled_small", "vit_mae_small"):
        module, _, _ = hf.load(altered(tmp_path / name, name, architectures=...))
        assert module == loaded(name)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_size=...), "config.json lacks hidden_size"),
        (dict(hidden_act="swish2"), "hidden_act is 'swish2'; supported: gelu, gelu_new"),
        (dict(qkv_bias=False), "qkv_bias is false"),
        (dict(pooler_act="relu"), "pooler_act is 'relu'; only 'tanh'"),
        (dict(patch_size=[4, 2]), r"patch_size is \[4, 2\]; only square"),
        (dict(architectures=["ViTHybridModel"]), r"architectures \['ViTHybridModel'\]; known: "),
        (dict(image_size=16), r"position_embeddings: found \[1, 10, 12\], expected \[1, 17, 12\]"),
        (dict(num_hidden_layers=3), r"encoder.layer.2.layernorm_before.weight: missing, expected \[12\]"),
        (dict(num_hidden_layers=1), r"encoder.layer.1.attention.attention.key.bias: unexpected, found \[12\]"),
        (dict(intermediate_size=24), r"intermediate.dense.weight: found \[20, 12\], expected \[24, 12\]"),
        (dict(num_channels=1), r"projection.weight: found \[12, 3, 4, 4\], expected \[12, 1, 4, 4\]"),
        (dict(id2label={"0": "one"}), r"classifier.weight: found \[5, 12\], expected \[1, 12\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        hf.load(altered(tmp_path / "model", "vit_small", **settings))


def test_an_override_that_is_no_attribute_is_refused():
    with pytest.raises(ValueError, match="ViT has no attribute layers; it has activation"):
        hf.load(DATA / "vit_small", layers=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pool="mean"), "cannot express pool='mean' with classes"),
        (dict(positions="sincos2d"), "cannot express positions='sincos2d'"),
        (dict(stem=(8,)), r"cannot express stem=\(8,\)"),
        (dict(representation=4), "cannot express representation=4 with classes"),
        (dict(pool="mean", class_token=False, num_classes=0), "cannot express no class token"),
    ],
)
def test_a_module_without_a_form_is_not_saved(tmp_path, changes, message):
    module = ViT(2, 8, 1, 2, 6, num_classes=3, image_size=(4, 4)).clone(**changes)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=message):
        hf.save(tmp_path / "out", module, variables)


def test_pixels_are_normalised_as_the_checkpoint_says(tmp_path):
    assert hf.preprocessing(DATA / "vit_small") == {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)}
    assert hf.preprocessing(tmp_path) == {"mean": (0.0,), "std": (1.0,)}
    path = tmp_path / "preprocessor_config.json"
    for facts, want in (({}, 0.5), ({"do_normalize": False, "image_mean": [0.3] * 3}, 0.0)):
        path.write_text(json.dumps(facts))
        assert hf.preprocessing(tmp_path)["mean"][0] == want
    path.write_text(json.dumps({"rescale_factor": 0.5}))
    with pytest.raises(ValueError, match=r"scales pixels by 0.5; only 1/255"):
        hf.preprocessing(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is no JSON"):
        hf.preprocessing(tmp_path)
