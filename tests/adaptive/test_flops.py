# SPDX-License-Identifier: Apache-2.0
"""Compute accounting: against numbers done by hand, against published ones, and against the compiler's own count."""

import functools

import jax
import jax.numpy as jnp
import pytest

from adaptive import budgets, flops
from layers import decoder_lm, early_exit, mixture_of_depths, t5, vit

VIT_B = flops.ViTSpec(patch_size=16, width=768, depth=12, mlp_dim=3072, num_classes=1000, image_size=(224, 224))
BYT5_SMALL = t5.T5(**t5.SHAPES["byt5-small"])
BYT5_LARGE = t5.T5(**t5.SHAPES["byt5-large"])


def without_head(count):
    return sum(macs for block, macs in count.blocks.items() if block != "head")


# --- By hand ------------------------------------------------------------------------------------------------------


def test_blocks_of_a_tiny_vit_by_hand():
    # 3 x 2 patches and a class token: 7 tokens of width 8.
    spec = flops.ViTSpec(patch_size=4, width=8, depth=2, mlp_dim=10, num_classes=5, image_size=(12, 8), channels=1)
    assert (spec.patches, spec.tokens) == (6, 7)
    count = flops.count(spec, batch=3)
    layer = 4 * 7 * 8 * 8 + 2 * 7 * 7 * 8
    assert count.blocks == {
        "embed": 3 * 6 * 16 * 8,
        "attention": 3 * 2 * layer,
        "mlp": 3 * 2 * 2 * 7 * 8 * 10,
        "head": 3 * 8 * 5,
    }
    assert count.macs == sum(count.blocks.values()) and count.flops == 2 * count.macs


def test_a_stem_costs_its_convolutions_and_a_linear_map():
    spec = flops.ViTSpec(4, 8, depth=1, mlp_dim=10, num_classes=5, image_size=(12, 8), channels=1, stem=(3, 5))
    assert spec.macs(batch=2)["embed"] == 2 * (6 * 4 * 9 * 3 + 3 * 2 * 9 * 3 * 5 + 6 * 5 * 8)


def test_a_reduction_between_attention_and_mlp_saves_its_own_mlp_and_one_after_the_block_does_not():
    spec = flops.ViTSpec(4, 8, depth=2, mlp_dim=10, num_classes=0, image_size=(12, 8), cls_token=False)
    between, after = (flops.count(spec, counts=(4, 3), place=place).blocks for place in ("between", "after"))
    assert (
        between["attention"]
        == after["attention"]
        == flops.attention_macs(6, 6, 8, 8) + flops.attention_macs(4, 4, 8, 8)
    )
    assert between["mlp"] == 2 * (4 + 3) * 8 * 10
    assert after["mlp"] == 2 * (6 + 4) * 8 * 10


def test_blocks_of_a_tiny_t5_by_hand():
    spec = flops.T5Spec(vocab_size=11, width=8, mlp_dim=10, inner=6, encoder_layers=2, decoder_layers=3)
    blocks = flops.count(spec, batch=2, inputs=7, targets=5).blocks
    assert blocks == {
        "encoder_attention": 2 * 2 * (4 * 7 * 8 * 6 + 2 * 7 * 7 * 6),
        "encoder_mlp": 2 * 2 * 3 * 7 * 8 * 10,
        "decoder_attention": 2 * 3 * (4 * 5 * 8 * 6 + 2 * 5 * 5 * 6),
        "cross_attention": 2 * 3 * (2 * 5 * 8 * 6 + 2 * 7 * 8 * 6 + 2 * 5 * 7 * 6),
        "decoder_mlp": 2 * 3 * 3 * 5 * 8 * 10,
        "head": 2 * 5 * 8 * 11,
    }
    assert set(flops.count(spec, inputs=7).blocks) == {"encoder_attention", "encoder_mlp"}


TINY_T5 = flops.T5Spec(vocab_size=11, width=8, mlp_dim=10, inner=6, encoder_layers=2, decoder_layers=3)


