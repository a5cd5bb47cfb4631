"""The contract of cortexstream.backend, held by every backend: plans made by hand, no scheduler."""

from __future__ import annotations

import resource
from importlib import import_module
from typing import Any

import pytest

from cortexstream.backend import Backend, BackendOptions
from cortexstream.errors import EngineError
from cortexstream.models import tiny_folder
from cortexstream.plan import PENDING, KVRows, Move, PlanRow, StepPlan
from tests.conftest import require
from tests.contract.plans import BLOCK, GREEDY, prompt, rows_at


class Driver:
    """Numbers the steps and keeps nothing in flight."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.step = backend, 0

    def plan(self, *rows: PlanRow, moves: tuple[Move, ...] = ()) -> StepPlan:
        self.step += 1
        return StepPlan(self.step, rows, moves)

    def run(self, *rows: PlanRow, moves: tuple[Move, ...] = ()) -> list[int]:
        result = self.backend.collect(self.backend.submit(self.plan(*rows, moves=moves)))
        assert result.step == self.step
        assert [r.seq_id for r in result.rows] == [row.seq_id for row in rows if row.sample is not None]
        assert not any(r.error for r in result.rows)
        return [r.token for r in result.rows]

    def generate(self, tokens: tuple[int, ...], kv: KVRows, count: int, chunk: int = 10**6, slot: int = 0) -> list[int]:
        """The prompt in chunks, then single tokens: what a sequence gives alone."""
        known = list(tokens)
        start = 0
        drawn: list[int] = []
        while len(drawn) < count:
            part = tuple(known[start : start + chunk])
            last = start + len(part) == len(known)
            row = PlanRow(7, slot, part, start, kv, GREEDY if last else None)
            got = self.run(row)
            start += len(part)
            drawn += got
            known += got
        return drawn


def test_kv_bytes_are_what_the_model_says(backend: Backend) -> None:
    module = import_module(f"cortexstream.backends.{backend.info.name}")
    extra = {"vocab_size": 384} if backend.info.name == "null" else {}
    model = None if backend.info.name == "null" else str(tiny_folder())
    other: Backend = module.create(BackendOptions(model, block_tokens=BLOCK, extra=extra))
    assert other.allocate_kv(10) == 10 * BLOCK * other.model.kv_bytes_per_token
    other.close()


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_change_nothing(backend: Backend, chunk: int) -> None:
    driver = Driver(backend)
    tokens = prompt(50)
    whole = driver.generate(tokens, rows_at(backend, 0, 5), 12)
    assert driver.generate(tokens, rows_at(backend, 9, 5), 12, chunk) == whole


def test_rows_of_every_kind_in_one_step(backend: Backend) -> None:
    """A prompt chunk, a last chunk and two decoding rows, in an order unlike that of their blocks."""
    driver = Driver(backend)
    prompts = [prompt(n, n) for n in (20, 33, 18, 40)]
    places = [rows_at(backend, first, 4) for first in (18, 6, 12, 0)]
    expected = [driver.generate(p, rows_at(backend, 0, 4), 3) for p in prompts]
    first, second = driver.run(
        PlanRow(0, 0, prompts[0], 0, places[0], GREEDY), PlanRow(1, 1, prompts[1], 0, places[1], GREEDY)
    )
    assert [first, second] == [expected[0][0], expected[1][0]]
    got = driver.run(
        PlanRow(2, 2, prompts[2], 0, places[2], GREEDY),
        PlanRow(0, 0, (first,), 20, places[0], GREEDY),
        PlanRow(3, 3, prompts[3][:25], 0, places[3], None),
        PlanRow(1, 1, (second,), 33, places[1], GREEDY),
    )
    assert got == [expected[2][0], expected[0][1], expected[1][1]]
    assert driver.run(PlanRow(3, 3, prompts[3][25:], 25, places[3], GREEDY)) == [expected[3][0]]


def test_pending_is_what_the_slot_drew_in_the_plan_before(backend: Backend) -> None:
    """Two plans in flight: the second feeds tokens that the host has not read; one row also has penalties on them."""
    driver = Driver(backend)
    places = [rows_at(backend, 0, 4), rows_at(backend, 8, 4)]
    prompts = [prompt(30, 1), prompt(12, 2)]
    spec = GREEDY._replace(repetition_penalty=1.5, prompt_tokens=prompts[1], output_tokens=())
    one = driver.plan(PlanRow(0, 0, prompts[0], 0, places[0], GREEDY), PlanRow(1, 1, prompts[1], 0, places[1], spec))
    two = driver.plan(
        PlanRow(1, 1, (PENDING,), 12, places[1], spec._replace(output_tokens=(PENDING,))),
        PlanRow(0, 0, (PENDING,), 30, places[0], GREEDY),
    )
    tickets = [backend.submit(one), backend.submit(two)]
    first, second = (backend.collect(ticket) for ticket in tickets)
    a, b = (row.token for row in first.rows)
    again = [rows_at(backend, 4, 4), rows_at(backend, 12, 4)]
    assert driver.run(PlanRow(0, 0, (*prompts[0], a), 0, again[0], GREEDY)) == [second.rows[1].token]
    told = spec._replace(output_tokens=(b,))
    assert driver.run(PlanRow(1, 1, (*prompts[1], b), 0, again[1], told)) == [second.rows[0].token]


def test_moves_come_first_and_keep_contents(backend: Backend) -> None:
    """Apart, overlapping, and growing in place; the next token is as if nothing had moved."""
    if backend.info.kv_layout == "paged":
        pytest.skip("paged sequences never move")
    driver = Driver(backend)
    tokens = prompt(40)
    expected = driver.generate(tokens, rows_at(backend, 0, 4), 4)
    drawn = driver.run(PlanRow(0, 0, tokens, 0, rows_at(backend, 2, 3), GREEDY))
    for place, size, moves in (
        (8, 4, (Move(2, 3, 8, 4, 40),)),
        (7, 4, (Move(8, 4, 7, 4, 41),)),
        (10, 6, (Move(7, 4, 7, 6, 42), Move(7, 6, 10, 6, 42))),
    ):
        row = PlanRow(0, 0, (drawn[-1],), 39 + len(drawn), rows_at(backend, place, size), GREEDY)
        drawn += driver.run(row, moves=moves)
    assert drawn == expected


def test_misuse_is_told(backend: Backend) -> None:
    driver = Driver(backend)
    ticket: Any = backend.submit(driver.plan(PlanRow(0, 0, prompt(5), 0, rows_at(backend, 0, 1), GREEDY)))
    backend.collect(ticket)
    with pytest.raises(EngineError, match=r"step 1 .*collected|collected"):
        backend.collect(ticket)
    with pytest.raises(EngineError, match="slot 3"):
        backend.submit(driver.plan(PlanRow(0, 3, (PENDING,), 5, rows_at(backend, 0, 1), GREEDY)))


def test_a_row_that_cannot_draw_fails_alone(backend: Backend) -> None:
    driver = Driver(backend)
    everything = GREEDY._replace(banned=tuple(range(384)))
    plan = driver.plan(
        PlanRow(0, 0, prompt(5), 0, rows_at(backend, 0, 1), everything),
        PlanRow(1, 1, prompt(9), 0, rows_at(backend, 1, 1), GREEDY),
    )
    bad, good = backend.collect(backend.submit(plan)).rows
    assert bad.error is not None and "banned" in bad.error
    assert good.error is None and good.token == driver.generate(prompt(9), rows_at(backend, 4, 1), 1)[0]


def test_warmup_leaves_nothing_behind(backend: Backend) -> None:
    driver = Driver(backend)
    before = driver.generate(prompt(20), rows_at(backend, 0, 4), 5)
    backend.warmup(prompt_tokens=40, batch=4)
    assert driver.generate(prompt(20), rows_at(backend, 2, 4), 5) == before


@pytest.mark.parametrize("name", ["reference", "mlx"])
def test_f25_memory_is_touched_when_it_is_allocated(name: str) -> None:
    """No request pays for a page fault: writing all of the KV for the first time meets memory that is there already."""
    if name == "mlx":
        require("mlx")
        require("mlx_lm")
    module = import_module(f"cortexstream.backends.{name}")
    made: Any = module.create(BackendOptions(str(tiny_folder()), block_tokens=BLOCK, kv_layout="run"))
    num_blocks = 256
    pages = made.allocate_kv(num_blocks) // resource.getpagesize()
    place = KVRows(tuple(range(num_blocks)), True)
    move = Move(0, num_blocks // 2, num_blocks // 2, num_blocks // 2, BLOCK * num_blocks // 2)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    row = PlanRow(0, 0, (5,), 0, place, GREEDY)
    made.collect(made.submit(StepPlan(1, (row,), (move,))))
    # The move's temporary is half of one layer at a time, and may be new memory; the pools themselves must not be.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < pages / 2
    made.close()
