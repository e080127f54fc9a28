# SPDX-License-Identifier: Apache-2.0
"""Writes the tiny random checkpoints under tests/data/hf with the outputs that their own libraries give for them.

    python tests/make_hf_references.py t5
    python tests/make_hf_references.py vit
    python tests/make_hf_references.py llama
    python tests/make_hf_references.py mrt5 --mrt5-code=DIR

`t5`, `vit` and `llama` (under tests/data/hf_llama) need torch 2.13.0, transformers 5.23.0 and safetensors; no part of the
project does, and tests read the stored files only. `mrt5` needs DIR, a checkout of https://github.com/jkallini/mrt5, and the
version of transformers that it names, 4.39.1, with torch 2.13.0: so it runs in an environment of its own, and the public code
needs no change there.

Each folder of tests/data/hf holds config.json and tensors as they are published, and references.npz: `input_ids [B, N]`,
`attention_mask [B, N]`, `decoder_input_ids [B, T]`, and what the library computes from them in float32: "logits [B, T, V]"
or, for an encoder, "features [B, N, D]"; for an MrT5 the logits "soft" and "hard", and "delete_gate [B, N]". The last
row of a batch is padded to a single token. A ViT, DeiT or ViT-MAE has `pixel_values [B, height, width, c]`, its
preprocessor_config.json and "logits [B, c]", "features [B, D]" (the pooler's output) or "tokens [B, N, D]" (without
masking). A Llama or Qwen2 has no `decoder_input_ids`, its rows are padded on the left, and "positions" are those that the
library was given. Where tensors are stored in half precision, the library reads those.
"""

import argparse
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "data" / "hf"
LLAMA_FOLDER = FOLDER.parent / "hf_llama"
LENGTHS = (7, 4, 1)
# The inner widths, 2 * 8 and 3 * 4, differ from the widths; few buckets, so that short sequences reach the logarithmic ones.
SMALL = dict(d_model=12, d_kv=8, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=2)
WIDE = dict(
    d_model=20, d_kv=4, d_ff=16, num_heads=3, num_layers=3, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=6, layer_norm_epsilon=1e-3,
)  # fmt: skip
# Folder: config, dtype of the file. As published: tie_word_embeddings is false for ByT5, mT5 and T5 1.1.
T5 = {
    "byt5_small": ("T5ForConditionalGeneration", dict(SMALL, vocab_size=384, tie_word_embeddings=False), torch.float32),
    "byt5_wide": ("T5ForConditionalGeneration", dict(WIDE, vocab_size=384, tie_word_embeddings=False), torch.bfloat16),
    "mt5_small": ("MT5ForConditionalGeneration", dict(SMALL, vocab_size=72, tie_word_embeddings=False), torch.float16),
    "mt5_wide": ("MT5ForConditionalGeneration", dict(WIDE, vocab_size=72, tie_word_embeddings=False), torch.bfloat16),
    "t5_tied_small": ("T5ForConditionalGeneration", dict(SMALL, vocab_size=72), torch.float16),
    "t5_tied_wide": ("T5ForConditionalGeneration", dict(WIDE, vocab_size=72), torch.bfloat16),
    "t5_encoder_small": ("T5EncoderModel", dict(SMALL, vocab_size=72), torch.float16),
    "mt5_encoder_wide": ("MT5EncoderModel", dict(WIDE, vocab_size=72), torch.bfloat16),
}
GATE = dict(
    vocab_size=72, tie_word_embeddings=False, use_softmax1=True, deletion_type="scaled_sigmoid",
    sigmoid_mask_scale=-30.0, deletion_threshold=-15.0, has_absolute_position_embeddings=False,
)  # fmt: skip
MRT5 = {
    "mrt5_small": (dict(SMALL, **GATE, delete_gate_layer=1), torch.float16),
    "mrt5_wide": (dict(WIDE, **GATE, delete_gate_layer=2), torch.bfloat16),
}

