# SPDX-License-Identifier: Apache-2.0
"""Published schedules against the published counts."""

import pytest

from experiments.studies.diffrate import published, shapes


@pytest.mark.parametrize("name", published.SCHEDULES)
def test_multiply_adds_of_published_schedules_are_the_published_ones(name):
    assert published.gmacs(name) == pytest.approx(published.MACS[name], rel=1e-3)


def test_the_schedule_of_the_shapes_spends_the_budget_half_on_pruning():
    model = published.model_of("DeiT-B 11.5")
    schedule = shapes.schedule_of(model, 0.6)
    dense = sum(model.spec().macs().values())
    share = sum(model.spec().macs(counts=schedule.counts).values()) / dense
    assert 0.598 < share <= 0.6
    before = (197, *schedule.counts[:-1])
    for entering, alive, left in zip(before, schedule.prune, schedule.merge, strict=True):
        assert abs((entering - alive) - (alive - left)) <= 1
