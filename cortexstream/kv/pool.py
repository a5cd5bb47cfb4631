"""What the two placements have in common: a pool of blocks, who holds which, and what must be copied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Allocator
from cortexstream.kv.handle import KVHandle
from cortexstream.plan import MemoryOp, Move


class Ledger:
    """The copies planned since `take`, in order, and counters since the start."""

    def __init__(self, num_pools: int) -> None:
        self._ops: list[MemoryOp] = []
        self.moved_tokens = [0] * num_pools  # by growth and compaction, per pool
        self.copied_tokens = [0] * num_pools  # by prefix hits and forks
        self.relocations = 0
        self.compactions = 0
        self.changed: dict[KVHandle, None] = {}  # handles whose blocks are not the ones that they show

    def add(self, op: MemoryOp) -> None:
        self._ops.append(op)

    def move(self, move: Move) -> None:
        self._ops.append(move)
        self.moved_tokens[move.pool] += move.num_tokens

    def copy(self, move: Move) -> None:
        self._ops.append(move)
        self.copied_tokens[move.pool] += move.num_tokens

    def take(self) -> tuple[MemoryOp, ...]:
        ops, self._ops = tuple(self._ops), []
        return ops


class Pool(ABC):
    """The blocks of one kind of layer. `claims` says which blocks a handle holds here, in order of position.

    Pool 0 serves the layers with full attention, the others a window each: `ring_tokens` is then the most that a
    sequence ever holds. Whoever calls makes sure that `num_free` suffices; a pool evicts nothing.
    """

    def __init__(
        self, index: int, allocator: Allocator, block_tokens: int, ring_tokens: int | None, ledger: Ledger
    ) -> None:
        self.index = index
        self.allocator = allocator
        self.block_tokens = block_tokens
        self.ring_tokens = ring_tokens
        self.ledger = ledger
        self.claims: dict[KVHandle, tuple[int, ...]] = {}

    def assign(self, handle: KVHandle, blocks: tuple[int, ...]) -> None:
        self.claims[handle] = blocks
        self.ledger.changed[handle] = None

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones not counted."""
        return self.allocator.num_free

    def slots(self, num_tokens: int) -> int:
        """How many of so many tokens the pool holds at a time."""
        return num_tokens if self.ring_tokens is None else min(num_tokens, self.ring_tokens)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens, without the rounding of capacity classes."""
        return -(-self.slots(num_tokens) // self.block_tokens)

    def capacity_tokens(self, handle: KVHandle) -> int | None:
        """Tokens that a handle's blocks here allow; None where a full ring allows any number."""
        capacity = len(self.claims[handle]) * self.block_tokens
        return None if self.ring_tokens is not None and capacity >= self.ring_tokens else capacity

    @abstractmethod
    def need(self, num_tokens: int, limit_tokens: int | None) -> int:
        """Blocks that a sequence of `num_tokens` takes, when it can become `limit_tokens` long."""

    @abstractmethod
    def claim(self, handle: KVHandle, size: int) -> None:
        """Give a handle its first `size` blocks."""

    @abstractmethod
    def resize(self, handle: KVHandle, size: int) -> None:
        """Change a handle's blocks to `size`; what is written stays readable."""

    @abstractmethod
    def copy(self, source: KVHandle, target: KVHandle, num_tokens: int) -> None:
        """Plan to copy what `source` holds of its first `num_tokens` tokens into `target`'s blocks."""

    @abstractmethod
    def release(self, handle: KVHandle) -> None:
        """Free what a handle holds."""

    @abstractmethod
    def check(self, cached: Sequence[int]) -> None:
        """Prove that every taken block is held by a handle or in `cached`, and by no more than may share it."""

    def transfer(self, source: KVHandle, target: KVHandle) -> None:
        """Hand all that `source` holds to `target`."""
        self.assign(target, self.claims.pop(source))

    def _check_taken(self, owned: set[int]) -> None:
        self.allocator.check()
        taken = {i for i, c in enumerate(self.allocator.block_map(width=self.num_blocks or 1)) if c == "X"}
        if owned != taken:
            raise ArenaError(
                f"pool {self.index}: blocks {sorted(owned ^ taken)[:8]} are taken without an owner, or owned but free"
            )
