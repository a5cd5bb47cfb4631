"""One sequence's claim on the arena."""

from __future__ import annotations

from cortexstream.errors import ArenaError
from cortexstream.plan import KVRows


class KVHandle:
    """Blocks and how far they are filled. Made by `KVArena.admit`, dead after `KVArena.release`.

    `position` counts the tokens whose keys and values are written, or will be by the plans made so far; it is where the
    next token goes.
    """

    __slots__ = (
        "_block_tokens",
        "_rows",
        "blocks",
        "capacity_tokens",
        "contiguous",
        "limit_blocks",
        "live",
        "position",
    )

    def __init__(self, blocks: tuple[int, ...], block_tokens: int, contiguous: bool, limit_blocks: int) -> None:
        self._block_tokens = block_tokens
        self.contiguous = contiguous
        self.limit_blocks = limit_blocks  # this sequence never owns more
        self.position = 0
        self.live = True
        self.place(blocks)

    def place(self, blocks: tuple[int, ...]) -> None:
        """Set the blocks; only the arena calls this, when the sequence grew or was moved."""
        self.blocks = blocks
        self.capacity_tokens = len(blocks) * self._block_tokens
        self._rows = KVRows(blocks, self.contiguous)

    @property
    def rows(self) -> KVRows:
        """What a plan row carries; the same object until the blocks change."""
        return self._rows

    @property
    def is_full(self) -> bool:
        return self.position >= self.capacity_tokens

    @property
    def remaining(self) -> int:
        """Tokens that fit before the sequence must grow."""
        return self.capacity_tokens - self.position

    def advance(self, num_tokens: int = 1) -> None:
        """Count tokens as written. Raises ArenaError, changing nothing, if they do not fit."""
        if num_tokens <= 0:
            raise ArenaError("num_tokens must be positive")
        if not self.live:
            raise ArenaError("stale handle: the sequence was released")
        if self.position + num_tokens > self.capacity_tokens:
            raise ArenaError(
                f"KV cache overflow: position {self.position + num_tokens} exceeds the capacity of "
                f"{self.capacity_tokens} tokens (tried to advance by {num_tokens} tokens)"
            )
        self.position += num_tokens

    def reset(self) -> None:
        """Forget what was written; the blocks stay."""
        self.position = 0

    def locate(self, position: int) -> tuple[int, int]:
        """(block id, offset in the block) of a token's position; raises ArenaError outside the capacity."""
        if not 0 <= position < self.capacity_tokens:
            raise ArenaError(f"position {position} is outside the capacity of {self.capacity_tokens} tokens")
        return self.blocks[position // self._block_tokens], position % self._block_tokens

    def __repr__(self) -> str:
        state = f"{self.position}/{self.capacity_tokens} tokens" if self.live else "released"
        return f"KVHandle({len(self.blocks)} blocks from {self.blocks[0] if self.blocks else '-'}, {state})"
