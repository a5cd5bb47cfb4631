"""A layer's keys or values as integers: what kernels take where a pool is not one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch


class QuantizedPool(NamedTuple):
    """The three tensors of a pool [slots, heads, D] in 4 or 8 bits; `kernels.reference.kv_quantize` is the definition.

    The bits are 32 * words / D, a group is D / scales a head: nothing else says so.
    """

    packed: torch.Tensor  # int32 [slots, heads, D * bits / 32]: the definition's uint32
    scales: torch.Tensor  # [slots, heads, D / group]: a number is scale * code + bias
    biases: torch.Tensor  # as scales


Pool = torch.Tensor | QuantizedPool  # a tensor is [slots, heads, D]
