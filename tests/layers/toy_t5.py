# SPDX-License-Identifier: Apache-2.0
"""What the tests of T5 share: a tiny model with random parameters, a gate that can be read off the ids, references."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.t5 import T5
from tests.layers import numpy_t5

# Few buckets, so that short sequences reach the logarithmic ones.
SIZES = dict(
    vocab_size=40, width=16, mlp_dim=24, heads=2, head_dim=8, encoder_layers=3, decoder_layers=1, num_buckets=8,
    max_distance=12, softmax="off_by_one",
)  # fmt: skip
GATE_LAYER = 2
LENGTH = 16
MODEL = T5(**SIZES, gate="mrt5", gate_layer=GATE_LAYER)
RUNGS = (6, 12, 32)


def by_digit(tokens, signals, *, scale=-30.0):
    """A gate that a test can read off the ids: the last digit says how much of `scale` a token gets, 0 to keep."""
    return jnp.where(tokens.valid, scale * (signals.token_ids % 10) / 9, scale)


def draw(seed=0, lengths=(LENGTH, 9), length=LENGTH, targets=5):
    """Ids without 0 in real tokens, mask, and decoder ids; the same tokens whatever the padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), length), np.int32)
    ids[:, :LENGTH] = rng.integers(1, SIZES["vocab_size"], (len(lengths), LENGTH))
    ids *= np.arange(length) < np.array(lengths)[:, None]
    decoder_ids = np.pad(rng.integers(1, SIZES["vocab_size"], (len(lengths), targets - 1)), ((0, 0), (1, 0)))
    return ids, ids != 0, decoder_ids.astype(np.int32)


@functools.cache
def variables(tied=False):
    """Random parameters, large enough that every part of the model shows in the logits."""
    model = MODEL.clone(tie_embeddings=tied)
    ids, mask, decoder_ids = draw()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, decoder_ids))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def sharpen(params, factor=1e4, bias=0.0):
    """Parameters whose gate is decided: logits far from 0 for every token, about half of them on either side."""
    logit = params["delete_gate"]["logit"]
    logit = {"kernel": logit["kernel"] * factor, "bias": np.full_like(logit["bias"], bias)}
    return params | {"delete_gate": params["delete_gate"] | {"logit": logit}}


@functools.cache
def runner(model=MODEL, deletion=None, deterministic=True):
    def run(params, ids, mask=None, decoder_ids=None, rng=0):
        rngs = {name: jax.random.fold_in(jax.random.key(rng), i) for i, name in enumerate(("deletion", "dropout"))}
        rngs = None if deterministic else rngs
        return model.apply(
            {"params": params}, ids, mask, decoder_ids, deletion=deletion, deterministic=deterministic, rngs=rngs
        )

    # The compiler takes most of the time here; without its optimisations it takes half.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"})


def with_gate(gate, **attributes):
    return MODEL.clone(gate=gate, **attributes)


def reference(params, batch, sizes=SIZES, **how):
    """Logits of every row; `how` maps a row to what the NumPy encoder takes."""
    rows = []
    for row, (ids, mask, decoder_ids) in enumerate(zip(*batch, strict=True)):
        encoded, key_bias = numpy_t5.encode(
            params, ids, mask, sizes, gate_layer=GATE_LAYER, **{name: make(row) for name, make in how.items()}
        )
        rows.append(numpy_t5.decode(params, decoder_ids, encoded, key_bias, sizes))
    return np.stack(rows)


def survivors(ids, mask, capacity=None):
    """What `by_digit` keeps of one row, in order: the lowest last digits where there are too many."""
    stay = [i for i in range(len(ids)) if mask[i] and ids[i] % 10 < 4.5]
    stay = stay or [min((i for i in range(len(ids)) if mask[i]), key=lambda i: ids[i] % 10)]
    return sorted(sorted(stay, key=lambda i: ids[i] % 10)[:capacity])


def stack_layers(params):
    """Parameters of unrolled layers in the layout of scanned ones."""

    def stacked(prefix, layers):
        return {"layer": jax.tree.map(lambda *leaves: np.stack(leaves), *(params[f"{prefix}_{i}"] for i in layers))}

    rest = {name: value for name, value in params.items() if not re.fullmatch(r"(en|de)coder_\d+", name)}
    return rest | {
        "lower_stack": stacked("encoder", range(GATE_LAYER)),
        "upper_stack": stacked("encoder", range(GATE_LAYER, SIZES["encoder_layers"])),
        "decoder_stack": stacked("decoder", range(SIZES["decoder_layers"])),
    }


def gradients(model, deletion, params):
    batch = draw()
    run = runner(model, deletion).__wrapped__

    def loss(params):
        logits, aux = run(params, *batch)
        return jnp.mean(jnp.sin(logits)) + (0 if deletion == "hard" else jnp.mean(aux["delete_gate"]))

    return jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": "0"})(params)
