"""Guesses from a second, smaller model, and the engine that uses them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

from cortexstream.backend import Backend, WarmupReport
from cortexstream.config import EngineConfig
from cortexstream.engine.budget import split
from cortexstream.engine.core import EngineCore
from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.request import Request, SamplingParams
from cortexstream.scheduler import TokenEvent
from cortexstream.speculation import Ask, NgramDrafter

log = logging.getLogger("cortexstream")


def make_core(backend: Backend, config: EngineConfig, draft: Backend | None = None) -> EngineCore:
    """An engine as `config` asks for it. `draft` is the loaded draft model, if it names one; the engine closes it.

    Raises InvalidRequestError when the models do not go together.
    """
    asked = config.speculative
    if asked is None:
        return EngineCore(backend, config)
    if backend.model.windows:
        raise InvalidRequestError(
            "speculative_config", "cannot be used: this model's sliding windows overwrite what a wrong guess would need"
        )
    if draft is None:
        return EngineCore(
            backend, config,
            NgramDrafter(asked.num_speculative_tokens, asked.prompt_lookup_min, asked.prompt_lookup_max),
        )  # fmt: skip
    theirs, ours = draft.model.vocab_size, backend.model.vocab_size
    if theirs != ours:
        raise InvalidRequestError(
            "speculative_config", f"has a model with {theirs} token ids; the model that it drafts for has {ours}"
        )
    mine, its = split(backend, draft, config)
    # Prefixes must be kept: each proposal goes on from the one before.
    its = replace(its, model=asked.model, enable_prefix_caching=True, speculative_config=None, swap_memory=0)
    drafting = EngineCore(draft, its)
    core = EngineCore(backend, mine, ModelDrafter(drafting, asked.num_speculative_tokens))
    core.notes += tuple(f"draft model: {note}" for note in draft.info.notes + drafting.notes)
    return core


class ModelDrafter:
    """Asks a draft model for what follows, with the request's own parameters and noise.

    A draw's noise depends on seed, position and token or block alone, so a draft model that is like the large one draws
    the same tokens at any temperature. Its keys and values are kept between proposals as any prompt's prefix is.
    """

    def __init__(self, core: EngineCore, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.kv_bytes = core.kv_bytes
        self._core = core
        self._ids = itertools.count()
        self._params: dict[tuple[int, int], SamplingParams] = {}  # (sequence, count) -> how to draft
        self._given_up: set[int] = set()  # sequences for which it could not draw
        self._told = False

    def propose(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """Where its own logits are no numbers it guesses nothing, and is not asked again. Raises EngineError when its
        device fails."""
        drafts: list[list[int]] = [[] for _ in asks]
        errors: dict[int, str] = {}  # by sequence
        failed = self._core.failed_steps
        for draft, ask in zip(drafts, asks, strict=True):
            if ask.sequence.id not in self._given_up:
                self._ask(ask, draft, errors)
        self._core.run()
        if self._core.failed_steps != failed:
            raise EngineError(f"the draft model failed: {next(iter(errors.values()))}")
        self._given_up |= errors.keys()
        if errors and not self._told:
            self._told = True
            log.warning("the draft model cannot guess for some requests: %s", next(iter(errors.values())))
        return [tuple(draft) for draft in drafts]

    def forget(self, seq_id: int) -> None:
        for key in [key for key in self._params if key[0] == seq_id]:
            del self._params[key]
        self._given_up.discard(seq_id)

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        longest = max(1, self._core.limits.max_tokens - 3)
        report = self._core.warmup(min(prompt_tokens, longest), batch)
        return WarmupReport(tuple((f"draft model, {name}", seconds) for name, seconds in report.steps))

    def close(self) -> None:
        self._core.close()

    def _ask(self, ask: Ask, draft: list[int], errors: dict[int, str]) -> None:
        """Queue a request whose tokens go to `draft`; none if the draft model's context is too short for it."""

        def take(event: TokenEvent) -> bool:
            if event.token is not None:
                draft.append(event.token)
            if event.error is not None:
                errors[sequence.id] = event.error
            return False

        sequence = ask.sequence
        if len(sequence.tokens) + 1 > self._core.limits.max_tokens:
            return
        request = sequence.request
        self._core.add(
            Request(next(self._ids), tuple(sequence.tokens), self._sampling(ask), request.seed, request.index), take
        )

    def _sampling(self, ask: Ask) -> SamplingParams:
        key = ask.sequence.id, ask.most
        if key not in self._params:
            given = ask.sequence.request.sampling
            self._params[key] = SamplingParams(
                max_tokens=ask.most, temperature=given.temperature, top_p=given.top_p, top_k=given.top_k,
                min_p=given.min_p, repetition_penalty=given.repetition_penalty, logit_bias=given.logit_bias,
                allowed_token_ids=given.allowed_token_ids, bad_token_ids=given.bad_token_ids, ignore_eos=True,
            )  # fmt: skip
        return self._params[key]
