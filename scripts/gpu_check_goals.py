"""The goals of the GPU check, and what was found of each: met, missed, or not measured and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu_check_record import Figure, figure_of, missing, ratio

REFERENCE = "B16 8/8x64 S2048 float16"  # 67 MB of keys and values
PEERS = ("transformers generate", "transformers generate_batch")
GENERATE_BATCHES = (16, 64)
STEP_GOALS = (("bf16", 1, 1.25), ("bf16", 16, 1.25), ("4-bit", 1, 1.5), ("4-bit", 16, 1.5))

Row = dict[str, Any]


class Goal(NamedTuple):
    """What is wanted of a figure: at least, or at most, `limit`."""

    name: str
    limit: float
    found: Figure
    at_least: bool

    def verdict(self) -> str:
        if self.found.value is None:
            return "not measured"
        met = self.found.value >= self.limit if self.at_least else self.found.value <= self.limit
        return "met" if met else "missed"

    def recorded(self) -> dict[str, Any]:
        found = {"value": self.found.value, "unit": self.found.unit}
        if self.found.note:
            found["note"] = self.found.note
        wanted = {"at_least" if self.at_least else "at_most": self.limit}
        return {"goal": self.name, "wanted": wanted, "found": found, "verdict": self.verdict()}


def find(parts: dict[str, Any], group: str, name: str) -> Row:
    """A row by its names; if its part did not end well, one that says how it ended."""
    rows = [row for part in parts.values() for row in part["rows"]]
    for row in rows:
        if (row["group"], row["name"]) == (group, name):
            return dict(row)
    for row in rows:  # what failed earlier than this row may be named by less
        if row["group"] == group and name.startswith(row["name"]) and row.get("why"):
            return dict(row)
    ended = [f"{stage} {part['ended']}" for stage, part in parts.items() if part["ended"] != "finished"]
    return {"why": "; ".join(ended) or "no part of this run measures it"}


def goals(parts: dict[str, Any]) -> Iterator[Goal]:
    """In the order of the parts. In a smoke run none has a figure."""
    reference = find(parts, "decode", REFERENCE)
    share = figure_of(reference, "share")
    yield Goal(f"decode attention, {REFERENCE}: share of the read bandwidth", 80.0, share, True)
    faster = figure_of(reference, "sdpa_ratio")
    yield Goal("the same: time of torch SDPA over ours", 1.0, faster, True)
    for weights, batch, limit in STEP_GOALS:
        above = figure_of(find(parts, "step", f"{weights}, batch {batch}"), "above")
        yield Goal(f"Llama 3 8B decode step, {weights}, batch {batch}: over its floor", limit, above, False)
    for batch in GENERATE_BATCHES:
        ours = figure_of(find(parts, "served", f"bf16, batch {batch}"), "rate")
        for peer in PEERS:
            theirs = figure_of(find(parts, "served", f"{peer}, batch {batch}"), "rate")
            times = ratio(ours, theirs, "times as many tokens/s")
            yield Goal(f"tokens/s, bf16, batch {batch}: ours over {peer}", 1.0, times, True)


def checks(parts: dict[str, Any]) -> dict[str, Figure]:
    """Per part, how many of its checks held; what was not checked is not counted."""
    found = {}
    for stage, part in parts.items():
        results = [row["ok"] for row in part["rows"] if row["ok"] is not None]
        if results:
            found[stage] = Figure(float(sum(results)), f"of {len(results)} checks hold")
        elif part["ended"] != "finished":
            found[stage] = missing("checks", part["ended"])
    return found


def sound(parts: dict[str, Any]) -> bool:
    """Did every part come to its end, and every check hold?"""
    rows = [row for part in parts.values() for row in part["rows"]]
    return all(part["ended"] == "finished" for part in parts.values()) and all(row["ok"] is not False for row in rows)


def show(parts: dict[str, Any], found: list[Goal]) -> None:
    print("\nchecks")
    for stage, figure in checks(parts).items():
        held = "not checked: " + figure.note if figure.value is None else f"{figure.value:.0f} {figure.unit}"
        print(f"  {stage:16} {held}")
    print("\ngoals")
    for goal in found:
        wanted = f"{'>=' if goal.at_least else '<='} {goal.limit:g}"
        value = f": {goal.found.note}" if goal.found.value is None else f"{goal.found.value:.3g}"
        print(f"  {goal.name:78} {wanted:8} {goal.verdict():12} {value}")
