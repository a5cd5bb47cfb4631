"""Table 3 of bench_kv.py: what prefix reuse saves on conversations.

Eight users talk to the embedded model for six turns each, all at once, greedy. They share a system prompt of about
400 tokens. The prompt of a turn is all that was said before and 16 to 48 new tokens of the user; the answer has 16 to
32. A user's next turn arrives when the answer is there. Texts are random tokens, shortened where the context is too
small. Each row is a new engine, with prefix caching or without; both must give the same answers.

Time to first token is from the arrival to the first token that comes out, median over the turns, and over all but
each user's first. It holds the waiting for others.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

from cortexstream import EngineConfig, SamplingParams
from cortexstream.backend import BackendOptions
from cortexstream.engine import EngineCore
from cortexstream.models import resolve_model
from cortexstream.platform import load
from cortexstream.request import Request
from cortexstream.scheduler import TokenEvent

SIDES: tuple[tuple[str, Literal["run", "paged"]], ...] = (("reference", "run"), ("reference", "paged"), ("mlx", "run"))
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 400, (16, 48), (16, 32)


class Turn(NamedTuple):
    text: tuple[int, ...]
    num_answer: int


class Talk(NamedTuple):
    """What is said, apart from the answers: the same for every row."""

    system: tuple[int, ...]
    users: list[list[Turn]]

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return len(self.system) + max(sum(len(t.text) + t.num_answer for t in turns) for turns in self.users)


def talk(users: int, turns: int, vocab_size: int, max_tokens: int) -> Talk:
    """A trace that fits `max_tokens`: the system prompt gives way."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(count))

    said = [
        [Turn(tokens(rng.randint(*USER_TOKENS)), rng.randint(*ANSWER_TOKENS)) for _ in range(turns)]
        for _ in range(users)
    ]
    room = max_tokens - Talk((), said).longest
    if room < 1:
        raise SystemExit(f"{turns} turns need more than the {max_tokens} tokens of the model's context")
    return Talk(tokens(min(SYSTEM_TOKENS, room)), said)


class Conversations:
    """All users of a trace, served by one engine."""

    def __init__(self, core: EngineCore, trace: Talk) -> None:
        self._core = core
        self._trace = trace
        self.said = [list(trace.system) for _ in trace.users]  # prompt and answers of each user so far
        self.first_token_s: list[tuple[int, float]] = []  # (turn, seconds)
        self._answered: list[tuple[int, int]] = []

    def run(self) -> None:
        for user in range(len(self._trace.users)):
            self._ask(user, 0)
        while self._core.has_work:
            self._core.step()
            answered, self._answered = self._answered, []
            for user, turn in answered:
                if turn + 1 < len(self._trace.users[user]):
                    self._ask(user, turn + 1)

    def _ask(self, user: int, number: int) -> None:
        turn, said = self._trace.users[user][number], self.said[user]
        said.extend(turn.text)
        arrived, first = perf_counter(), len(said)

        def take(event: TokenEvent) -> bool:
            if event.error is not None or event.token is None:
                raise SystemExit(f"turn {number} of user {user} failed: {event.error}")
            if len(said) == first:
                self.first_token_s.append((number, perf_counter() - arrived))
            said.append(event.token)
            if event.finish is not None:
                self._answered.append((user, number))
            return False

        sampling = SamplingParams(temperature=0, max_tokens=turn.num_answer, ignore_eos=True)
        request_id = user * len(self._trace.users[user]) + number
        self._core.add(Request(request_id, tuple(said), sampling, seed=0), take)


def serve(
    backend: str, layout: Literal["run", "paged"], reuse: bool, model: Path, users: int, turns: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """One row of the table, and all that was said."""
    loaded = load(backend, BackendOptions(model=str(model), max_num_seqs=users, kv_layout=layout))
    core = EngineCore(
        loaded, EngineConfig(max_num_seqs=users, kv_layout=layout, enable_prefix_caching=reuse, backend=backend)
    )
    trace = talk(users, turns, loaded.model.vocab_size, core.limits.max_tokens)
    core.warmup(len(trace.system), users)
    conversations = Conversations(core, trace)
    started = perf_counter()
    conversations.run()
    total_s = perf_counter() - started
    stats, first = core.stats(), conversations.first_token_s
    core.check()
    core.close()
    row = {
        "backend": backend, "device": loaded.info.device, "layout": layout, "reuse": reuse, "users": users,
        "turns": turns, "system_tokens": len(trace.system), "longest_tokens": trace.longest,
        "prompt_tokens_computed": stats.prompt_tokens, "prompt_tokens_reused": stats.arena.reused_tokens,
        "copied_tokens": stats.arena.copied_tokens, "moved_tokens": stats.arena.moved_tokens,
        "answers": len(first), "output_tokens": stats.output_tokens, "total_s": total_s,
        "first_token_s": statistics.median(s for _, s in first),
        "later_first_token_s": statistics.median([s for turn, s in first if turn] or [s for _, s in first]),
    }  # fmt: skip
    return row, conversations.said


def measure(quick: bool, backends: list[str]) -> list[dict[str, Any]]:
    model = resolve_model(None)
    users, turns = (2, 2) if quick else (8, 6)
    rows = []
    for backend, layout in SIDES:
        if backend in backends:
            off, said = serve(backend, layout, False, model, users, turns)
            on, same = serve(backend, layout, True, model, users, turns)
            rows += [row | {"equal_outputs": said == same} for row in (off, on)]
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'backend':11}{'layout':8}{'reuse':7}{'computed':>10}{'reused':>9}{'copied':>9}{'moved':>9}"
          f"{'first token, ms':>17}{'later turns, ms':>17}{'total, s':>10}")  # fmt: skip
    for row in rows:
        counts = [row[name] for name in ("prompt_tokens_reused", "copied_tokens", "moved_tokens")]
        times = [1000 * row[name] for name in ("first_token_s", "later_first_token_s")]
        print(f"{row['backend']:11}{row['layout']:8}{'on' if row['reuse'] else 'off':7}"
              f"{row['prompt_tokens_computed']:10,}{counts[0]:9,}{counts[1]:9,}{counts[2]:9,}"
              f"{times[0]:17.1f}{times[1]:17.1f}{row['total_s']:10.2f}")  # fmt: skip
    same = all(row["equal_outputs"] for row in rows)
    print("answers with and without reuse: " + ("the same" if same else "DIFFERENT"))
