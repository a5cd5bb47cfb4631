"""The face for asyncio programs: the same engine, answers as async iterators."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cortexstream.errors import InvalidRequestError
from cortexstream.generation import Generation, check_request_id
from cortexstream.llm import LLM
from cortexstream.outputs import RequestOutput, StreamChunk
from cortexstream.prompts import Prompt
from cortexstream.request import SamplingParams

COMPILERS = 4  # grammars at a time


class AsyncLLM:
    """Like `LLM`, with the same options. Loading blocks; make it before the loop serves anything.

        async for output in llm.generate("12+30=", SamplingParams(temperature=0), request_id="r1"):
            ...                                    # cumulative, one per token

    Cancelling the consuming task, or leaving the loop, aborts the request.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self._serve(LLM(model, **options))

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """A second face of a model that is loaded already; closing either closes both."""
        made = cls.__new__(cls)
        made._serve(llm)
        return made

    def _serve(self, llm: LLM) -> None:
        self.llm = llm
        self._running: dict[str, Generation | None] = {}  # None: its grammar is being compiled
        self._aborted: set[str] = set()  # of these
        # Its own threads: the loop's are the program's, and few.
        self._compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="cortexstream-compile")

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Everything so far, after every token, or after several when they come faster than they are taken."""
        async with aclosing(self._chunks(prompt, sampling_params, request_id, merge=True)) as chunks:
            async for output, _ in chunks:
                yield output

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[StreamChunk, None]:
        """Only what is new."""
        async with aclosing(self._chunks(prompt, sampling_params, request_id)) as chunks:
            async for _, chunk in chunks:
                yield chunk

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator ends with finish_reason "abort", once its grammar is compiled if it has one.
        Unknown ids are left alone."""
        if request_id not in self._running:
            return
        generation = self._running[request_id]
        if generation is None:
            self._aborted.add(request_id)
        else:
            generation.cancel()

    async def close(self) -> None:
        """End what runs with an error and free the device memory, without blocking the loop. Idempotent."""
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _chunks(
        self, prompt: Prompt, sampling_params: SamplingParams | None, request_id: str | None, merge: bool = False
    ) -> AsyncGenerator[tuple[RequestOutput, StreamChunk], None]:
        params = SamplingParams() if sampling_params is None else sampling_params
        name = uuid.uuid4().hex if request_id is None else check_request_id(request_id)
        if name in self._running:
            raise InvalidRequestError("request_id", f"{name!r} is in use by a request that is not finished")
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[StreamChunk] = asyncio.Queue()

        def listener(chunk: StreamChunk) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        self._running[name] = generation = None
        unfinished = 0
        try:
            if isinstance(params, SamplingParams) and params.structure is not None:
                # It may take a second; the loop serves others meanwhile.
                await asyncio.wrap_future(self._compilers.submit(self.llm.prepare, params))
            generation = self.llm.submit(prompt, params, request_id=name, listener=listener)
            self._running[name], unfinished = generation, params.n
            if name in self._aborted:
                generation.cancel()
            while unfinished:
                chunk = await chunks.get()
                unfinished -= chunk.finish_reason is not None
                while merge and not chunks.empty():
                    unfinished -= chunks.get_nowait().finish_reason is not None
                output = generation.output()
                if merge and unfinished and output.finished:
                    continue  # the end is on its way through the queue, and is shown once: then
                yield output, chunk
        finally:
            del self._running[name]
            self._aborted.discard(name)
            if generation is not None and unfinished:
                generation.cancel()
