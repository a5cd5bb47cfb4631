"""A tree of token chunks: which tokens are the beginning of which others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from cortexstream.errors import ArenaError

T = TypeVar("T")
Key = tuple[int, ...]


class Node(Generic[T]):
    """One chunk of tokens behind those of its parents. `value` is the owner's; None marks a node that was removed."""

    __slots__ = ("children", "depth_tokens", "key", "parent", "value")

    def __init__(self, parent: Node[T] | None, key: Key, value: T | None) -> None:
        self.parent = parent
        self.key = key
        self.value = value
        self.depth_tokens: int = 0 if parent is None else parent.depth_tokens + len(key)
        self.children: dict[int, dict[Key, Node[T]]] = {}  # by first token, so that few keys need comparing


class PrefixTree(Generic[T]):
    """Chunks of `chunk_tokens` tokens; a leaf may be shorter. Chunks are found by hash and compared token by token, so
    what matches is equal. A walk costs O(tokens), whatever the tree holds."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.root: Node[T] = Node(None, (), None)

    def walk(self, tokens: Sequence[int]) -> list[Node[T]]:
        """The nodes of whole chunks that `tokens` begins with, from the root's child on."""
        path: list[Node[T]] = []
        node, size = self.root, self.chunk_tokens
        for start in range(0, len(tokens) - size + 1, size):
            found = node.children.get(tokens[start], {}).get(tuple(tokens[start : start + size]))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def longest_child(self, node: Node[T], rest: Sequence[int]) -> tuple[Node[T] | None, int]:
        """The child whose chunk begins with the most tokens of `rest`, and how many; (None, 0) if none does."""
        best: Node[T] | None = None
        most = 0
        for key, child in node.children.get(rest[0], {}).items() if rest else ():
            common = common_prefix(key, rest)
            if common > most:
                best, most = child, common
        return best, most

    def child(self, node: Node[T], key: Key) -> Node[T] | None:
        return node.children.get(key[0], {}).get(key)

    def add(self, node: Node[T], key: Key, value: T) -> Node[T]:
        child = Node(node, key, value)
        node.children.setdefault(key[0], {})[key] = child
        return child

    def remove(self, node: Node[T]) -> None:
        """Take a leaf out."""
        parent = node.parent
        if parent is None or node.children:
            raise ValueError("only a leaf that is in the tree can be removed")
        siblings = parent.children[node.key[0]]
        del siblings[node.key]
        if not siblings:
            del parent.children[node.key[0]]
        node.parent = node.value = None

    def below(self, node: Node[T]) -> Iterator[Node[T]]:
        """A node and every one behind it, parents first."""
        stack = [node]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(child for keys in node.children.values() for child in keys.values())

    def __iter__(self) -> Iterator[Node[T]]:
        """Every node but the root, parents first."""
        return (node for node in self.below(self.root) if node is not self.root)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common. Compares slices first, which is quick for long ones."""
    if type(one) is not type(other):  # a tuple never equals a list
        one, other = tuple(one), tuple(other)
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def check_same(known: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Raise ArenaError if `tokens` are not those that others may have read already: of a sequence, `known` were
    published."""
    same = common_prefix(known, tokens)
    if same < min(len(known), len(tokens)):
        raise ArenaError(f"{len(known)} tokens were published; token {same} was {known[same]}, not {tokens[same]}")