def test_cached_decoding_of_a_tiny_t5_by_hand():
    blocks = flops.count(TINY_T5.decoding(), batch=2, encoded=7, slots=5, steps=4).blocks
    assert blocks == {
        "cross_memory": 2 * 3 * 2 * 7 * 8 * 6,
        # One token is projected a step and attends to all five slots.
        "decoder_attention": 2 * 3 * 4 * (4 * 8 * 6 + 2 * 5 * 6),
        "cross_attention": 2 * 3 * 4 * (2 * 8 * 6 + 2 * 7 * 6),
        "decoder_mlp": 2 * 3 * 4 * 3 * 8 * 10,
        "head": 2 * 4 * 8 * 11,
    }
    start = flops.count(TINY_T5.decoding(), batch=2, encoded=7, slots=5, steps=0)
    assert start.macs == start.blocks["cross_memory"] == blocks["cross_memory"]


def test_decoding_a_whole_sequence_with_a_cache_costs_what_scoring_it_once_does():
    scored = flops.count(TINY_T5, batch=2, inputs=7, targets=5).blocks
    decoder = sum(macs for name, macs in scored.items() if not name.startswith("encoder"))
    assert flops.count(TINY_T5.decoding(), batch=2, encoded=7, slots=5).macs == decoder


def test_grouped_keys_save_only_their_projections():
    full, grouped = flops.attention_macs(5, 7, 8, 8), flops.attention_macs(5, 7, 8, 8, kv_inner=2)
    assert full - grouped == 2 * 7 * 8 * (8 - 2)


def test_what_a_merge_itself_costs():
    assert flops.bipartite_macs(197, 64) == 99 * 98 * 64
    assert flops.merge_macs(197, 184, 768) == 197 * 184 * 768


