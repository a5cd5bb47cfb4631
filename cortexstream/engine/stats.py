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
    swaps: int  # of those, by keeping a copy in host memory
    num_waiting: int
    num_running: int
    host_s: float  # spent in the scheduler and in delivering tokens; backends and draft models excluded
    backend_s: float  # spent inside the backend's submit and collect
    moved_bytes: int  # KV copied on the device by growth, compaction, prefix hits and forks
    arena: ArenaStats
    drafted_rows: int = 0  # rows of decoding sequences that guessed ahead
    drafted_tokens: int = 0  # their guesses
    accepted_tokens: int = 0  # guesses that were what was drawn, also those that a stop string then cut off
    draft_s: float = 0.0  # spent in finding guesses

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that were right; 0 without guesses."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_drafted_row(self) -> float:
        """Tokens that a row with guesses draws, the one that it would draw anyway included; 0 without such rows."""
        return 1.0 + self.accepted_tokens / self.drafted_rows if self.drafted_rows else 0.0
