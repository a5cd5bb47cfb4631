"""What to do with the keys and values of a preempted sequence: compute them again, or keep a copy in host memory."""

from __future__ import annotations

from typing import Literal

from cortexstream.backend import ModelInfo
from cortexstream.plan import ring_tokens

SWAP_S_PER_BYTE = 1e-9  # before anything was measured: 1 GB/s, slower than any bus in use
SMOOTHING = 0.2  # weight of the newest observation
FADING = 0.95  # per step
MIN_PREFILL_TOKENS = 8  # steps with fewer prompt tokens say little about the price of one


class SwapPolicy:
    """Chooses the cheaper of the two, from what steps and swaps took so far, and keeps the copies within a budget.

    Computing n tokens again costs n times the measured time of a prompt token; swapping them costs their bytes, out and
    in again, times the measured time of a byte. `mode` "recompute" and "swap" decide beforehand; the budget always
    holds. Bytes are those of `ModelInfo`: of layers with a window only what a ring keeps.
    """

    def __init__(
        self, model: ModelInfo, block_tokens: int, budget_bytes: int,
        mode: Literal["auto", "recompute", "swap"] = "auto",
    ) -> None:  # fmt: skip
        self.mode = mode
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._prefill_tokens = self._prefill_s = 0.0
        self._after_prefill = False
        self.swap_s_per_byte = SWAP_S_PER_BYTE
        full, *rings = model.pool_bytes_per_token
        self._full_bytes = full
        self._rings = [
            (ring_tokens(window, block_tokens), size) for window, size in zip(model.windows, rings, strict=True)
        ]

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes of a copy of so many tokens."""
        return num_tokens * self._full_bytes + sum(min(num_tokens, slots) * size for slots, size in self._rings)

    def wants(self, num_tokens: int) -> bool:
        """Is a copy of so many tokens the better choice, and is there room for it?"""
        size = self.bytes_of(num_tokens)
        if self.mode == "recompute" or not num_tokens or self.used_bytes + size > self.budget_bytes:
            return False
        if self.mode == "swap":
            return True
        return 2 * size * self.swap_s_per_byte < num_tokens * self.prefill_s_per_token

    def take(self, num_tokens: int) -> None:
        """A copy of so many tokens is kept from now on."""
        self.used_bytes += self.bytes_of(num_tokens)

    def give_back(self, num_tokens: int) -> None:
        """It is gone."""
        self.used_bytes -= self.bytes_of(num_tokens)

    def observe_step(self, prompt_tokens: int, seconds: float) -> None:
        """A plan with so many prompt tokens was handed to the backend, and the result of the plan before taken from
        it, in so many seconds. It may have computed either then: so what counts are sums over the steps with prompt
        tokens and those right after, old ones fading."""
        if prompt_tokens >= MIN_PREFILL_TOKENS or self._after_prefill:
            self._prefill_tokens = FADING * self._prefill_tokens + prompt_tokens
            self._prefill_s = FADING * self._prefill_s + seconds
        self._after_prefill = prompt_tokens >= MIN_PREFILL_TOKENS

    @property
    def prefill_s_per_token(self) -> float:
        """What computing a prompt token takes; 0 before one was computed."""
        return self._prefill_s / self._prefill_tokens if self._prefill_tokens else 0.0

    def observe_swap(self, num_bytes: int, seconds: float) -> None:
        """Copies of so many bytes took so long."""
        if num_bytes:
            self.swap_s_per_byte += SMOOTHING * (seconds / num_bytes - self.swap_s_per_byte)
