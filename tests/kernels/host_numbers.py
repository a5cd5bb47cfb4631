"""Which numbers an indexed assignment takes from the host: on a GPU each is a copy that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import require

torch: Any = require("torch")


def host_numbers(work: Callable[[], object]) -> list[float]:
    """The Python numbers that `work` assigns to parts of tensors that other tensors choose, as in x[i, j] = 1.

    torch makes a tensor of one on the host and copies it to where x is. It can be seen on a CPU, too: the tensor comes
    from no operation.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[Any] = []
            self.assigned: list[float] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.index_put_.default and any(args[2] is made for made in self.made):
                self.assigned.append(float(args[2]))
            found = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.lift_fresh.default and found.ndim == 0:
                self.made.append(found)
            return found

    with Watch() as watch:
        work()
    assigned: list[float] = watch.assigned
    return assigned
