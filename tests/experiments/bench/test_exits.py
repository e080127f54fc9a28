# SPDX-License-Identifier: Apache-2.0
"""The benchmark of early exits prints its rows, here for a tiny shape."""

import json

from experiments.bench import __main__ as bench
from layers import vit


def test_more_images_that_leave_imply_more(monkeypatch, capsys):
    monkeypatch.setitem(vit.SHAPES, "S", (16, 4, 2, 32))
    assert bench.main(["exits", "--image-size=32", "--batch=4", "--repeats=1", "--share=0.25,1"]) == 0
    few, all_of_them = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert few["shape"].startswith("ViT-S/16 4x5") and few["implied"] < all_of_them["implied"]
    assert few["layers"] > all_of_them["layers"] and all_of_them["layers"] <= 2
    assert few["realised"] > 0
