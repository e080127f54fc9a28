# SPDX-License-Identifier: Apache-2.0
"""The benchmark of DiffRate: its schedule, and how it asks another interpreter for the peer's figures."""

import argparse

import pytest

from experiments.bench import diffrate, vit
from experiments.bench.diffrate import schedule_of
from layers.learned_rates import as_reduce


def options(**values):
    parser = argparse.ArgumentParser()
    diffrate.add_arguments(parser)
    return parser.parse_args([f"--{key.replace('_', '-')}={value}" for key, value in values.items()])


def interpreter(folder, body):
    """A program that stands for an interpreter with PyTorch."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("variant", ["B/16", "L/16", "H/14"])
def test_the_schedule_of_each_shape_meets_its_budget_and_prunes_and_merges(variant):
    model = vit.dense_model(variant, options())
    hook = as_reduce(schedule_of(model, 0.6))
    macs = [sum(model.spec().macs(counts=counts).values()) for counts in (None, hook.counts)]
    assert 0.59 <= macs[1] / macs[0] <= 0.6
    alive = dict(hook.layered)["alive"]
    before = (model.num_tokens, *hook.counts[:-1])
    assert hook.counts[0] == model.num_tokens
    assert all(now > left > merged for now, left, merged in list(zip(before, alive, hook.counts, strict=True))[1:])


def test_the_peer_gets_the_shape_and_the_tokens_of_every_layer(tmp_path):
    body = f'echo "$@" > {tmp_path}/arguments\necho \'{{"images_per_second": {{"dense": 1.5, "reduced": 2.5}}}}\''
    chosen = options(peer_python=interpreter(tmp_path, body), image_size=64, repeats=3)
    row = diffrate._peer(chosen, "Ti/16", 2, (17, 15, 12))
    assert row == {"peer": {"images_per_second": {"dense": 1.5, "reduced": 2.5}}}
    script, *arguments = (tmp_path / "arguments").read_text().split()
    assert script.endswith("experiments/peers/torch_tome.py")
    assert {"--variant=Ti/16", "--batch=2", "--image-size=64", "--counts=17,15,12", "--repeats=3"} <= set(arguments)


def test_a_peer_that_cannot_run_says_why(tmp_path):
    chosen = options(peer_python=interpreter(tmp_path, "echo 'this script needs PyTorch' >&2; exit 1"))
    with pytest.raises(ValueError, match=r"(?s)the peer failed: .*torch_tome.py.*this script needs PyTorch"):
        diffrate._peer(chosen, "Ti/16", 2, (17, 15, 12))
