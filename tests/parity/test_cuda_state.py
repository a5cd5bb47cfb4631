"""What the CUDA backend keeps on the device between steps: block tables and last draws; and its draw against the
definition, in bulk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cortexstream import LLM
from cortexstream.backend import BackendOptions, LayerKV, ModelInfo
from cortexstream.errors import EngineError
from cortexstream.models import tiny_folder
from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan
from cortexstream.sampling import top_logprobs
from tests.conftest import require

torch: Any = require("torch")
require("transformers")
CPU = torch.device("cpu")


def tables(max_tokens: int = 64) -> Any:
    """Of four slots, blocks of 4 tokens, one pool and a ring of 8."""
    from cortexstream.backends.common.kv_memory import KVMemory
    from cortexstream.backends.cuda.block_tables import BlockTables
    from cortexstream.backends.cuda.store import store_maker

    layers = (LayerKV(1, 8, 8), LayerKV(1, 8, 8, 8))
    model = ModelInfo("x", 90, max_tokens, frozenset(), layers, 4, 0)
    memory = KVMemory(store_maker(torch.float32, CPU), model, (40, 8), 4, 1 << 30)
    return BlockTables(memory, 4, max_tokens, CPU)


def kv(*blocks: int, ring: tuple[int, ...] = (0, 1)) -> KVRows:
    return KVRows(blocks, False, (KVRows(ring, True),))


def test_a_slot_shows_the_blocks_of_who_has_it_now() -> None:
    """Grown, shortened, another sequence's with fewer or equal many blocks, and rings that are repeated."""
    made = tables()
    for row in (kv(3), kv(3, 7), kv(3, 7, 9), kv(5), kv(6, 7, 9), kv(6, 8), kv(6, 8, ring=(4, 3))):
        made.update([(1, row), (2, kv(20, 21))])
        assert made.tables[0][1, : len(row.blocks)].tolist() == list(row.blocks)
        assert made.tables[1][1].tolist() == list(row.rings[0].blocks) * 8
        assert made.tables[0][2, :2].tolist() == [20, 21]
    assert not made.tables[0][[0, 3]].any()


def test_a_refused_row_leaves_every_table_as_it_was() -> None:
    made = tables(max_tokens=12)
    made.update([(0, kv(3, 7))])
    with pytest.raises(EngineError, match=r"a row of slot 1 has 4 blocks; the model's context .* at most 3"):
        made.update([(0, kv(5, 6)), (1, kv(1, 2, 3, 4))])
    made.update([(0, kv(5, 6))])
    assert made.tables[0][0, :2].tolist() == [5, 6]


def test_pending_is_what_the_slot_drew_and_only_in_the_step_after() -> None:
    from cortexstream.backends.cuda.step import LastDraws

    last = LastDraws(4, CPU)
    row = PlanRow(70, 2, (1,), 0, kv(0), SampleSpec())
    last.record([row], torch.tensor([2]), torch.tensor([55]), torch.tensor([True]))
    assert last.has(2, 70) and not last.has(2, 71) and not last.has(1, 70)
    assert last.fill(torch.tensor([PENDING, 4, PENDING]), torch.tensor([2, 2, 0])).tolist() == [55, 4, 0]
    assert last.broken.tolist() == [False, False, True, False]
    last.forget()
    assert not last.has(2, 70)


