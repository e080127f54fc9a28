# SPDX-License-Identifier: Apache-2.0
"""Reads the schedules that the TPU compiler writes: bundles (one a cycle), loops, conditional regions, matrix slots, spills.

A bundle is what all units of a core do in one cycle, so that bundles of straight code are cycles. They are counted before runs
of empty ones are folded into delays. What memory does meanwhile is not in them: times from here are estimates.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

_FILE = re.compile(r"^(\d+)-(.*)-(\d\d+)-([^/]*)\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:\s?[> ]*\{")
_BRANCH = re.compile(r"sbr\.(?:rel|abs|ind)[^;}]*?target bundleno = (\d+) \(0x[0-9a-f]+\)(?:, region = (\d+))?")
_LOOP = re.compile(r"^\s*loop:\s*start=([^,]*),\s*step=([^,]*),\s*limit=([^,]*)")
_REGION = re.compile(r"^\s*\$region(\d+):.*?//\s*(\w+)")
_DEFAULT_DELAY = 4

BUNDLES, SLOTS, OUTLINE = (
    "packed-bundles-post-ra",
    "pre-delay_hlo-static-per-bundle-utilization",
    "post-delay-converter",
)


@dataclasses.dataclass(frozen=True)
class Region:
    """A loop, or what a branch may skip.

    Attributes:
      kind: "loop" or "if".
      bundles: in it, all that it holds included.
      trips: of a loop, where the compiler knows them.
      matmul_slots: cycles of matrix units that are in use, summed over the units.
      inside: regions that it holds.
    """

    kind: str
    bundles: int
    trips: int | None
    matmul_slots: int
    inside: tuple[Region, ...] = ()

    @property
    def own(self) -> int:
        """Bundles outside the regions that it holds."""
        return self.bundles - sum(region.bundles for region in self.inside)

    def cycles(self, taken: float = 1.0) -> float:
        """Of one entry, when conditional regions run on the share `taken` of the passes."""
        total = self.own + sum(region.cycles(taken) for region in self.inside)
        if self.kind == "loop":
            return total * (self.trips or 1)
        # Around a loop it asks whether there is anything to do at all.
        guard = any(region.kind == "loop" for region in self.inside)
        return total if guard else total * taken


@dataclasses.dataclass(frozen=True)
class Program:
    """One scheduled kernel, fusion or product.

    Attributes:
      name: of the kernel as its `pallas_call` has it, with a number.
      bundles, matmul_slots: of all of it. spill_stores: registers that are written to memory for want of room.
      regions: outermost ones.
    """

    name: str
    bundles: int
    matmul_slots: int
    spill_stores: int
    regions: tuple[Region, ...]

    @property
    def grid(self) -> Region:
        """The loop over grid steps: the longest one, which chips of two cores put into a condition.

        Raises:
          ValueError: there is no loop.
        """
        loops = list(_loops(self.regions))
        if not loops:
            raise ValueError(f"{self.name} has no loop over grid steps")
        return max(loops, key=lambda region: region.bundles)

    @property
    def step(self) -> Region:
        """What a grid step runs, the pipeline's bookkeeping around it left out: the longest region of the grid's loop.

        The pipeline passes two times more than there are steps, and guards the step's own work.
        """
        return max(self.grid.inside, key=lambda region: region.bundles, default=self.grid)

    def plain_regions(self) -> list[dict[str, Any]]:
        """The regions as JSON."""
        return [dataclasses.asdict(region) for region in self.regions]

    def cycles(self, taken: float = 1.0) -> float:
        """Of one run; see `Region.cycles`. A loop whose length is not known counts once."""
        outside = self.bundles - sum(region.bundles for region in self.regions)
        return outside + sum(region.cycles(taken) for region in self.regions)


def _loops(regions: Iterable[Region]) -> Iterator[Region]:
    """Loops that are in no other loop."""
    for region in regions:
        yield from [region] if region.kind == "loop" else _loops(region.inside)


def read(folder: str | pathlib.Path) -> list[Program]:
    """The programs whose schedules lie in a dump folder, in the order of compilation."""
    listings: dict[tuple[str, str], dict[str, pathlib.Path]] = collections.defaultdict(dict)
    for path in sorted(pathlib.Path(folder).glob("*.txt")):
        if match := _FILE.match(path.name):
            listings[match[1], match[2]][match[4]] = path
    return [
        parse(name, *(files[part].read_text(errors="replace") for part in (BUNDLES, SLOTS, OUTLINE)))
        for (_, name), files in listings.items()
        if {BUNDLES, SLOTS, OUTLINE} <= files.keys()
    ]


def parse(name: str, bundles: str, slots: str, outline: str) -> Program:
    """A program from the three listings of it.

    Raises:
      ValueError: they are not numbered as the compiler numbers bundles: another version of it, perhaps.
    """
    texts = _bundles(bundles)
    used = _slots(slots)
    if any(len(column) != len(texts) for column in used.values()):
        raise ValueError(f"the listings of {name} disagree: {len(texts)} bundles, {len(used['MATMUL'])} rows of slots")
    trips = _trips(outline)
    spans = _spans(texts)
    return Program(
        name,
        bundles=len(texts),
        matmul_slots=sum(used["MATMUL"]),
        spill_stores=sum(used["VSTORE:SPILL"]),
        regions=_nested(spans, 0, len(texts) - 1, trips, used["MATMUL"]),
    )


def _bundles(text: str) -> list[str]:
    """The text of each bundle."""
    found: list[str] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match and int(match[1], 0) != len(found):
            raise ValueError(f"bundle {len(found)} is numbered {match[1]}")
        if match:
            found.append(line)
        elif found:
            found[-1] += "\n" + line
    return found


def _slots(text: str) -> dict[str, list[int]]:
    """Slots in use by kind, bundle by bundle."""
    names: list[str] = []
    rows: list[list[int]] = []
    for line in text.splitlines():
        if "MATMUL" in line and "," in line:
            names = [name.strip() for name in line.split(",")]
        elif names and re.fullmatch(r"[\d\s]+", line) and len(line.split()) == len(names):
            rows.append([int(number) for number in line.split()])
    # The first row of numbers is how many of each there are.
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}


def _trips(text: str) -> dict[int, int]:
    """Trips of the loops whose bounds are numbers, by the region of their body."""
    found: dict[int, int] = {}
    bounds: tuple[str, ...] | None = None
    for line in text.splitlines():
        if match := _LOOP.match(line):
            bounds = match.groups()
        elif (match := _REGION.match(line)) and bounds and match[2] == "loop_body":
            if all(re.fullmatch(r"\s*-?\d+\s*", bound) for bound in bounds):
                start, step, limit = map(int, bounds)
                found[int(match[1])] = max(0, math.ceil((limit - start) / step))
            bounds = None
    return found


def _spans(bundles: list[str]) -> list[tuple[str, int, int, int | None]]:
    """`(kind, first, last, number)` of loops and of what branches skip."""
    branches = [
        (place, int(match[1]), int(match[2]) if match[2] else None)
        for place, text in enumerate(bundles)
        for match in _BRANCH.finditer(text)
    ]
    delay = _delay(bundles, [place for place, *_ in branches])
    spans = []
    for place, target, number in branches:
        if target <= place:
            spans.append(("loop", target, min(place + delay, len(bundles) - 1), number))
        elif target > place + delay + 1:
            spans.append(("if", place + delay + 1, target - 1, number))
    return spans


def _delay(bundles: list[str], branches: list[int]) -> int:
    """Bundles after a branch that still run: the listing closes the branch's region in the last of them."""
    seen = collections.Counter()
    for place in branches:
        after = (step for step in range(1, 9) if "End region" in "".join(bundles[place + step : place + step + 1]))
        seen.update([step for step in [next(after, None)] if step])
    return seen.most_common(1)[0][0] if seen else _DEFAULT_DELAY


def _nested(
    spans: list[tuple[str, int, int, int | None]], first: int, last: int, trips: dict[int, int], matmul: list[int]
) -> tuple[Region, ...]:
    """The outermost of the spans within bundles `first` to `last`, with what they hold."""
    # Of two spans of one extent, the condition is around the loop.
    ordered = sorted(spans, key=lambda span: (span[1], -span[2], span[0] == "loop"))
    regions, reached = [], first - 1
    for place, (kind, begin, end, number) in enumerate(ordered):
        if begin <= reached or begin < first or end > last:
            continue
        held = [span for span in ordered[place + 1 :] if span[1] >= begin and span[2] <= end]
        inside = _nested(held, begin, end, trips, matmul)
        count = trips.get(number) if kind == "loop" and number is not None else None
        regions.append(Region(kind, end - begin + 1, count, sum(matmul[begin : end + 1]), inside))
        reached = end
    return tuple(regions)
