"""One sequence's claim on the arena."""

from __future__ import annotations

from cortexstream.errors import ArenaError, shown
from cortexstream.plan import KVRows


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Raise ArenaError unless `value` is a whole number, and from `least` to `most` where those are given."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArenaError(f"{name} is {shown(value)}; must be a whole number")
    if least is not None and value < least:
        raise ArenaError(f"{name} is {shown(value)}; must be at least {least}")
    if most is not None and value > most:
        raise ArenaError(f"{name} is {shown(value)}; more than {most} cannot be managed")


class KVHandle:
    """Blocks and how far they are filled. Made by `KVArena.admit` and `fork`, dead after `KVArena.release`.

    `position` counts the tokens whose keys and values are written, or will be by the plans made so far; it is where the
    next token goes. `blocks` are those of the full-attention layers; `rows` has those of the rings, too.
    """

    __slots__ = (
        "_block_tokens",
        "_rows",
        "blocks",
        "capacity_tokens",
        "limit_blocks",
        "live",
        "position",
        "published_tokens",
        "shared_tokens",
        "shares",
        "shortest_reuse",
        "written",
    )

    def __init__(self, block_tokens: int, limit_blocks: int) -> None:
        self._block_tokens = block_tokens
        self.limit_blocks = limit_blocks  # this sequence never owns more
        self.position = 0
        self.written = 0  # the highest position so far: what a ring has overwritten stays overwritten
        self.published_tokens = 0  # so many of its tokens are in the prefix index
        self.shared_tokens = 0  # others may hold the blocks of so many of its tokens: never to be written again
        self.shares = False  # others may hold the block of `position`, too: it is copied before it is written
        self.shortest_reuse = 0  # its rings lack what a prefix of fewer tokens would need: they came from a file
        self.live = True
        self.place(KVRows((), True))

    def place(self, rows: KVRows, capacity_tokens: int | None = None) -> None:
        """Set the blocks; only the arena calls this, when the sequence grew or was moved."""
        self._rows = rows
        self.blocks = rows.blocks
        self.capacity_tokens = len(rows.blocks) * self._block_tokens if capacity_tokens is None else capacity_tokens

    @property
    def rows(self) -> KVRows:
        """What a plan row carries; the same object until the blocks change."""
        return self._rows

    @property
    def contiguous(self) -> bool:
        return self._rows.contiguous

    @property
    def is_full(self) -> bool:
        return self.position >= self.capacity_tokens

    @property
    def remaining(self) -> int:
        """Tokens that fit before the sequence must grow."""
        return self.capacity_tokens - self.position

    def advance(self, num_tokens: int = 1) -> None:
        """Count tokens as written. Raises ArenaError, changing nothing, if they do not fit."""
        whole("num_tokens", num_tokens)
        if num_tokens <= 0:
            raise ArenaError("num_tokens must be positive")
        self.check_live()
        if self.shares:
            raise ArenaError("the next block may be shared with another sequence: grow() must come before the write")
        end = self.position + num_tokens
        if end > self.capacity_tokens:
            raise ArenaError(
                f"KV cache overflow: position {end} exceeds the capacity of "
                f"{self.capacity_tokens} tokens (tried to advance by {num_tokens} tokens)"
            )
        self.position = end
        if end > self.written:
            self.written = end

    def rewind(self, position: int) -> None:
        """Count the tokens from `position` on as not written: they were guesses, and wrong. Raises ArenaError, changing
        nothing, for a position that is not reached, or before which others may be reading."""
        whole("position", position)
        self.check_live()
        first = max(self.published_tokens, self.shared_tokens)
        if not first <= position <= self.position:
            raise ArenaError(f"position {position} is no place to rewind to: {first} to {self.position} are")
        self.position = position

    def reset(self) -> None:
        """Forget what was written; the blocks stay. Raises ArenaError if others may be reading them."""
        self.check_live()
        shared = max(self.published_tokens, self.shared_tokens)
        if shared:
            raise ArenaError(
                f"{shared} tokens are shared with other sequences and cannot be written again: "
                "release this handle and admit a new one"
            )
        self.position = 0

    def locate(self, position: int) -> tuple[int, int]:
        """(block id, offset in the block) of a token's position; raises ArenaError outside the capacity."""
        whole("position", position)
        self.check_live()
        if not 0 <= position < self.capacity_tokens:
            raise ArenaError(f"position {position} is outside the capacity of {self.capacity_tokens} tokens")
        return self.blocks[position // self._block_tokens], position % self._block_tokens

    def check_live(self) -> None:
        """Raise ArenaError if the sequence was released."""
        if not self.live:
            raise ArenaError(f"stale handle: the sequence was released already, with its {len(self.blocks)} blocks")

    def __repr__(self) -> str:
        state = f"{self.position}/{self.capacity_tokens} tokens" if self.live else "released"
        return f"KVHandle({len(self.blocks)} blocks from {self.blocks[0] if self.blocks else '-'}, {state})"