def test_p5_what_a_gpu_without_triton_draws_with_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU draws with numpy: here the whole backend draws with torch, histories that end with an unseen token too."""
    from cortexstream.backends.cuda import host_sample, sample
    from tests.parity.test_speculation import NGRAM, workload

    prompts, params = workload()
    asked: list[int] = []

    def draw(*given: Any) -> Any:
        asked.append(sum(last is not None for last in given[3]))
        return sample.draw(*given)

    def answers(**options: Any) -> list[list[tuple[Any, ...]]]:
        with LLM(backend="cuda", backend_options={"device": "cpu"}, num_kv_blocks=120, **options) as llm:
            found = llm.generate(prompts, params, use_tqdm=False)
        return [[(c.token_ids, c.text, c.finish_reason) for c in output.outputs] for output in found]

    expected = answers()
    monkeypatch.setattr(host_sample, "draw", draw)
    assert answers() == expected and sum(asked) > 20
    assert answers(speculative_config=NGRAM) == expected


def test_the_likeliest_are_in_order_and_ties_go_to_the_lowest_ids() -> None:
    """As many as the row asks for, of rows that ask for other numbers, in a vocabulary smaller than what is fetched."""
    from cortexstream.backends.cuda.results import draws_of, on_the_way, results_of

    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0], [5.0, 1.0, 1.0, 4.0, 1.0], [0.0, 0.0, 9.0, 0.0, 0.0]])
    specs = [SampleSpec(logprobs=2), SampleSpec(logprobs=4), SampleSpec()]
    rows = tuple(PlanRow(n, n, (1,), 0, kv(n), spec) for n, spec in enumerate(specs))
    draws = on_the_way(logits, specs, torch.tensor([4, 3, 2]), torch.tensor([False, False, False]))
    found = results_of(draws_of(rows), draws, {})
    assert [[token for token, _ in row.top_logprobs] for row in found] == [[1, 2], [0, 3, 1, 2], []]
    raw = torch.log_softmax(logits, dim=-1)
    assert found[0].logprob == raw[0, 4].item() and found[1].top_logprobs[1][1] == raw[1, 3].item()
    assert found[2].logprob is None and [row.token for row in found] == [4, 3, 2]


@pytest.mark.parametrize("levels", [1, 2, 5, 300])
@pytest.mark.parametrize("count", [1, 3, 20, 50])
def test_f10_ties_of_logprobs_go_to_the_lowest_ids(levels: int, count: int) -> None:
    """However many there are: against the definition, for torch and MLX."""
    from cortexstream.backends.cuda.results import likeliest

    values = np.random.default_rng(levels).integers(0, levels, (6, 50)).astype(np.float32)
    values[1, ::7] = -np.inf
    expected = [sorted(token for token, _ in top_logprobs(row, count)) for row in values]
    assert [sorted(row) for row in likeliest(torch.from_numpy(values), count).tolist()] == expected
    mx = require("mlx")
    from cortexstream.backends.mlx import results

    assert [sorted(row) for row in results.likeliest(mx.array(values), count).tolist()] == expected


@pytest.fixture
def backend() -> Iterator[Any]:
    """The tiny model's, of four slots and 8 blocks of 16 tokens."""
    from cortexstream.backends.cuda import create

    made = create(BackendOptions(str(tiny_folder()), max_num_seqs=4, block_tokens=16, extra={"device": "cpu"}))
    made.allocate_kv(8)
    yield made
    made.close()


def step(backend: Any, number: int, row: PlanRow) -> Any:
    return backend.collect(backend.submit(StepPlan(number, (row,)))).rows[0]


@pytest.mark.parametrize("spec", [SampleSpec(), SampleSpec(presence_penalty=0.5, output_tokens=(PENDING,))])
def test_a_draw_that_follows_a_broken_one_is_broken(backend: Any, spec: SampleSpec) -> None:
    """And the one after that, until another sequence has the slot."""
    from cortexstream.backends.common.rows import BANNED, BROKEN

    row = PlanRow(5, 2, (1, 300), 0, KVRows((0,), False), SampleSpec(banned=tuple(range(384))))
    goes_on = row._replace(tokens=(PENDING,), start=2, sample=spec)
    tickets = [backend.submit(StepPlan(number, (planned,))) for number, planned in ((1, row), (2, goes_on))]
    assert [backend.collect(ticket).rows[0].error for ticket in tickets] == [BANNED, BROKEN]
    assert step(backend, 3, goes_on._replace(start=3)).error == BROKEN
    assert step(backend, 4, row._replace(seq_id=6, sample=SampleSpec())).error is None


def test_a_reset_forgets_what_was_drawn(backend: Any) -> None:
    row = PlanRow(5, 2, (1, 300), 0, KVRows((0,), False), SampleSpec())
    step(backend, 1, row)
    backend.reset()
    after = row._replace(tokens=(PENDING,), start=2)
    with pytest.raises(EngineError, match="row 5 has a pending token, but its slot 2 drew none in the step before"):
        backend.submit(StepPlan(2, (after,)))


def test_a_pending_token_in_a_history_needs_a_draw(backend: Any) -> None:
    """Though the token that the row feeds is known. Nothing was written; with a draw before it is served."""
    spec = SampleSpec(presence_penalty=0.5, output_tokens=(300, PENDING))
    row = PlanRow(5, 2, (1, 300), 0, KVRows((0,), False), spec)
    with pytest.raises(EngineError, match="row 5 has a pending token, but its slot 2 drew none in the step before"):
        backend.submit(StepPlan(1, (row,)))
    assert not any(part.any() for pool in backend._memory.pools for store in pool._stores for part in store.parts)
    step(backend, 1, row._replace(sample=SampleSpec()))
    assert step(backend, 2, row._replace(start=2, tokens=(301,))).error is None