# Grouped queries, and a head width that is not width / heads; the window of Llama 3's scaling lies within the few tokens.
LLAMA_SMALL = dict(
    vocab_size=72, hidden_size=12, intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, head_dim=6, max_position_embeddings=64, rms_norm_eps=1e-5, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LLAMA = {
    "llama_small": ("LlamaForCausalLM", dict(LLAMA_SMALL, rope_theta=10_000.0), torch.float32),
    "llama_scaled_tied": (
        "LlamaForCausalLM",
        dict(LLAMA_SMALL, rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True),
        torch.float16,
    ),
    "qwen2_small": ("Qwen2ForCausalLM", dict(LLAMA_SMALL, rope_theta=1e6, use_sliding_window=False), torch.bfloat16),
    "qwen2_tied": (
        "Qwen2ForCausalLM",
        dict(LLAMA_SMALL, num_key_value_heads=1, rope_theta=1e3, tie_word_embeddings=True),
        torch.float32,
    ),
}


# As google/vit-*, its in21k models, facebook/deit-*-distilled-* and facebook/vit-mae-* are; MAE with a decoder to be left out.
TINY_VIT = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, patch_size=4)
VIT = {
    "vit_small": ("ViTForImageClassification", dict(TINY_VIT, image_size=12, num_labels=5), torch.float32),
    "vit_in21k_small": (
        "ViTModel",
        dict(TINY_VIT, image_size=[8, 12], num_attention_heads=3, num_hidden_layers=3, pooler_output_size=12),
        torch.bfloat16,
    ),
    "deit_distilled_small": (
        "DeiTForImageClassificationWithTeacher",
        dict(TINY_VIT, image_size=12, num_labels=5, hidden_act="gelu_new"),
        torch.float32,
    ),
    "vit_mae_small": (
        "ViTMAEForPreTraining",
        dict(
            TINY_VIT, image_size=12, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=8, mask_ratio=0.0,
        ),
        torch.float16,
    ),
}  # fmt: skip


def batch(vocabulary, seed, encoder=False):
    """Ids with right padding, and 0 only there; the decoder starts with 0."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    ids = np.where(mask, rng.integers(3, vocabulary, mask.shape), 0)
    start = np.pad(rng.integers(3, vocabulary, (len(LENGTHS), 2)), ((0, 0), (1, 0)))
    arrays = dict(input_ids=ids, attention_mask=mask.astype(int)) | ({} if encoder else dict(decoder_input_ids=start))
    return {name: torch.tensor(array) for name, array in arrays.items()}


def randomise(model, seed, dtype):
    """Values large enough that every parameter shows in the output, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    head = getattr(model, "lm_head", None)
    if head is not None and not model.config.to_dict().get("scale_decoder_outputs", model.config.tie_word_embeddings):
        # transformers 5 ties whatever the config says; published checkpoints of these models are not tied.
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif not any(part in name for part in ("relative_attention_bias", "shared", "bias", "embed_tokens")):
            values = values * parameter.shape[-1] ** -0.5
        parameter.data = values.to(dtype).float()


def write(name, model, config, dtype, arrays):
    """One folder: tensors and config as published, and the outputs."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    repeated = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if getattr(model, "lm_head", None) is not None and model.lm_head.weight is model.shared.weight:
        repeated.add("lm_head.weight")
    tensors = {key: value for key, value in tensors.items() if key not in repeated}
    if name != "mt5_wide":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        save_sharded(tensors, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(folder / "references.npz", **{key: array.detach().numpy() for key, array in arrays.items()})


def save_sharded(tensors, folder):
    """Two files and an index."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")


def t5():
    """T5, ByT5 and mT5 by transformers."""
    import transformers

    for seed, (name, (architecture, settings, dtype)) in enumerate(T5.items()):
        kind = "mt5" if architecture.startswith("MT5") else "t5"
        settings = dict(settings, feed_forward_proj="gated-gelu")
        made = {"mt5": transformers.MT5Config, "t5": transformers.T5Config}[kind](**settings)
        model = getattr(transformers, architecture)(made).eval()
        if kind == "mt5" and "lm_head" in dir(model):
            model.config.tie_word_embeddings = False
        randomise(model, seed, dtype)
        inputs = batch(settings["vocab_size"], seed, encoder="Encoder" in architecture)
        config = {"model_type": kind, "architectures": [architecture], **settings}
        config |= {"torch_dtype": str(dtype).removeprefix("torch."), "decoder_start_token_id": 0, "pad_token_id": 0}
        write(name, model, config, dtype, inputs)
        # From the folder, so that the outputs are what a reader of the published files gets.
        read = getattr(transformers, architecture).from_pretrained(FOLDER / name, dtype=torch.float32).eval()
        with torch.no_grad():
            output = read(**inputs)
        arrays = {"features": output.last_hidden_state} if "Encoder" in architecture else {"logits": output.logits}
        np.savez_compressed(
            FOLDER / name / "references.npz", **{key: array.numpy() for key, array in (inputs | arrays).items()}
        )