def test_a_backbone_is_counted_by_its_own_sizes():
    assert flops.count(BYT5_SMALL, inputs=64, targets=8) == flops.count(BYT5_SMALL.spec(), inputs=64, targets=8)
    model = vit.ViT.named("B/16", num_classes=1000)
    assert flops.count(model) == flops.count(VIT_B)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flops.count(VIT_B, counts=(1, 2)), ValueError, "one entry for each of 12 layers; got 2"),
        (lambda: flops.count(VIT_B, place="before"), ValueError, "place='before'; one of 'between', 'after'"),
        (lambda: flops.count(BYT5_SMALL, inputs=8, counts=(8,)), ValueError, "one entry for each of 12 layers; got 1"),
        (lambda: BYT5_SMALL.spec().gated_counts(8, 4, 13), ValueError, r"gate layer must lie in 1\.\.12; got 13"),
        (lambda: BYT5_SMALL.spec().gated_counts(8, 4, 0), ValueError, r"gate layer must lie in 1\.\.12; got 0"),
        (
            lambda: flops.count(BYT5_SMALL.spec().decoding(), encoded=8, slots=4, steps=5),
            ValueError,
            r"steps must lie in 0\.\.4 \(the slots of the cache\); got 5",
        ),
        (lambda: flops.count(object()), TypeError, r"object has neither spec\(\) nor macs\(\)"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Published numbers --------------------------------------------------------------------------------------------


def test_vit_b_16_is_17_56_giga_macs():
    assert flops.count(VIT_B).macs / 1e9 == pytest.approx(17.56, abs=0.01)


@pytest.mark.parametrize(("model", "macs"), [(BYT5_SMALL, 251.8), (BYT5_LARGE, 1067.4)])
def test_dense_byt5_at_the_published_lengths(model, macs):
    count = flops.count(model, inputs=1024, targets=189)
    assert without_head(count) / 1e9 == pytest.approx(macs, abs=0.05)
    assert count.blocks["head"] == 189 * model.width * 384


@pytest.mark.parametrize(
    ("model", "relative"),
    [
        (BYT5_SMALL, {0.0: 1, 0.3: 0.780, 0.4: 0.708, 0.5: 0.637, 0.6: 0.566, 0.7: 0.496}),
        (BYT5_LARGE, {0.0: 1, 0.3: 0.726, 0.4: 0.637, 0.5: 0.550, 0.6: 0.464, 0.7: 0.379}),
    ],
)
def test_relative_macs_of_a_delete_gate_after_layer_3(model, relative):
    dense = without_head(flops.count(model, inputs=1024, targets=189))
    for deleted, want in relative.items():
        counts = model.spec().gated_counts(1024, 1024 * (1 - deleted), 3)
        got = without_head(flops.count(model, inputs=1024, targets=189, counts=counts)) / dense
        assert got == pytest.approx(want, abs=1e-3)


def test_a_tome_schedule_costs_what_its_layers_cost():
    counts = budgets.token_counts(budgets.removal_schedule(13, 12), 197, protected=1)
    by_hand, tokens = 196 * 768 * 768 + 768 * 1000, 197
    for left in counts:
        by_hand += 4 * tokens * 768**2 + 2 * tokens**2 * 768 + 2 * left * 768 * 3072
        tokens = left
    assert flops.count(VIT_B, counts=counts).macs == by_hand
    assert flops.count(VIT_B).macs / by_hand == pytest.approx(1.70, abs=0.01)


# --- The compiler's count -----------------------------------------------------------------------------------------


def compiled_flops(function, *shapes):
    """FLOPs that the compiler counts; nothing runs."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


@functools.cache
def parameter_shapes(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_dense_vit_agrees_with_the_compiler(pool):
    # The width of a real model, where norms and activations are small beside products; few layers compile quickly.
    model = vit.ViT.named("B/16", depth=2, image_size=(112, 112), num_classes=1000, pool=pool)
    pixels = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    params = parameter_shapes(model, pixels)
    counted = compiled_flops(lambda params, pixels: model.apply(params, pixels)[0], params, pixels)
    assert flops.count(model, batch=2).flops == pytest.approx(counted, rel=0.02)


def test_a_dense_t5_agrees_with_the_compiler():
    model = t5.T5(**(t5.SHAPES["byt5-small"] | {"encoder_layers": 2, "decoder_layers": 1}))
    ids, targets = (jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (128, 48))
    params = parameter_shapes(model, ids, None, targets)
    counted = compiled_flops(
        lambda params, ids, targets: model.apply(params, ids, None, targets)[0], params, ids, targets
    )
    assert flops.count(model, batch=2, inputs=128, targets=48).flops == pytest.approx(counted, rel=0.02)
    encoder = compiled_flops(lambda params, ids: model.apply(params, ids)[0], params, ids)
    assert flops.count(model, batch=2, inputs=128).flops == pytest.approx(encoder, rel=0.02)


def test_a_gated_t5_on_one_rung_agrees_with_the_compiler():
    model = t5.T5(
        **(t5.SHAPES["byt5-small"] | {"encoder_layers": 2, "decoder_layers": 1}), gate="mrt5", gate_layer=1, capacity=64
    )
    ids, targets = (jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (128, 48))
    params = parameter_shapes(model, ids, None, targets)
    counted = compiled_flops(
        lambda params, ids, targets: model.apply(params, ids, None, targets, deletion="hard")[0], params, ids, targets
    )
    counts = model.spec().gated_counts(128, 64, 1)
    assert flops.count(model, batch=2, inputs=128, targets=48, counts=counts).flops == pytest.approx(counted, rel=0.02)


def test_a_cached_decode_step_agrees_with_the_compiler():
    model = t5.T5(**(t5.SHAPES["byt5-small"] | {"encoder_layers": 1, "decoder_layers": 2}))
    ids = jax.ShapeDtypeStruct((2, 96), jnp.int32)
    params = parameter_shapes(model, ids, None, ids)
    encoded = jax.eval_shape(lambda params, ids: model.apply(params, ids, method="encode"), params, ids)
    start = functools.partial(model.apply, max_length=64, method="start_decoding")
    cache = jax.eval_shape(start, params, encoded)
    spec = model.spec().decoding()
    begun = flops.count(spec, batch=2, encoded=96, slots=64, steps=0)
    assert begun.flops == pytest.approx(compiled_flops(start, params, encoded), rel=0.02)
    counted = compiled_flops(
        lambda params, cache, ids, position: model.apply(params, cache, ids, position, method="decode_step"),
        *(params, cache, jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)),
    )
    step = flops.count(spec, batch=2, encoded=96, slots=64, steps=1).flops - begun.flops
    assert step == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("chunker", "layer"),
    [("words", 1), ("boundary_predictor", 1), ("strided", 1), ("hnet", 1), ("entropy_patches", 1), ("gbst", 0)],
)
def test_a_t5_on_chunks_agrees_with_the_compiler(chunker, layer):
    model = t5.T5(
        **(t5.SHAPES["byt5-small"] | {"encoder_layers": 2, "decoder_layers": 1}),
        chunker=chunker,
        chunk_layer=layer,
        capacity=32,
    )
    ids, targets = (jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (128, 48))
    key = jax.random.key(0)
    params = parameter_shapes(model, ids, None, targets)
    counted = compiled_flops(
        lambda params, ids, targets: model.apply(params, ids, None, targets, rngs={"chunking": key})[0],
        params,
        ids,
        targets,
    )
    count = flops.count(model, batch=2, targets=48, **model.chunk_sizes(128, 32))
    assert count.flops == pytest.approx(counted, rel=0.02)
    assert count.blocks["chunker"] > 0


LM = decoder_lm.DecoderLM(
    vocab_size=512, width=128, depth=3, heads=4, kv_heads=2, head_dim=48, mlp_dim=640, tie_embeddings=True
)


def test_a_decoder_agrees_with_the_compiler():
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    found = compiled_flops(lambda v, i: LM.apply(v, i)[0], parameter_shapes(LM, ids), ids)
    assert found == pytest.approx(flops.count(LM, batch=2, tokens=128).flops, rel=0.05)


def test_a_routed_decoder_agrees_with_the_compiler():
    model = LM.clone(routing=mixture_of_depths.MixtureOfDepths(share=0.25, predictor="router"))
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    found = compiled_flops(lambda v, i: model.apply(v, i)[0], parameter_shapes(model, ids), ids)
    assert found == pytest.approx(flops.count(model, batch=2, tokens=128, counts=(128, 32, 128)).flops, rel=0.05)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])
def test_a_decoders_step_agrees_with_the_compiler(layers):
    model = LM.clone(policy=early_exit.FixedLayers(layers))
    ids = jax.ShapeDtypeStruct((2, 96), jnp.int32)
    variables = parameter_shapes(LM, ids)
    cache, first = jax.eval_shape(lambda v, i: model.apply(v, i, max_length=32, method="prefill"), variables, ids)
    found = compiled_flops(lambda v, c, i: model.apply(v, c, i, 0, method="decode_step")[0], variables, cache, first)
    steps = [int(layer in layers) for layer in range(3)]
    count = flops.count(LM.spec().decoding(), batch=2, slots=128, steps=1, layer_steps=steps)
    assert found == pytest.approx(count.flops, rel=0.05)


def test_blocks_of_a_tiny_decoder_by_hand():
    spec = flops.DecoderSpec(vocab_size=11, width=8, depth=2, mlp_dim=10, inner=6, kv_inner=3)
    layers = [2 * n * 8 * 6 + 2 * n * 8 * 3 + 2 * n * n * 6 for n in (7, 4)]
    assert flops.count(spec, batch=3, tokens=7, counts=(7, 4)).blocks == {
        "attention": 3 * sum(layers), "mlp": 3 * 3 * (7 + 4) * 8 * 10, "head": 3 * 7 * 8 * 11,
    }  # fmt: skip
    with pytest.raises(ValueError, match="one entry for each of 2 layers"):
        flops.count(spec, tokens=7, counts=(7,))
    with pytest.raises(ValueError, match=r"one number in 0..4 for each of 2 layers; got \(5, 1\)"):
        flops.count(spec.decoding(), slots=9, steps=4, layer_steps=(5, 1))
