# SPDX-License-Identifier: Apache-2.0
"""Schedules as the TPU compiler lists them: bundles, loops, regions, slots."""

import pytest

from experiments.aot import schedule

NAMES = "MATMUL, MATPUSH, VSTORE:SPILL"


def listing(bundles):
    """The two listings of `(text, matmul, spills)` for each bundle, in the compiler's format."""
    text = "\n".join(f"   0x{place:x}   : > {{ {body} }}" for place, (body, *_) in enumerate(bundles))
    rows = "\n".join(f"{matmul} 0 {spills}" for _, matmul, spills in bundles)
    return f"LH: loop header\n\n{text}\n", f"== CAPACITY:\n{NAMES}\n    4     4     1\n== UTILIZATION:\n{rows}\n"


def branch(target, region):
    return f"%1 = sbr.rel (%p1) target bundleno = {target} (0x{target:x}), region = {region}"


def grid(condition=True):
    """A loop of bundles 2 to 19, with a condition around bundles 6 to 11 in it; a branch has one delay slot."""
    bundles = [["nop", 0, 0] for _ in range(24)]
    if condition:
        bundles[4][0] = branch(12, 7)
        bundles[5][0] = "nop /* End region 5 */"
    for place in range(6, 12):
        bundles[place][1] = 4
    bundles[8][2] = 1
    bundles[18][0] = branch(2, 3)
    bundles[19][0] = "nop /* End region 3 */"
    return bundles


OUTLINE = (
    "  loop: start=0, step=1, limit=10, x\n  $region2: parent=0 // loop_pre_header\n  $region3: parent=0 // loop_body\n"
)


def test_a_loop_counts_its_trips_and_a_condition_the_share_that_takes_it():
    program = schedule.parse("kernel.1", *listing(grid()), OUTLINE)
    (loop,) = program.regions
    (condition,) = loop.inside
    assert (loop.kind, loop.bundles, loop.trips, loop.matmul_slots) == ("loop", 18, 10, 24)
    assert (condition.kind, condition.bundles, condition.trips) == ("if", 6, None)
    assert (program.bundles, program.matmul_slots, program.spill_stores) == (24, 24, 1)
    assert program.cycles() == 6 + 10 * 18
    assert program.cycles(0.5) == 6 + 10 * (12 + 3)
    assert program.cycles(0.0) == 6 + 10 * 12


def test_a_loop_of_unknown_length_counts_once():
    outline = OUTLINE.replace("limit=10", "limit=%s3")
    program = schedule.parse("kernel.1", *listing(grid()), outline)
    assert program.regions[0].trips is None and program.cycles() == 24


def test_a_condition_around_a_loop_is_a_guard_and_counts_as_taken():
    bundles = grid(condition=False)
    bundles[0][0] = branch(22, 1)
    program = schedule.parse("kernel.1", *listing(bundles), OUTLINE)
    (guard,) = program.regions
    assert (guard.kind, guard.inside[0].kind) == ("if", "loop")
    assert program.cycles(0.0) == program.cycles(1.0) == 6 + 10 * 18


def test_listings_that_do_not_fit_together_are_refused():
    bundles, slots = listing(grid())
    with pytest.raises(ValueError, match=r"the listings of kernel\.1 disagree: 24 bundles, 23 rows"):
        schedule.parse("kernel.1", bundles, slots.rsplit("\n", 2)[0], OUTLINE)
    with pytest.raises(ValueError, match="bundle 1 is numbered 0x2"):
        schedule.parse("kernel.1", bundles.replace("0x1 ", "0x2 "), slots, OUTLINE)


def test_a_folder_gives_the_programs_whose_listings_are_whole(tmp_path):
    bundles, slots = listing(grid())
    for name, parts in (("kernel.1", (bundles, slots, OUTLINE)), ("fusion", (bundles, slots))):
        labels = (schedule.BUNDLES, schedule.SLOTS, schedule.OUTLINE)
        for number, (label, text) in enumerate(zip(labels, parts, strict=False)):
            (tmp_path / f"17-{name}-{number:02}-{label}.txt").write_text(text)
    (program,) = schedule.read(tmp_path)
    assert program.name == "kernel.1" and program.plain_regions()[0]["inside"][0]["bundles"] == 6


def test_the_grid_may_stand_in_a_condition():
    loop = schedule.Region("loop", 9, 4, 0, (schedule.Region("if", 5, None, 0),))
    program = schedule.Program("kernel.1", 20, 0, 0, (schedule.Region("if", 12, None, 0, (loop,)),))
    assert program.grid == loop and program.step.bundles == 5
    with pytest.raises(ValueError, match="no loop over grid steps"):
        _ = schedule.Program("kernel.1", 20, 0, 0, (schedule.Region("if", 12, None, 0),)).grid
