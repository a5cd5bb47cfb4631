"""The engine's thread: it creates the backend, runs every step, and is the only one that touches either."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import TypeVar

from cortexstream.backend import Backend
from cortexstream.config import EngineConfig
from cortexstream.constraint import Constraint
from cortexstream.engine.core import EngineCore, Sink
from cortexstream.engine.drafting import make_core
from cortexstream.engine.stats import EngineStats
from cortexstream.errors import EngineError
from cortexstream.limits import check_request
from cortexstream.request import Request, SamplingParams

log = logging.getLogger("cortexstream.engine")
T = TypeVar("T")
CHECK_INTERVAL_S = 60.0  # the arena's invariants are proved when idle, at most so often: the proof is O(num_blocks)
SPLITMIX = 0x9E3779B97F4A7C15


class EngineThread:
    """Thread-safe face of an EngineCore. Array libraries keep per-thread state, so one thread owns every call to them.

    `load` makes the backend and runs on that thread, and so does `load_draft` for a model that drafts; what they raise
    is raised here.
    """

    def __init__(
        self, load: Callable[[], Backend], config: EngineConfig, load_draft: Callable[[], Backend] | None = None
    ) -> None:
        self.config = config
        self._ids = itertools.count()
        self._seed = secrets.randbits(64) if config.seed is None else config.seed
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._lock = threading.RLock()  # a dropped stream aborts wherever it is collected, within _post too
        ready: Future[EngineCore] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(load, load_draft, ready), name="cortexstream-engine", daemon=True
        )
        self._thread.start()
        try:
            core = ready.result()
        except BaseException:  # loading failed, or the wait for it was interrupted: the thread ends once it has loaded
            self._closing = True
            self._calls.put(lambda: None)
            raise
        self.info, self.model, self.limits, self.kv_bytes, self.notes = (
            core.backend.info, core.backend.model, core.limits, core.kv_bytes, core.backend.info.notes + core.notes,
        )  # fmt: skip

    def check(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> None:
        """Raise InvalidRequestError if such a request can never be served. Nothing is numbered: what is refused does
        not change the seeds of what comes after it."""
        check_request(Request(-1, prompt_token_ids, sampling, seed=0), self.limits)

    def request(
        self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, index: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:  # fmt: skip
        """A new request of what was checked, numbered and with its seed resolved."""
        number = next(self._ids)
        seed = sampling.seed
        if seed is None:
            seed = (self._seed * SPLITMIX + (number + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)
        return Request(number, prompt_token_ids, sampling, seed, index, constraint=constraint)

    def add(self, requests: list[tuple[Request, Sink]]) -> None:
        """Queue requests together: they can share the very next step."""

        def enqueue(core: EngineCore) -> None:
            for request, sink in requests:
                core.add(request, sink)

        self._post(enqueue)

    def abort(self, request_id: int) -> None:
        """End a request from any thread; it takes effect before the next step. Finished ones are left alone."""
        self._post(lambda core: core.abort(request_id), missing_ok=True)

    def stats(self) -> EngineStats:
        return self.call(lambda core: core.stats())

    def call(self, function: Callable[[EngineCore], T]) -> T:
        """Run a function on the engine's thread between two steps, and return what it returns."""
        self.check_caller("call()")
        result: Future[T] = Future()

        def run(core: EngineCore) -> None:
            try:
                result.set_result(function(core))
            except BaseException as error:
                result.set_exception(error)

        self._post(run)
        return result.result()

    def check_caller(self, what: str) -> None:
        """Raise EngineError if this is the engine's own thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise EngineError(f"{what} on the engine's own thread, from a listener, would wait for itself for ever")

    def close(self) -> None:
        """Stop after the current step; running requests end with an error. Idempotent; waits for the thread."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._calls.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, function: Callable[[EngineCore], None], missing_ok: bool = False) -> None:
        with self._lock:
            if self._closing:
                if missing_ok:
                    return
                raise EngineError("the engine is closed")
            self._calls.put(lambda: function(self._core))

    def _main(
        self, load: Callable[[], Backend], load_draft: Callable[[], Backend] | None, ready: Future[EngineCore]
    ) -> None:
        loaded: list[Backend] = []
        try:
            for one in (load, load_draft):
                if one is not None:
                    loaded.append(one())
            self._core = make_core(loaded[0], self.config, *loaded[1:])
        except BaseException as error:
            for backend in loaded:
                backend.close()
            ready.set_exception(error)
            return
        ready.set_result(self._core)
        checked = 0.0
        try:
            while not self._closing:
                if self._core.has_work:
                    self._run_calls(wait=False)
                    self._core.step()
                    continue
                if monotonic() - checked > CHECK_INTERVAL_S:
                    self._core.check()
                    checked = monotonic()
                self._run_calls(wait=True)
            self._shut_down("the engine was closed")
        except Exception as error:
            log.exception("the engine stops: its bookkeeping is broken")
            self._shut_down(f"the engine stopped, because its bookkeeping is broken: {error}")

    def _run_calls(self, wait: bool) -> None:
        while True:
            try:
                call = self._calls.get(block=wait)
            except queue.Empty:
                return
            call()
            wait = False

    def _shut_down(self, reason: str) -> None:
        with self._lock:
            self._closing = True
        self._run_calls(wait=False)  # what was posted before the door closed still gets an answer
        try:
            self._core.fail_all(reason)
        finally:
            self._core.close()