def llama():
    """Llama and Qwen2 by transformers."""
    import transformers

    for seed, (name, (architecture, settings, dtype)) in enumerate(LLAMA.items()):
        kind = architecture.removesuffix("ForCausalLM").lower()
        config = {"model_type": kind, "architectures": [architecture], "torch_dtype": str(dtype)[6:], **settings}
        folder = LLAMA_FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        made = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config").from_pretrained(folder)
        model = getattr(transformers, architecture)(made).eval()
        randomise(model, seed, dtype)
        tied = {"lm_head.weight"} if settings.get("tie_word_embeddings") else set()
        tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items() if key not in tied}
        if name == "qwen2_small":
            save_sharded(tensors, folder)
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        inputs = {key: value.flip(1) for key, value in batch(72, seed, encoder=True).items()}
        # So that rows of different lengths start at position 0, as generation by the library does.
        inputs["positions"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        read = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = read(inputs["input_ids"], inputs["attention_mask"], position_ids=inputs["positions"]).logits
        arrays = inputs | {"logits": logits}
        np.savez_compressed(folder / "references.npz", **{key: array.numpy() for key, array in arrays.items()})


def mrt5(code):
    """MrT5 by the public code."""
    sys.path.insert(0, str(code))
    from models.modeling_mrt5 import MrT5Config, MrT5ForConditionalGeneration

    for name, (settings, dtype) in MRT5.items():
        settings = dict(settings, feed_forward_proj="gated-gelu")
        model = MrT5ForConditionalGeneration(MrT5Config(**settings)).eval()
        seed, (inputs, outputs) = next((seed, found) for seed in range(1000) if (found := deleting(model, seed, dtype)))
        # As the public upload script writes it.
        config = dict(model.config.to_diff_dict(), architectures=["MrT5ForConditionalGeneration"], model_type="mrt5")
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        arrays = {mode: output.logits for mode, output in outputs.items()}
        write(name, model, config, dtype, inputs | arrays | {"delete_gate": outputs["soft"].delete_gate_output[..., 0]})
        print(f"{name}: seed {seed}")


def vit():
    """ViT, DeiT and ViT-MAE by transformers."""
    import transformers

    for seed, (name, (architecture, settings, dtype)) in enumerate(VIT.items()):
        kind = "vit_mae" if "MAE" in architecture else "deit" if "DeiT" in architecture else "vit"
        made = {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig, "vit_mae": transformers.ViTMAEConfig}[
            kind
        ]
        model = getattr(transformers, architecture)(made(**settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
            values = 1 + 0.2 * values if "norm" in key and key.endswith("weight") else values * scale
            parameter.data = values.to(dtype).float()
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder)
        config = {"model_type": kind, "architectures": [architecture], "torch_dtype": str(dtype).removeprefix("torch.")}
        labels = settings.get("num_labels")
        config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(labels)}} if labels else {}
        config |= {key: value for key, value in settings.items() if key != "num_labels"}
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        facts = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.2], "size": 12}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts) + "\n")
        height, width = (
            settings["image_size"] if isinstance(settings["image_size"], list) else (settings["image_size"],) * 2
        )
        pixels = torch.randn((2, 3, height, width), generator=generator)
        # From the folder, so that the outputs are what a reader of the published files gets.
        read = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            if kind == "vit_mae":
                patches = read.config.image_size**2 // read.config.patch_size**2
                order = torch.arange(patches).expand(2, -1) / patches
                outputs = {"tokens": read.vit(pixels, noise=order).last_hidden_state}
            elif architecture == "ViTModel":
                outputs = {"features": read(pixels).pooler_output}
            else:
                outputs = {"logits": read(pixels).logits}
        arrays = {"pixel_values": pixels.permute(0, 2, 3, 1).contiguous()} | outputs
        np.savez_compressed(folder / "references.npz", **{key: array.numpy() for key, array in arrays.items()})


def deleting(model, seed, dtype):
    """Inputs and outputs when hard deletion keeps some tokens of each row, not all, at different counts; else None."""
    randomise(model, seed, dtype)
    inputs = batch(model.config.vocab_size, seed)
    with torch.no_grad():
        try:
            outputs = {"soft": model(**inputs)}
        except ValueError:  # every token is deleted
            return None
        gate = outputs["soft"].delete_gate_output[..., 0]
        kept = ((gate > model.config.deletion_threshold) & (inputs["attention_mask"] == 1)).sum(-1).tolist()
        if not (1 < kept[0] < LENGTHS[0] and 1 <= kept[1] < LENGTHS[1] and kept[2] == 1 and kept[0] != kept[1]):
            return None
        outputs["hard"] = model(**inputs, hard_delete=True)
        if outputs["hard"].logits.isnan().any():
            return None
        return inputs, outputs


def main():
    """Reads the arguments and writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("t5", "vit", "llama", "mrt5"))
    parser.add_argument("--mrt5-code", type=pathlib.Path, help="a checkout of the public MrT5 code")
    options = parser.parse_args()
    if options.what == "mrt5" and options.mrt5_code is None:
        parser.error("mrt5 needs --mrt5-code=DIR")
    torch.manual_seed(0)
    {"t5": t5, "vit": vit, "llama": llama, "mrt5": lambda: mrt5(options.mrt5_code)}[options.what]()


if __name__ == "__main__":
    main()
