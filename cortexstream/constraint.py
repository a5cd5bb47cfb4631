"""What may be drawn, token by token: the two protocols between a grammar and the engine, which knows no grammars.

A mask is uint32 [ceil(vocab_size / 32)]: bit id % 32 of word id // 32 is set if the token may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Mask: TypeAlias = "npt.NDArray[np.uint32]"


def mask_of(ids: Iterable[int], vocab_size: int) -> Mask:
    """The mask that allows these tokens alone."""
    import numpy as np  # here, so that the words of a request load without it

    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    mask: Mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)
    return mask


class ConstraintState(Protocol):
    """Where one completion stands in its grammar. Used on the engine's thread alone."""

    def masks(self, draft: tuple[int, ...] = ()) -> list[Mask]:
        """What may be drawn now, and after each token of `draft`: 1 + len(draft) masks. Those after a drafted token
        that may not be drawn, or where the grammar fails, are all zeros. Nothing is advanced. Raises ConstraintError if
        the grammar fails now."""
        ...

    def advance(self, token: int) -> None:
        """A token was drawn. Raises ConstraintError if it is not allowed."""
        ...

    @property
    def is_over(self) -> bool:
        """Nothing but an end-of-sequence token may follow."""
        ...


class Constraint(Protocol):
    """A grammar that is ready for use; the n completions of a request share it."""

    def start(self) -> ConstraintState: ...
