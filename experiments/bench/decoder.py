# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of decoder language models share: the model, its random weights, and how decoding is timed."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from experiments import measure
from experiments.bench.flags import integers
from layers import generation
from layers.decoder_lm import DecoderLM


def add_arguments(parser: argparse.ArgumentParser, *, length: int) -> None:
    """Flags of the model and of the batches."""
    parser.add_argument("--width", type=int, default=384, help="of the model (default %(default)s)")
    parser.add_argument("--depth", type=int, default=12, help="layers (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=384, help="ids (default %(default)s)")
    parser.add_argument("--batch", type=integers, default=(1, 8), help="batch sizes, comma separated (default 1,8)")
    parser.add_argument("--length", type=int, default=length, help="tokens read (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens to generate (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each function (default %(default)s)")


def make(options: argparse.Namespace, **attributes: Any) -> tuple[DecoderLM, Any]:
    """The model, with heads 32 wide of which two share keys, and random weights."""
    if options.width % 64:
        raise ValueError(f"--width must be a multiple of 64 (pairs of heads, 32 wide); got {options.width}")
    model = DecoderLM(
        vocab_size=options.vocabulary,
        width=options.width,
        depth=options.depth,
        heads=options.width // 32,
        kv_heads=options.width // 64,
        mlp_dim=4 * options.width,
        tie_embeddings=True,
        dtype=jnp.dtype(options.dtype),
        **attributes,
    )
    abstract = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return model, measure.random_like(meta.unbox(abstract), jax.random.key(0), deviation=0.05)


def prompts(options: argparse.Namespace, batch: int) -> Any:
    """Random ids `[batch, length]`."""
    return jnp.asarray(np.random.default_rng(0).integers(3, options.vocabulary, (batch, options.length)), jnp.int32)


class Decode:
    """Decoding of one model from prompts that were read, to be called again and again.

    Attributes:
      steps: of each layer `[L]`, and tokens: `[L, B]`, in one call.
    """

    def __init__(self, model: DecoderLM, variables: Any, ids: Any, max_length: int, **sampling: Any) -> None:
        # No row ends, so that all do the same work.
        settings = tuple(sorted(dict(max_length=max_length, eos_id=-1, **sampling).items()))
        cache, first = generation.prefill(model, max_length, variables, ids)
        # The compiled step of `generate_lm` would take the cache away.
        decode = jax.jit(generation.decode_lm.__wrapped__, static_argnums=(0, 1))
        self._call = functools.partial(decode, model, settings, variables, cache, first, jax.random.key(0))
        found = self._call()[1]
        self.steps, self.tokens = np.asarray(found.steps), np.asarray(found.tokens)

    def __call__(self) -> Any:
        """The generated tokens."""
        return self._call()[0].tokens


def each_batch(
    options: argparse.Namespace, model: DecoderLM, variables: Any, **sampling: Any
) -> Iterator[tuple[int, Any, Decode]]:
    """For each batch size, its prompts and the decoding of the dense model from them."""
    for batch in options.batch:
        ids = prompts(options, batch)
        yield batch, ids, Decode(model, variables, ids, options.max_length, **sampling)


def shape_of(options: argparse.Namespace, batch: int, *more: str) -> str:
    """The shape as rows name it, with what else tells them apart."""
    parts = f"{batch}x{options.length}+{options.max_length}", f"{options.depth} layers of {options.width}", *more
    return ", ".join(parts)


def row(
    options: argparse.Namespace, shape: str, pair: dict[str, measure.Timing], macs: list[float], **facts: Any
) -> dict[str, Any]:
    """A row that compares the first of `pair` and `macs`, the dense model, with the second."""
    dense, adaptive = (timing.median for timing in pair.values())
    return {
        "shape": shape,
        "device": measure.device_name(),
        "dtype": options.dtype,
        "implied": round(macs[0] / macs[1], 4),
        "realised": round(dense / adaptive, 4),
        **facts,
        "milliseconds": measure.milliseconds(pair),
        "gmacs": [round(own / 1e9, 4) for own in macs],
        "repeats": options.repeats,
    }
