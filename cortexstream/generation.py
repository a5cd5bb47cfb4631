"""A prompt on its way: something to wait for, to read as it grows, and to cancel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from cortexstream.completion import Completion
from cortexstream.constraint import Constraint
from cortexstream.engine import EngineThread
from cortexstream.engine.core import Sink
from cortexstream.errors import EngineError, InvalidRequestError, shown
from cortexstream.outputs import RequestOutput, StreamChunk
from cortexstream.request import Request, SamplingParams
from cortexstream.scheduler import TokenEvent
from cortexstream.text.tokenizer import Tokenizer

Listener = Callable[[StreamChunk], None]


def check_request_id(value: object) -> str:
    """A label that a caller chose. Raises InvalidRequestError unless it is a text."""
    if not isinstance(value, str) or not value:
        raise InvalidRequestError("request_id", f"is {shown(value)}; must be a text of at least one character")
    return value


class Chunks(Iterator[StreamChunk]):
    """The chunks of a generation with so many completions. Closing it before their end cancels, and so does dropping
    it, also before the first chunk was asked for."""

    def __init__(self, generation: Generation, chunks: queue.SimpleQueue[StreamChunk], unfinished: int) -> None:
        self._generation = generation
        self._chunks = chunks
        self._unfinished = unfinished

    def __next__(self) -> StreamChunk:
        if not self._unfinished:
            raise StopIteration
        chunk = self._chunks.get()
        self._unfinished -= chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        if self._unfinished:
            self._unfinished = 0
            self._generation.cancel()

    def __del__(self) -> None:
        self.close()


class Generation:
    """All completions of one prompt. Made by `LLM.submit`; any thread but the engine's may call its methods.

    Iterating, once, gives a StreamChunk per token and completion; leaving the loop early cancels. `listener`, if given,
    is called with every chunk on the engine's thread and must not block; chunks then are not kept for iterating.
    """

    def __init__(
        self, engine: EngineThread, tokenizer: Tokenizer | None, prompt: str | None, prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams, request_id: str | None = None, listener: Listener | None = None,
        constraint: Constraint | None = None,
    ) -> None:  # fmt: skip
        if request_id is not None:
            check_request_id(request_id)
        if listener is not None and not callable(listener):
            raise InvalidRequestError("listener", f"is {shown(listener)}; must be callable with a StreamChunk")
        self._engine = engine
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        later = sampling if sampling.prompt_logprobs is None else replace(sampling, prompt_logprobs=None)
        self._requests = [  # the prompt's logprobs are the same for all completions
            engine.request(prompt_token_ids, later if index else sampling, index, constraint)
            for index in range(sampling.n)
        ]
        self.request_id = request_id if request_id is not None else str(self._requests[0].id)
        self._completions = [Completion(i, sampling, tokenizer, prompt_token_ids) for i in range(sampling.n)]
        self._chunks: queue.SimpleQueue[StreamChunk] = queue.SimpleQueue()
        self._listener = listener if listener is not None else self._chunks.put
        self._lock = threading.Lock()  # a snapshot must not see half a token
        self._unfinished = sampling.n
        self._read = False
        self._done = threading.Event()

    def sinks(self) -> list[tuple[Request, Sink]]:
        """What the engine needs to run this: each request and where its events go."""
        return [
            (request, self._sink(completion))
            for request, completion in zip(self._requests, self._completions, strict=True)
        ]

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def cancel(self) -> None:
        """End what still runs with finish_reason "abort"; what was generated so far is kept. Idempotent."""
        for request in self._requests:
            self._engine.abort(request.id)

    def output(self) -> RequestOutput:
        """A snapshot of everything so far."""
        with self._lock:
            outputs = tuple(completion.output() for completion in self._completions)
            first = self._completions[0]
            cached, scores = first.num_cached_tokens, first.prompt_logprobs
        return RequestOutput(self.request_id, self._prompt, self._prompt_token_ids, outputs, cached, scores)

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Wait for the end. Raises TimeoutError (the generation goes on) if it takes longer."""
        self._engine.check_caller("result()")
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout_s} s")
        return self.output()

    def __iter__(self) -> Iterator[StreamChunk]:
        """The chunks, once: raises EngineError if they were or are being read, or go to a listener."""
        self._engine.check_caller("iterating")
        with self._lock:
            if self._listener != self._chunks.put or self._read:
                raise EngineError("a Generation can be iterated once, and not at all when it has a listener")
            self._read = True
        return Chunks(self, self._chunks, len(self._completions))

    def _sink(self, completion: Completion) -> Sink:
        def take(event: TokenEvent) -> bool:
            with self._lock:
                if completion.finish_reason is not None:  # a listener that raised at the end is told once more
                    return False
                text, stopped = completion.take(event)
                finish = completion.finish_reason
            tokens = () if event.token is None else (event.token,)
            try:
                self._listener(StreamChunk(self.request_id, completion.index, text, tokens, finish))
            finally:  # whoever waits for the end finds that the listener has had it
                if finish is not None:
                    self._unfinished -= 1
                    if not self._unfinished:
                        self._done.set()
            return stopped

        return take
