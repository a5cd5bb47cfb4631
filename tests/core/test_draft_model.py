"""A draft model on the null backend: what it is asked for, what it cannot do, and which models go together."""

from __future__ import annotations

import pytest

from cortexstream.config import EngineConfig
from cortexstream.engine.core import EngineCore
from cortexstream.engine.drafting import ModelDrafter, make_core
from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.request import FinishReason, Request
from cortexstream.sequence import Sequence as Served
from cortexstream.speculation import Ask
from tests.core.support import AuditedBackend, dense, engine, null_backend, request
from tests.core.test_speculation import VOCAB, serve


def with_draft_model(num_tokens: int, **draft: int) -> tuple[EngineCore, AuditedBackend]:
    """An engine whose draft model is its own twin, and the draft model's backend."""
    core, backend = engine(**draft)  # type: ignore[arg-type]
    target, _ = engine(drafter=ModelDrafter(core, num_tokens))
    return target, backend


def served(asked: Request, limit_tokens: int = 400) -> Served:
    return Served(asked, limit_tokens, frozenset(), VOCAB)


def no_device(call: str, step: int) -> None:
    raise EngineError(f"no device at {call}")


def test_p13_a_draft_model_that_fails_is_told_of_and_the_next_request_is_served() -> None:
    asked = [request(i, 5, max_tokens=9) for i in range(2)]
    core, backend = with_draft_model(3)
    backend.fault = no_device
    (got,) = serve(core, asked[:1])
    assert got.tokens == dense(asked[0], VOCAB, 400)[:1] and got.finish is FinishReason.ERROR
    assert got.error is not None and "the draft model failed: " in got.error and "no device at submit" in got.error
    backend.fault = lambda call, step: None
    (got,) = serve(core, asked[1:])
    assert got.tokens == dense(asked[1], VOCAB, 400) and core.stats().acceptance_rate == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_p13_a_draft_model_guesses_as_many_as_are_wanted_now(temperature: float) -> None:
    """More than the step has room for would not fit; one after the other, and several at once."""
    core, _ = engine()
    drafter = ModelDrafter(core, 6)
    asked = [request(i, 4 + i, temperature=temperature, seed=i) for i in range(3)]
    expected = [dense(one, VOCAB, 400) for one in asked]
    sequences = [served(one) for one in asked]
    for most in (6, 1, 4, 6, 2):
        assert drafter.propose([Ask(sequences[0], most)]) == [tuple(expected[0][:most])]
    found = drafter.propose([Ask(one, most) for one, most in zip(sequences, (2, 5, 3), strict=True)])
    assert found == [tuple(tokens[:most]) for tokens, most in zip(expected, (2, 5, 3), strict=True)]


def test_p13_a_draft_model_with_a_shorter_context_stops_guessing_there() -> None:
    """The rest is drawn one by one; whatever the length, no request fails."""
    for prompt in range(3, 9):
        asked = request(0, prompt, max_tokens=30)
        core, backend = with_draft_model(3, max_model_len=16)
        (got,) = serve(core, [asked])
        assert got.tokens == dense(asked, VOCAB, 400) and got.error is None
        assert core.stats().acceptance_rate == 1.0
        longest = max(row.start + len(row.tokens) for plan in backend.plans for row in plan.rows)
        assert longest <= 15 and core.stats().drafted_rows == -(-(15 - prompt) // 4)


@pytest.mark.parametrize("theirs", [VOCAB - 1, VOCAB + 1])
def test_p13_a_draft_model_with_another_vocabulary_is_refused(theirs: int) -> None:
    """A larger one too: its guesses need not be tokens of the model."""
    config = EngineConfig(
        backend="null", num_kv_blocks=64, speculative_config={"model": "m", "num_speculative_tokens": 3}
    )
    with pytest.raises(InvalidRequestError, match=f"has a model with {theirs} token ids; .* has {VOCAB}$"):
        make_core(null_backend(vocab_size=VOCAB), config, null_backend(vocab_size=theirs))
    core = make_core(null_backend(vocab_size=VOCAB), config, null_backend(vocab_size=VOCAB))
    (got,) = serve(core, [request(0, 5, max_tokens=21)])
    assert got.tokens == dense(request(0, 5, max_tokens=21), VOCAB, 400) and core.stats().accepted_tokens == 15
    core.close()
