# SPDX-License-Identifier: Apache-2.0
"""T5 with a delete gate restated in NumPy for one sequence at a time; hard deletion drops rows from lists.

Shapes: N encoder tokens, T decoder tokens, D width, H heads.
"""

import math

import numpy as np


def _norm(params, x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * np.asarray(params["scale"], np.float64)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mlp(params, x):
    gate, hidden, out = (np.asarray(params[name]["kernel"], np.float64) for name in ("gate", "hidden", "out"))
    return (_gelu(x @ gate) * (x @ hidden)) @ out


def _attention(params, x, context, bias, softmax, key_bias=0.0, scores=None):
    """`x [N, D]` attends to `context [K, D]`; `bias [H, N, K]`, `key_bias [K]`. The logits are not scaled.

    `scores` gets the logits before the key bias.
    """
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("query", "key", "value", "out")}
    query = np.einsum("nd,dhe->hne", x, kernels["query"])
    key, value = (np.einsum("nd,dhe->hne", context, kernels[name]) for name in ("key", "value"))
    logits = np.einsum("hqe,hke->hqk", query, key) + bias
    if scores is not None:
        scores.append(logits)
    weights = np.exp(logits + key_bias)
    weights /= weights.sum(-1, keepdims=True) + (softmax == "off_by_one")
    return np.einsum("hqk,hke,hed->qd", weights, value, kernels["out"])


def bucket(relative, bidirectional, num_buckets, max_distance):
    """Bucket of one relative position `key - query`, by the published formula."""
    side, offset = num_buckets, 0
    if bidirectional:
        side //= 2
        offset = side if relative > 0 else 0
        relative = -abs(relative)
    distance, exact = max(-relative, 0), side // 2
    if distance < exact:
        return offset + distance
    ratio = math.log(distance / exact) / math.log(max_distance / exact)
    # The small number undoes rounding at exact powers, which belong to the upper bucket.
    return offset + min(exact + math.floor(ratio * (side - exact) + 1e-9), side - 1)


def relative_bias(params, length, bidirectional, sizes):
    """`[H, length, length]`."""
    table = np.asarray(params["embedding"], np.float64)
    buckets = [
        [bucket(k - q, bidirectional, sizes["num_buckets"], sizes["max_distance"]) for k in range(length)]
        for q in range(length)
    ]
    return np.moveaxis(table[np.array(buckets)], -1, 0)


def encode(params, ids, mask, sizes, *, gate=None, keep=None, chunks=None, local=False, gate_layer=2, scores=None):
    """Encoder of one row: `(normed features [M, D], key bias [M])`.

    `gate(x)` gives the values `[N]` that fade keys from layer `gate_layer` on; `keep(x)` the indices that stay from there on;
    `chunks` lists the indices whose mean is one token from there on, at the place of the first. With `local` the layers before
    see their own chunk alone. `scores` gets the logits between real tokens of the layers from `gate_layer` on.
    """
    x = np.asarray(params["embedding"]["embedding"], np.float64)[ids]
    bias = relative_bias(params["encoder_bias"], len(ids), True, sizes)
    key_bias = np.where(mask, 0.0, -np.inf)
    whole = bias
    if local:
        number = np.array([next((c for c, own in enumerate(chunks) if i in own), -1) for i in range(len(ids))])
        bias = np.where(number[:, None] == number, bias, -np.inf)
    for layer in range(sizes["encoder_layers"] + 1):
        if layer == gate_layer and keep is not None:
            stay = np.asarray(keep(x))
            x, key_bias, bias = x[stay], key_bias[stay], bias[:, stay][:, :, stay]
        elif layer == gate_layer and chunks is not None:
            heads = [own[0] for own in chunks]
            x, key_bias, bias = (
                np.stack([x[own].mean(0) for own in chunks]),
                0.0 * x[heads, 0],
                whole[:, heads][:, :, heads],
            )
        elif layer == gate_layer and gate is not None:
            key_bias = key_bias + gate(x)
        if layer == sizes["encoder_layers"]:
            break
        own = params[f"encoder_{layer}"]
        normed = _norm(own["attention_norm"], x)
        found = [] if scores is not None and layer >= gate_layer else None
        x = x + _attention(own["attention"], normed, normed, bias, sizes["softmax"], key_bias, found)
        if found:
            real = np.isfinite(key_bias)
            scores.append(found[0][:, real][:, :, real])
        x = x + _mlp(own["mlp"], _norm(own["mlp_norm"], x))
    return _norm(params["encoder_norm"], x), key_bias


def decode(params, ids, encoded, key_bias, sizes, scores=None):
    """Logits `[T, V]` of one row; `scores` gets those of attention to real encoder tokens."""
    table = np.asarray(params["embedding"]["embedding"], np.float64)
    x, length = table[ids], len(ids)
    causal = np.where(np.tri(length, dtype=bool), 0.0, -np.inf)
    bias = relative_bias(params["decoder_bias"], length, False, sizes) + causal
    for layer in range(sizes["decoder_layers"]):
        own = params[f"decoder_{layer}"]
        normed = _norm(own["attention_norm"], x)
        x = x + _attention(own["attention"], normed, normed, bias, sizes["softmax"])
        normed, found = _norm(own["cross_norm"], x), []
        x = x + _attention(own["cross_attention"], normed, encoded, 0.0, sizes["softmax"], key_bias, found)
        if scores is not None:
            scores.append(found[0][:, :, np.isfinite(key_bias)])
        x = x + _mlp(own["mlp"], _norm(own["mlp_norm"], x))
    x = _norm(params["decoder_norm"], x)
    if "head" in params:
        return x @ np.asarray(params["head"]["kernel"], np.float64)
    return (x * table.shape[1] ** -0.5) @ table.T


def delete_logits(params, x):
    """Logits `[N]` of the learned gate."""
    own = params["delete_gate"]
    kernel, bias = (np.asarray(own["logit"][name], np.float64) for name in ("kernel", "bias"))
    return (_norm(own["norm"], x) @ kernel + bias)[:, 0]
