"""A buddy allocator without the waste of the textbook one: any pool size, and what is handed out is not rounded."""

from __future__ import annotations

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Run, TreeAllocator


class BuddyAllocator(TreeAllocator):
    """Binary buddies (Knowlton, CACM 1965): the lowest of the smallest fitting pieces; every operation takes
    O(log num_blocks) steps.

    A free piece of order k has 2^k blocks and starts at a multiple of 2^k. A request takes the front of one piece of
    the smallest order that holds it; the rest stays free, so nothing is lost to rounding. Free buddies are one
    piece, always. So the pieces follow from the taken map: the fewest aligned ones that cover the free blocks.

    A node of the tree holds a set of orders, as bits: those of the pieces under it. Invariants, which `check` proves:

        root                  {0, 2}               0b101      a pool of 7 blocks, of which block 5 is taken
                      {2}             {0}                     a node of order k whose blocks are all free: {k}
                  {1}     {1}     {0}     {0}                 any other node: what its children hold
                 {0} {0} {0} {0} {0} { } {0} { }              a leaf: {0} if free, {} if taken or past the end
        taken     0   0   0   0   0   1   0                   one byte a block; taken + free = num_blocks

    Blocks handed out are aligned to the next power of two above their size: fewer, larger holes than first fit. The
    price is that `allocate` finds no run that crosses an alignment border: neighbouring pieces that are not buddies
    are adjacent free memory, which `take` and `free_after` see and `largest_free_run` does not. An empty pool of 100
    blocks is pieces of 64, 32 and 4: `allocate(65)` fails, and `fragmentation` is 0.36.
    """

    _hole = "aligned piece"

    @property
    def largest_free_run(self) -> int:
        """Blocks of the largest piece, 0 when nothing is free; neighbouring pieces count apart."""
        return (1 << self._tree[1].bit_length()) >> 1

    def free_after(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            return 0
        # All blocks from `block` up to this node are free; `whole` is what the node holds if its own are too.
        tree, node, whole = self._tree, self._leaves + block, 1
        while tree[node] == whole:
            node += 1
            if not node & 1:
                node, whole = node >> 1, whole << 1
        while whole > 1:
            node, whole = node << 1, whole >> 1
            if tree[node] == whole:
                node += 1
        return node - self._leaves - block

    def check(self) -> None:
        super().check()
        tree, leaves = self._tree, self._leaves
        free = [1 - taken for taken in self._taken]
        if tree[leaves:] != free + [0] * (leaves - self.num_blocks):
            raise ArenaError("the tree's leaves do not match the blocks that are not taken")
        for node in reversed(range(1, leaves)):
            order = leaves.bit_length() - node.bit_length()
            if tree[node] != _joined(tree[2 * node], tree[2 * node + 1], 1 << order):
                raise ArenaError(f"node {node} of the tree, of order {order}, does not follow from its children")

    def _find(self, size: int) -> int:
        order = (size - 1).bit_length()
        fitting = self._tree[1] >> order << order
        piece = fitting & -fitting  # the set {k} of the smallest order k that fits
        node, whole = 1, self._leaves
        while whole > piece:
            node, whole = node << 1, whole >> 1
            if not self._tree[node] & piece:
                node += 1
        return node * piece - self._leaves

    def _insert(self, run: Run) -> None:
        self._fill(run, 1)

    def _remove(self, run: Run) -> None:
        self._fill(run, 0)

    def _fill(self, run: Run, free: int) -> None:
        """Set the leaves of a run to free (1) or taken (0), then the nodes above them, level by level: those between
        the first and the last are whole, so only these two need their children."""
        tree, first, last = self._tree, self._leaves + run.start, self._leaves + run.end - 1
        tree[first : last + 1] = [free] * run.size
        whole = 1
        while first > 1:
            first, last, whole = first >> 1, last >> 1, whole << 1
            if last - first > 1:
                tree[first + 1 : last] = [free * whole] * (last - first - 1)
            before = tree[first]
            tree[first] = _joined(tree[2 * first], tree[2 * first + 1], whole)
            if first != last:
                tree[last] = _joined(tree[2 * last], tree[2 * last + 1], whole)
            elif tree[first] == before:
                break


def _joined(left: int, right: int, whole: int) -> int:
    """What a node holds, given its children: both halves whole make the node whole."""
    return whole if left & right == whole >> 1 else left | right
