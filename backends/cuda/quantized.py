"""Layers that hold mlx's packed weights, and their way from a checkpoint into one of transformers' models.

`backends.common.affine` has the format. Triton's kernels multiply with the packed weights (`use_kernels`); torch's,
which a layer has at first, dequantise them at every call, which is right but slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cortexstream.backends.common.affine import dense_weights, packing_of
from cortexstream.errors import ModelLoadError
from cortexstream.kernels.torch import affine_matmul as in_torch

Arrays = dict[str, npt.NDArray[Any]]


class _Packed(torch.nn.Module):
    """Packed weights [rows, columns] as buffers: `packed` int32, `scales` and `biases` [rows, columns / group]."""

    packed: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor
    kernels: ModuleType = in_torch  # what multiplies and dequantises

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int) -> None:
        super().__init__()
        self.rows, self.columns = in_torch.check_packed(packed, scales, biases, bits, group)
        self.bits, self.group = bits, group
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("biases", biases.contiguous())

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, {self.bits} bits in groups of {self.group}"


class QuantizedLinear(_Packed):
    """x w^T + bias with packed w [out_features, in_features], as torch.nn.Linear.

    Raises ValueError when the tensors, bits and group do not go together.
    """

    bias: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int,
        bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(packed, scales, biases, bits, group)
        if bias is not None and tuple(bias.shape) != (self.rows,):
            raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{self.rows}]")
        self.out_features, self.in_features = self.rows, self.columns
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features] of x's dtype."""
        product: torch.Tensor = self.kernels.affine_matmul(
            x.reshape(-1, x.shape[-1]).contiguous(), self.packed, self.scales, self.biases, self.bits, self.group,
            bias=self.bias,
        )  # fmt: skip
        return product.view(*x.shape[:-1], self.out_features)


