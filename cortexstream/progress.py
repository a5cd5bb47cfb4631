"""Progress for people: rich bars on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEPS = 10  # plain lines per task


def wanted(choice: bool | None) -> bool:
    """`choice`, or, when that is None, whether standard error is a terminal."""
    return sys.stderr.isatty() if choice is None else choice


@contextmanager
def progress(title: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many of `total` are done; `total` None shows activity without an end."""
    if not show:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(title, total) as update:
            yield update
    else:
        yield _lines(title, total)


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is not None:
        columns += [BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _lines(title: str, total: int | None) -> Callable[[int], None]:
    print(f"{title} ..." if total is None else f"{title}: 0 of {total}", file=sys.stderr, flush=True)
    shown = 0

    def update(done: int) -> None:
        nonlocal shown
        if total and (done * STEPS // total) > shown:
            shown = done * STEPS // total
            print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

    return update
