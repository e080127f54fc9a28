# SPDX-License-Identifier: Apache-2.0
"""The list of methods comes from the registry, whole."""

import json

from adaptive import registry
from experiments import methods


def test_every_method_is_listed_with_kind_signals_and_citation(capsys):
    assert methods.main(["--format=json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(registry.names())
    assert listed["tome"]["signals"] == ["keys"] and "2210.09461" in listed["tome"]["citation"]


def test_one_kind_as_markdown(capsys):
    methods.main(["--kind=deletion", "--format=markdown"])
    out = capsys.readouterr().out
    assert "mrt5" in out and "| tome" not in out and out.startswith("| name")


def test_one_method_shows_its_docstring_and_an_unknown_one_its_neighbours(capsys):
    assert methods.main(["tome"]) == 0
    assert "Differs:" in capsys.readouterr().out
    assert methods.main(["tomme"]) == 2
    assert "did you mean 'tome'" in capsys.readouterr().err
