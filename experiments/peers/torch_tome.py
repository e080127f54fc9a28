# SPDX-License-Identifier: Apache-2.0
"""ToMe in plain PyTorch, for its speed alone: a pre-norm ViT with random weights that merges to given numbers of tokens.

    python experiments/peers/torch_tome.py --variant=B/16 --batch=8 --counts=184,171,158,145,132,119,106,93,80,67,54,41

Needs PyTorch and nothing of this project. Attention is PyTorch's own fused product, with the log size of tokens as its mask
from the first merge on; matching and merging follow the published code: gathers, `scatter_reduce`, concatenation. Prints one
line of JSON: images a second of the dense and the merging model, whose calls alternate.

Source: Bolya et al. 2023 (ToMe), section 3 and appendix D.
"""

import argparse
import json
import statistics
import sys
import time

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:
    sys.exit("this script needs PyTorch: run it with an interpreter that has it")

# Width, depth, heads, MLP width.
SHAPES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def match(keys, removed):
    """ToMe's matching on keys `[B, N, C]`: `merge(x)` adds the rows of `removed` even tokens to their best odd ones."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, stay = order[:, :removed, None], order[:, removed:].sort(dim=1)[0][..., None]
    target = partner[..., None].gather(1, merged)

    def merge(x):
        even, odd = x[:, ::2], x[:, 1::2]
        width = x.shape[-1]
        moved = even.gather(1, merged.expand(-1, -1, width))
        kept = even.gather(1, stay.expand(-1, -1, width))
        return torch.cat([kept, odd.scatter_reduce(1, target.expand(-1, -1, width), moved, "sum")], dim=1)

    return merge


class Block(nn.Module):
    """Attention, merging, MLP."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, size, removed):
        """Tokens and their sizes after the block."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        bias = None if size is None else size.log()[:, None, None, :, 0].to(x.dtype)
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        if removed:
            merge = match(key.mean(dim=1), removed)
            size = torch.ones_like(x[..., :1], dtype=torch.float32) if size is None else size
            total = merge(size)
            x, size = (merge(x * size.to(x.dtype)) / total.to(x.dtype)), total
        return x + self.mlp_out(functional.gelu(self.hidden(self.norm2(x)))), size


class ViT(nn.Module):
    """A ViT that leaves `counts[l]` tokens after layer l; all when None."""

    def __init__(self, variant, image_size, counts=None):
        super().__init__()
        name, patch = variant.split("/")
        width, depth, heads, hidden = SHAPES[name]
        tokens = (image_size // int(patch)) ** 2 + 1
        counts = counts or [tokens] * depth
        self.removed = [before - after for before, after in zip([tokens, *counts], counts)]  # noqa: B905
        if len(counts) != depth or any(r < 0 or r > (b - 1) // 2 for r, b in zip(self.removed, [tokens, *counts])):  # noqa: B905
            raise SystemExit(f"counts {counts} do not fit {depth} layers and {tokens} tokens: at most half can merge")
        self.patch = nn.Conv2d(3, width, int(patch), int(patch))
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images):
        """Logits `[B, 1000]`."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        size = None
        for block, removed in zip(self.blocks, self.removed):  # noqa: B905
            x, size = block(x, size, removed)
        return self.head(self.norm(x[:, 0]))


def seconds(models, images, repeats):
    """Median seconds of each model's call, taken in turn after two calls of each."""
    taken = [[] for _ in models]
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for model, times in zip(models, taken):  # noqa: B905
                start = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if repeat >= 2:
                    times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def main():
    """Reads the arguments, prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--counts", default="", help="tokens after each layer, comma separated; dense alone when empty")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, options.dtype)
    counts = [int(count) for count in options.counts.split(",")] if options.counts else None
    make = lambda counts: ViT(options.variant, options.image_size, counts).eval().to(device, dtype)  # noqa: E731
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device, dtype=dtype)
    dense, merging = seconds([make(None), make(counts)], images, options.repeats)
    rates = {"dense": round(options.batch / dense, 3), "reduced": round(options.batch / merging, 3)}
    threads = torch.get_num_threads()
    print(json.dumps({"library": f"torch {torch.__version__}", "threads": threads, "images_per_second": rates}))


if __name__ == "__main__":
    main()
