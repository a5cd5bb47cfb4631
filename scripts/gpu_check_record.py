"""What the parts of the GPU check write down: figures with units, rows of them, and why something has no figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SMOKE = "a smoke run has no GPU to measure"


class Figure(NamedTuple):
    """A measured or counted number; without a value, `note` says why it was not measured, else how it was."""

    value: float | None
    unit: str
    note: str = ""

    def times(self, factor: float, unit: str) -> Figure:
        """The figure in another unit; what was not measured stays so."""
        return Figure(None if self.value is None else self.value * factor, unit, self.note)

    def shown(self) -> str:
        if self.value is None:
            return "not measured" + ("" if self.note in ("", SMOKE) else f" ({self.note})")
        return f"{self.value:,.0f} {self.unit}" if abs(self.value) >= 1000 else f"{self.value:.3g} {self.unit}"


def missing(unit: str, why: str) -> Figure:
    return Figure(None, unit, why)


def ratio(above: Figure, below: Figure, unit: str, factor: float = 1.0) -> Figure:
    """above / below * factor; not measured if one of them is not."""
    for figure in (above, below):
        if figure.value is None:
            return missing(unit, figure.note)
    assert above.value is not None and below.value is not None
    return Figure(above.value / below.value * factor, unit)


def figure_of(row: dict[str, Any] | None, name: str) -> Figure:
    """A figure of a row as it was written; one that is not there was not measured."""
    found = (row or {}).get("figures", {}).get(name)
    if found is None:
        return missing("", (row or {}).get("why") or "its part gave no such row")
    return Figure(found["value"], found["unit"], found.get("note", ""))


class Report:
    """The rows of one part, kept in a file from the first on, so that a crash loses only what came after."""

    def __init__(self, path: Path, smoke: bool) -> None:
        self.smoke, self._path = smoke, path
        self.rows: list[dict[str, Any]] = []
        self._write()

    def add(
        self, group: str, name: str, found: Mapping[str, Figure] | None = None, *, ok: bool | None = None,
        why: str = "", **more: Figure,
    ) -> None:  # fmt: skip
        """A row: `ok` says whether a check held (None: it checks nothing), `why` what was wrong."""
        row: dict[str, Any] = {"group": group, "name": name, "ok": ok}
        if why:
            row["why"] = why
        figures = {**(found or {}), **more}
        row["figures"] = {
            key: {"value": f.value, "unit": f.unit, **({"note": f.note} if f.note else {})}
            for key, f in figures.items()
        }  # fmt: skip
        self.rows.append(row)
        self._write()
        values = "  ".join(f"{key} {figure.shown()}" for key, figure in figures.items())
        mark = {None: "", True: "ok  ", False: "WRONG  "}[ok]
        print(f"  {group}: {name}  {mark}{values}{'  ' + why if why else ''}", flush=True)

    @contextmanager
    def attempt(self, group: str, name: str, check: bool = False) -> Iterator[None]:
        """Whatever fails within becomes a row that says so, a wrong one if it was a `check`."""
        try:
            yield
        except Exception as error:
            self.add(group, name, ok=False if check else None, why=f"not measured: {reason(error)}")

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows))
        partial.replace(self._path)


def reason(error: BaseException) -> str:
    """An error as one line."""
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__
