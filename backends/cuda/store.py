"""Where one layer's keys or values lie: torch tensors on the device."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import torch

from cortexstream.backend import KVArray, KVQuantization, PackedKV
from cortexstream.backends.common.kv_store import MakeStore, Slots, Store
from cortexstream.backends.cuda.quantize import dequantize, quantize
from cortexstream.kernels.torch.quantized_pool import QuantizedPool


def store_maker(dtype: torch.dtype, device: torch.device) -> MakeStore:
    """Stores of this dtype on this device; see `backends.common.kv_store.MakeStore`. They raise MemoryError when the
    device refuses."""

    def make(slots: int, heads: int, dim: int, quantization: KVQuantization | None) -> Store:
        try:
            return TorchStore(slots, heads, dim, dtype, device, quantization)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise MemoryError(str(error)) from error

    return make


class TorchStore:
    """[slots, heads, dim] of `dtype`, or with `quantization` packed int32 [slots, heads, dim * bits / 32], and scales
    and biases [slots, heads, dim / group] of `dtype`."""

    def __init__(
        self, slots: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device,
        quantization: KVQuantization | None,
    ) -> None:  # fmt: skip
        self.quantization, self.dtype = quantization, dtype
        if quantization is None:
            self.parts = [torch.zeros(slots, heads, dim, dtype=dtype, device=device)]
        else:
            bits, group = quantization
            self.parts = [torch.zeros(slots, heads, dim * bits // 32, dtype=torch.int32, device=device)]
            self.parts += [torch.zeros(slots, heads, dim // group, dtype=dtype, device=device) for _ in range(2)]

    @property
    def pool(self) -> torch.Tensor | QuantizedPool:
        """As the Triton kernels take it."""
        return self.parts[0] if self.quantization is None else QuantizedPool(*self.parts)

    def empty(self, slots: int) -> TorchStore:
        """A store like this one, for as many slots; its memory holds anything."""
        store = copy(self)
        store.parts = [part.new_empty(slots, *part.shape[1:]) for part in self.parts]
        return store

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def append(self, slots: Any, new: torch.Tensor) -> None:
        where = self._index(slots)
        for part, values in zip(self.parts, self._encode(new), strict=True):
            part[where] = values

    def read(self, where: Any) -> torch.Tensor:
        index = where if isinstance(where, slice) else self._index(where)
        return self._decode([part[index] for part in self.parts])

    def rounded(self, new: torch.Tensor) -> torch.Tensor:
        return self._decode(self._encode(new))

    def move(self, source: int, target: int, count: int) -> None:
        for part in self.parts:
            part[target : target + count] = part[source : source + count].clone()

    def take(self, slots: Slots) -> list[torch.Tensor]:
        where = self._index(slots)
        return [part[where].cpu() for part in self.parts]

    def put(self, slots: Slots, copies: list[torch.Tensor]) -> None:
        where = self._index(slots)
        for part, kept in zip(self.parts, copies, strict=True):
            part[where] = kept.to(part.device)

    def to_host(self, slots: Slots) -> KVArray:
        first, *others = (
            part.numpy() if part.dtype == torch.int32 else part.float().numpy() for part in self.take(slots)
        )
        return PackedKV(first.view(np.uint32), *others) if others else first

    def from_host(self, slots: Slots, new: KVArray) -> None:
        parts = [new.packed.view(np.int32), new.scales, new.biases] if isinstance(new, PackedKV) else [new]
        copies = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        self.put(slots, [copy.to(part.dtype) for copy, part in zip(copies, self.parts, strict=True)])

    def _index(self, slots: Any) -> torch.Tensor:
        return torch.as_tensor(slots, device=self.parts[0].device)

    def _encode(self, new: torch.Tensor) -> list[torch.Tensor]:
        new = new.to(self.dtype)
        return [new] if self.quantization is None else list(quantize(new, *self.quantization))

    def _decode(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0] if self.quantization is None else dequantize(parts, *self.quantization)