class QuantizedEmbedding(_Packed):
    """Rows of a packed table, as torch.nn.Embedding: token ids [...] -> [..., columns] of `dtype`, times `scale`.

    Raises ValueError when the tensors, bits and group do not go together.
    """

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int,
        dtype: torch.dtype, scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(packed, scales, biases, bits, group)
        self.num_embeddings, self.embedding_dim = self.rows, self.columns
        self.dtype, self.scale = dtype, None if scale is None else float(torch.tensor(scale, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1)
        parts = (part.index_select(0, flat) for part in (self.packed, self.scales, self.biases))
        found: torch.Tensor = self.kernels.dequantize(*parts, self.bits, self.group, self.dtype)
        return (found if self.scale is None else found * self.scale).view(*ids.shape, self.columns)

    def as_linear(self) -> QuantizedLinear:
        """The product with the table, for a head that is tied to it; it has the same tensors, not copies."""
        return QuantizedLinear(self.packed, self.scales, self.biases, self.bits, self.group)


def fuse(modules: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer whose outputs are those of `modules` one behind the other, for layers with the same input.

    Raises ValueError, before anything is copied, unless in_features, bits, group and the scales' dtype are equal.
    """
    kinds = {(m.in_features, m.bits, m.group, m.scales.dtype, m.packed.device) for m in modules}
    if len(kinds) != 1:
        raise ValueError(f"{len(modules)} layers of {len(kinds)} kinds cannot be one: {sorted(map(str, kinds))}")
    bias = None
    if any(m.bias is not None for m in modules):
        bias = torch.cat([m.scales.new_zeros(m.rows) if m.bias is None else m.bias for m in modules])
    packed, scales, biases = (torch.cat([getattr(m, n) for m in modules]) for n in ("packed", "scales", "biases"))
    fused = QuantizedLinear(packed, scales, biases, modules[0].bits, modules[0].group, bias)
    fused.kernels = modules[0].kernels
    return fused


def use_kernels(model: torch.nn.Module, kernels: ModuleType) -> None:
    """Have all packed layers of a model multiply by `kernels`: `kernels.torch` or `kernels.triton`'s affine_matmul."""
    for module in model.modules():
        if isinstance(module, _Packed):
            module.kernels = kernels


def load_weights(model: Any, weights: Arrays, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Fill one of transformers' models, built on the meta device or normally, with a folder that mlx-lm quantised.

    `weights` is what `read_weights` gives, and is emptied; `config` is config.json, whose "quantization" holds for
    every layer with scales that does not override it. Linear layers and embeddings stay packed; other packed tensors
    are dequantised. Dense ones become parameters of `dtype`. A head that is tied to a packed embedding shares its
    tensors. Raises ModelLoadError when the tensors are not those of the model, or not packed as config.json says.
    """
    replace_linears(model, weights, config, dtype)
    rest = dense_weights(weights, config)
    tensors = {name: torch.from_numpy(rest.pop(name)).to(dtype) for name in list(rest)}
    _tie_packed(model, tensors)
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelLoadError(f"{config['model_type']}: {' '.join(str(error).split())[:300]}") from None
    lost = [name for name in missing if name not in model.all_tied_weights_keys and not _is_packed(model, name)]
    if lost or unknown:
        what = f"{lost[0]} is missing" if lost else f"{unknown[0]} has no place in it"
        raise ModelLoadError(f"the weights do not fit transformers' {config['model_type']}: tensor {what}")
    model.tie_weights(recompute_mapping=False)
    _fill_buffers(model)


def replace_linears(model: Any, weights: Arrays, config: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Put a packed layer in place of each Linear and Embedding of `model` that `weights` has packed.

    Returns their names, and takes their tensors out of `weights`. Layers of other classes are left as they are, and so
    are their tensors. The scales keep `dtype` if they have no more digits than it holds, else float32. Raises
    ModelLoadError as `load_weights` does.
    """
    modules = dict(model.named_modules())
    names = [key.removesuffix(".scales") for key in weights if key.endswith(".scales")]
    replaced = []
    for name in names:
        old = modules.get(name)
        if old is None or not _replaceable(old):
            continue
        packing = packing_of(config, name)
        if packing is None:
            raise ModelLoadError(f"tensor {name}.scales is there, but config.json says that {name} is not quantised")
        parts = [_tensor(weights.pop(f"{name}.{part}", None), dtype) for part in ("weight", "scales", "biases", "bias")]
        new = _packed_layer(name, old, parts, packing.bits, packing.group_size, dtype)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, new)
        replaced.append(name)
    return replaced


def _replaceable(module: Any) -> bool:
    """Does the class compute what ours does?"""
    forward = type(module).forward
    scaled = isinstance(module, torch.nn.Embedding) and hasattr(module, "scalar_embed_scale")
    return forward in (torch.nn.Linear.forward, torch.nn.Embedding.forward) or scaled


def _packed_layer(
    name: str, old: Any, parts: list[torch.Tensor | None], bits: int, group: int, dtype: torch.dtype
) -> QuantizedLinear | QuantizedEmbedding:
    packed, scales, biases, bias = parts
    if packed is None or scales is None or biases is None or packed.dtype != torch.int32:
        raise ModelLoadError(f"{name} is quantised and needs {name}.weight (U32), .scales and .biases")
    try:
        if isinstance(old, torch.nn.Embedding):
            scale = getattr(old, "scalar_embed_scale", None)
            table = QuantizedEmbedding(packed, scales, biases, bits, group, dtype, scale)
            new: QuantizedLinear | QuantizedEmbedding = table
        else:
            new = QuantizedLinear(packed, scales, biases, bits, group, bias)
    except ValueError as error:
        raise ModelLoadError(f"{name}: {error}; config.json and the weights do not match") from None
    if (new.rows, new.columns) != tuple(old.weight.shape):
        raise ModelLoadError(f"{name} is {new.rows} x {new.columns}; the model's is {list(old.weight.shape)}")
    if getattr(old, "bias", None) is not None and bias is None:
        raise ModelLoadError(f"tensor {name}.bias is missing; the model's {name} adds one")
    return new


def _tensor(array: npt.NDArray[Any] | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Packed words as int32; floats as `dtype` if that loses nothing."""
    if array is None:
        return None
    if array.dtype == np.uint32:
        return torch.from_numpy(array.view(np.int32))
    exact = torch.from_numpy(array)
    rounded = exact.to(dtype)
    return rounded if torch.equal(rounded.to(exact.dtype), exact) else exact


def _is_packed(model: Any, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), _Packed)


def _tie_packed(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give the head the embedding's packed table, if they are tied and no tensors of its own came, packed or not."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(table, QuantizedEmbedding):
        return
    tied = {target for target in model.all_tied_weights_keys if model.get_submodule(target.rpartition(".")[0]) is head}
    if tied and not isinstance(head, QuantizedLinear) and not tied & tensors.keys():
        model.set_output_embeddings(table.as_linear())
    for target in tied:
        del model.all_tied_weights_keys[target]


def _fill_buffers(model: Any) -> None:
    """What a model built on the meta device computes from its settings, such as rotary frequencies."""
    for name, module in model.named_modules():
        empty = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not empty:
            continue
        for key, buffer in empty.items():
            setattr(module, key, torch.full(buffer.shape, float("nan"), dtype=torch.float32).to(buffer.dtype))
        weights = dict(module.named_parameters(recurse=False))
        for key, value in weights.items():  # it would draw these anew
            setattr(module, key, torch.nn.Parameter(torch.empty_like(value), requires_grad=False))
        model._init_weights(module)
        for key, value in weights.items():
            setattr(module, key, value)
        for key in empty:
            made = getattr(module, key)
            if not made.is_floating_point() or torch.isnan(made).any():
                raise ModelLoadError(f"{name}.{key} is not among the weights, and transformers does not compute it")
