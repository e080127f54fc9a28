# SPDX-License-Identifier: Apache-2.0
"""Decoding that reads the first and the latest pages of a long cache, against decoding that reads all of it.

Both decode from the same prompt with the same random weights. `implied` counts multiply-adds: attention to the listed pages in
place of all slots, and all the rest of the model. On accelerators time goes with the bytes that are read instead: the cache's
share of them is `listed_share` of what it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from adaptive import flops
from adaptive.sparsity.decoding import SinkWindow
from experiments import measure
from experiments.bench import decoder
from experiments.bench.flags import integers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    decoder.add_arguments(parser, length=4096)
    parser.add_argument("--window", type=integers, default=(256, 1024), help="latest tokens (default 256,1024)")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens (default %(default)s)")
    parser.add_argument("--page", type=int, default=64, help="slots of a page (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size and window."""
    model, variables = decoder.make(options)
    slots, steps = options.length + options.max_length, options.max_length
    for batch, ids, dense in decoder.each_batch(options, model, variables):
        for window in options.window:
            reads = SinkWindow(window, options.sinks, options.page)
            paged = decoder.Decode(model.clone(reads=reads), variables, ids, steps)
            times = measure.interleaved({"dense": dense, "sink_window": paged}, repeats=options.repeats)
            listed = min(reads.slots, slots)
            macs = [
                flops.count(model.spec().decoding(), batch=batch, slots=read, steps=steps).macs
                for read in (slots, listed)
            ]
            shape = decoder.shape_of(options, batch, f"window {window}")
            yield decoder.row(options, shape, times, macs, listed_share=round(listed / slots, 4))
