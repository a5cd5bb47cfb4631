"""What the engine counted."""

from __future__ import annotations

from dataclasses import dataclass

from cortexstream.kv import ArenaStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the arena as it is now."""

    steps: int
    prompt_tokens: int  # of prompts, counted again when computed again after a preemption
    output_tokens: int
    requests_finished: int  # by any reason
    requests_failed: int  # of those, by an error
    preemptions: int
    num_waiting: int
    num_running: int
    host_s: float  # spent in the scheduler and in delivering tokens, the backend's calls excluded
    backend_s: float  # spent inside the backend's submit and collect
    arena: ArenaStats
