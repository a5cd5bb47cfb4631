"""`kernels.triton.affine_matmul` against its definition in float64 (P2, P12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.triton import affine_matmul as module
from cortexstream.kernels.triton.affine_matmul import split_groups
from tests.kernels.test_affine_matmul import FORMATS, packed, reference
from tests.kernels.triton.support import DEVICE, DTYPES, INTERPRETED, exact, fenced, near, normal, same, torch

FP16, BRAIN, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES: list[tuple[int, int, int, Any, int, int]] = [  # bits, group, rows of x, dtype, N, groups in a row
    (4, 64, 1, BRAIN, 96, 3),
    (4, 64, 17, FP16, 130, 2),
    (4, 32, 5, BRAIN, 40, 4),
    (4, 128, 33, FP16, 65, 2),
    (4, 32, 3, FP32, 33, 5),
    (8, 64, 1, BRAIN, 129, 2),
    (8, 64, 2, FP16, 8, 3),
    (8, 32, 33, FP16, 70, 2),
    (8, 128, 16, FP32, 32, 2),
    (8, 128, 9, BRAIN, 3, 1),
    (4, 64, 64, BRAIN, 20, 1),
    (4, 32, 2, FP16, 8, 16),  # two splits, which are merged, and the bias with them
]

affine_matmul: Any = module.affine_matmul  # tensors are given as *tensors
dequantize: Any = module.dequantize


def on_device(weights: Any, dtype: Any) -> tuple[Any, ...]:
    words, scales, biases = (torch.from_numpy(part) for part in (weights.packed.view(np.int32), *weights[1:]))
    return words.to(DEVICE), scales.to(dtype).to(DEVICE), biases.to(dtype).to(DEVICE)


def definition(x: Any, tensors: tuple[Any, ...], bits: int, group: int, bias: Any = None) -> Any:
    words = tensors[0].cpu().numpy().view(np.uint32)
    return reference.affine_matmul(exact(x), words, exact(tensors[1]), exact(tensors[2]), bits, group, exact(bias))


def unit(x: Any, tensors: tuple[Any, ...], bits: int, group: int) -> Any:
    """x scaled so that results have about unit variance, as `near` expects."""
    return (x / definition(x, tensors, bits, group).std()).to(x.dtype)


def check(bits: int, group: int, rows: int, dtype: Any, columns: int, groups: int) -> None:
    tensors = on_device(packed(columns, groups * group, bits, group), dtype)
    x = unit(normal(rows, groups * group, dtype=dtype), tensors, bits, group)
    bias = normal(columns, dtype=dtype, seed=2)
    for given in (None, bias):
        got = affine_matmul(x, *tensors, bits, group, bias=given)
        near(got / 4, definition(x, tensors, bits, group, given) / 4, dtype)


@pytest.mark.parametrize(("bits", "group", "rows", "dtype", "columns", "groups"), CASES, ids=str)
def test_p2_it_is_the_definition(bits: int, group: int, rows: int, dtype: Any, columns: int, groups: int) -> None:
    check(bits, group, rows, dtype, columns, groups)


@pytest.mark.full_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", reference.GROUPS)
@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("columns", [1, 31, 128, 161])
def test_p2_it_is_the_definition_everywhere(columns: int, bits: int, group: int, dtype: Any) -> None:
    for rows in [*range(1, 34), 48, 63, 64, 65, 100] if columns == 161 else (1, 16, 33, 64, 65):
        check(bits, group, rows, dtype, columns, 512 // group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_p2_weights_of_all_formats_are_written_down(bits: int, group: int, dtype: Any) -> None:
    """One rounding: as the definition in float32, rounded, except where the addition is fused on a GPU."""
    tensors = on_device(packed(33, 3 * group, bits, group), dtype)
    parts = [part.float().cpu().numpy() for part in tensors[1:]]
    want = reference.dequantize(tensors[0].cpu().numpy().view(np.uint32), *parts, bits, group)
    got = dequantize(*tensors, bits, group, dtype)
    if INTERPRETED:
        assert same(got, torch.from_numpy(want).to(dtype))
    near(got / 4, want.astype(np.float64) / 4, dtype)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_many_rows_and_odd_widths_are_multiplied_by_torch(bits: int) -> None:
    tensors = on_device(packed(40, 128, bits, 64), FP32)
    for rows in (2, max(module.MOST_ROWS.values()) + 1):
        x = unit(normal(rows, 128), tensors, bits, 64)
        bias = normal(40, dtype=BRAIN, seed=3)
        near(affine_matmul(x, *tensors, bits, 64, bias=bias), definition(x, tensors, bits, 64, bias), FP32)
        near(affine_matmul(x, *tensors, bits, 64), definition(x, tensors, bits, 64), FP32)


@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, 64, BRAIN), (8, 64, FP16), (4, 32, FP32)], ids=str)
def test_p2_a_row_is_the_same_bits_alone_and_in_any_batch(bits: int, group: int, dtype: Any) -> None:
    """Over every height of a tile, with K in several splits."""
    columns, depth = 70, 17 * group
    assert split_groups(columns, depth, group, 128, 528) < 17
    tensors = on_device(packed(columns, depth, bits, group), dtype)
    x, bias = normal(64, depth, dtype=dtype), normal(columns, dtype=dtype, seed=1)
    whole = affine_matmul(x, *tensors, bits, group, bias=bias)
    for first, rows in ((0, 1), (63, 1), (5, 16), (7, 17), (30, 33)):
        part = affine_matmul(x[first : first + rows].contiguous(), *tensors, bits, group, bias=bias)
        assert same(part, whole[first : first + rows])


def test_splits_are_by_the_shape_and_cover_k() -> None:
    assert split_groups(28672, 4096, 64, 128, 528) == 22  # three splits of 224 tiles
    assert split_groups(4096, 4096, 64, 128, 528) == 8
    assert split_groups(131072, 4096, 64, 128, 528) == 64
    assert split_groups(64, 512, 64, 128, 528) == 8


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_memory_behind_the_tensors_is_neither_read_nor_written(rows: int) -> None:
    """NaN behind x, the scales and the bias; in the interpreter the pages behind may not be touched at all."""
    weights = packed(37, 192, 4, 64)
    tensors, x, bias = on_device(weights, FP16), normal(rows, 192, dtype=FP16), normal(37, dtype=FP16, seed=1)
    want = affine_matmul(x, *tensors, 4, 64, bias=bias)

    def poisoned(tensor: Any) -> Any:
        room = torch.full((tensor.numel() + 4096,), float("nan"), dtype=tensor.dtype, device=DEVICE)
        room[: tensor.numel()] = tensor.flatten()
        return room[: tensor.numel()].view(tensor.shape)

    words = torch.cat((tensors[0].flatten(), torch.full((4096,), -1, dtype=torch.int32, device=DEVICE)))
    words = words[: tensors[0].numel()].view(tensors[0].shape)
    room = torch.full((rows * 37 + 999,), 7.0, dtype=FP16, device=DEVICE)
    out = room[: rows * 37].view(rows, 37)
    behind = (poisoned(tensors[1]), poisoned(tensors[2]))
    assert affine_matmul(poisoned(x), words, *behind, 4, 64, bias=poisoned(bias), out=out) is out
    assert same(out, want) and (room[rows * 37 :] == 7.0).all()
    if INTERPRETED:
        given = [fenced(tensor) for tensor in (x, *tensors)]
        assert same(affine_matmul(*given, 4, 64, bias=fenced(bias), out=fenced(out)), want)
        odd = [fenced(tensor) for tensor in on_device(packed(37, 192, 3, 64), FP16)]
        assert dequantize(*odd, 3, 64, FP16).isfinite().all()


def test_no_rows_and_no_columns() -> None:
    tensors = on_device(packed(8, 64, 4, 64), FP32)
    assert affine_matmul(normal(0, 64), *tensors, 4, 64).shape == (0, 8)
    none = [tensor[:0] for tensor in tensors]
    assert affine_matmul(normal(3, 64), *none, 4, 64).shape == (3, 0)
    assert dequantize(*none, 3 + 1, 64, FP16).shape == (0, 64)


GOOD = dict(zip(("packed", "scales", "biases"), on_device(packed(4, 128, 4, 64), FP32), strict=True))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 7}, "7 bits in groups of 64 are not supported"),
    ({"packed": GOOD["packed"].float()}, "packed is torch.float32"),
    ({"packed": torch.cat([GOOD["packed"]] * 2, 1)[:, :16]}, "packed has strides .* it must be contiguous"),
    ({"scales": GOOD["scales"].double()}, "scales is torch.float64"),
    ({"biases": GOOD["biases"][:3]}, r"biases has shape \[3, 2\]; for this packed it must be \[4, 2\]"),
    ({"x": normal(2, 127)}, r"x has shape \[2, 127\]; it must be \[any, 128\]"),
    ({"x": normal(2, 128).double()}, "x is torch.float64"),
    ({"x": normal(2, 256)[:, ::2]}, "x has strides .* it must be contiguous"),
    ({"bias": normal(5)}, r"bias has shape \[5\]; it must be \[4\]"),
    ({"out": normal(2, 5)}, r"out has shape \[2, 5\]; it must be \[2, 4\]"),
    ({"out": normal(2, 4).half()}, "out is torch.float16; it must be torch.float32"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        affine_matmul(**{"x": normal(2, 128), **GOOD, "bits": 4, "group": 64, **changed})


def test_dequantising_to_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int32; it must be torch.float16 or"):
        dequantize(*GOOD.values(), 4, 64, torch.int32)
