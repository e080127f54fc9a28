# SPDX-License-Identifier: Apache-2.0
"""FlexAttention with a block mask, for its speed alone, beside PyTorch's own dense attention.

    python experiments/peers/torch_flex_attention.py --length=16384 --heads=32 --width=128 --density=0.1 --dtype=bfloat16

Needs PyTorch and nothing of this project. Every head lists its own blocks: those that a file names, a byte for each head,
query block and key block, or as many at random for each query block. Prints one line of JSON: milliseconds of the dense and the
sparse attention, forward and with the backward pass, whose calls alternate, and of making the block mask.

Source: PyTorch documentation of `torch.nn.attention.flex_attention`.
"""

import argparse
import json
import statistics
import sys
import time

try:
    import torch
    from torch.nn import functional
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    sys.exit("this script needs PyTorch 2.5 or later: run it with an interpreter that has it")


def listed_blocks(options, device):
    """`[heads, query blocks, key blocks]`, True where a block is listed."""
    blocks = -(-options.length // options.block)
    if options.blocks:
        with open(options.blocks, "rb") as file:
            kept = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        return kept.reshape(options.heads, blocks, blocks).bool().to(device)
    scores = torch.rand(options.heads, blocks, blocks, device=device)
    if options.causal:
        scores = scores.masked_fill(torch.ones(blocks, blocks, device=device).triu(1).bool(), -1.0)
    listed = max(1, round(options.density * blocks))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(listed, dim=2).indices, True)
    return kept & (scores >= 0)


def mask_rule(options, device):
    """A rule over (batch, head, query, key) that follows the listed blocks."""
    kept = listed_blocks(options, device)

    def rule(batch, head, query, key):
        inside = kept[head, query // options.block, key // options.block]
        return inside & (query >= key) if options.causal else inside

    return rule


def milliseconds(functions, repeats, wait):
    """Median milliseconds of a call of each function, taken in turn after three calls of each."""
    taken = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            wait()
            if repeat >= 3:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 4) for name, times in taken.items()}


def main():
    """Reads the arguments, prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "batch": 1,
        "length": 4096,
        "heads": 4,
        "kv-heads": 4,
        "width": 64,
        "block": 128,
        "repeats": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--density", type=float, default=0.25, help="of blocks at random")
    parser.add_argument("--blocks", default="", help="file of listed blocks")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--eager", action="store_true", help="do not compile (for a look at results on a CPU)")
    options = parser.parse_args()
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, options.dtype)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    # FlexAttention has no backward pass on a CPU.
    trains = device == "cuda"
    query, key, value = (
        torch.randn(options.batch, h, options.length, options.width, device=device, dtype=dtype, requires_grad=trains)
        for h in heads
    )
    grouped = options.heads != options.kv_heads
    rule = mask_rule(options, device)
    sizes = (None, options.heads, options.length, options.length)
    make = lambda: create_block_mask(rule, *sizes, device=device, BLOCK_SIZE=options.block)  # noqa: E731
    mask = make()
    attend = flex_attention if options.eager else torch.compile(flex_attention)

    def sparse():
        return attend(query, key, value, block_mask=mask, enable_gqa=grouped)

    def dense():
        return functional.scaled_dot_product_attention(query, key, value, is_causal=options.causal, enable_gqa=grouped)

    functions = {"dense": torch.no_grad()(dense), "sparse": torch.no_grad()(sparse), "mask": make}
    if trains:
        functions["dense_both"] = lambda: dense().sum().backward()
        functions["sparse_both"] = lambda: sparse().sum().backward()
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = milliseconds(functions, options.repeats, wait)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    density = round(1 - mask.sparsity() / 100, 4)
    print(
        json.dumps({"library": f"torch {torch.__version__}", "device": name, "density": density, "milliseconds": times})
    )


if __name__ == "__main__":
    main()
