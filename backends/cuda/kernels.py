"""Which kernels a backend runs on: Triton's or torch's, with or without CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cortexstream.backend import LayerKV
from cortexstream.backends.cuda import host_sample, sample
from cortexstream.backends.cuda.fused import Ops, torch_ops, triton_ops
from cortexstream.errors import BackendUnavailableError, InvalidRequestError
from cortexstream.plan import SampleSpec

log = logging.getLogger("cortexstream")

WIDEST_HEAD = 256  # that Triton's attention takes


Draw = Callable[
    [torch.Tensor, Sequence[SampleSpec], Sequence[int], Sequence[torch.Tensor | None]],
    tuple[torch.Tensor, torch.Tensor],
]
"""(logits, specs, positions, pending) -> (tokens, broken); see `backends.cuda.sample.draw`."""


class Kernels(NamedTuple):
    """The choice, and the fallbacks in it as sentences."""

    triton: bool
    graphs: bool
    ops: Ops
    draw: Draw
    notes: tuple[str, ...] = ()


def choose(options: dict[str, Any], device: torch.device, block_tokens: int) -> Kernels:
    """By the options kernels and cuda_graphs. Without kernels a GPU gets Triton's, or torch's with a note if Triton
    cannot be used; a CPU gets torch's, and Triton's if asked for while TRITON_INTERPRET=1.

    Raises InvalidRequestError for other values and for block sizes that Triton's kernels do not take,
    BackendUnavailableError if Triton was asked for and is not there.
    """
    asked, graphs, gpu = options.get("kernels"), options.get("cuda_graphs"), device.type == "cuda"
    if asked not in (None, "triton", "torch"):
        raise InvalidRequestError("backend_options", f"has kernels {asked!r}; it must be triton or torch")
    if graphs not in (None, True, False):
        raise InvalidRequestError("backend_options", f"has cuda_graphs {graphs!r}; it must be True or False")
    reason = None if asked == "torch" or (asked is None and not gpu) else _unusable(device, block_tokens)
    if reason is not None and asked == "triton":
        raise BackendUnavailableError(f"kernels 'triton': {reason}; or use kernels 'torch'")
    triton = asked == "triton" or (asked is None and gpu and reason is None)
    if graphs and not (triton and gpu):
        raise InvalidRequestError("backend_options", "has cuda_graphs True; graphs need a GPU and Triton's kernels")
    if triton:
        from cortexstream.backends.cuda import triton_sample

        return Kernels(True, gpu and graphs is not False, triton_ops(), triton_sample.draw)
    if reason is not None:
        note = f"attention runs in torch, and slowly: {reason}"
        log.warning("%s", note)
        return Kernels(False, False, torch_ops(), sample.draw, (note,))
    return Kernels(False, False, torch_ops(), sample.draw if gpu else host_sample.draw)


def fitting(kernels: Kernels, layers: Sequence[LayerKV]) -> Kernels:
    """`kernels`, with torch's attention in place of Triton's if a model's heads are too wide for it."""
    widest = max(max(layer.key_dim, layer.value_dim) for layer in layers)
    if not kernels.triton or widest <= WIDEST_HEAD:
        return kernels
    note = f"attention runs in torch, and slowly: heads of {widest} numbers; the kernels take at most {WIDEST_HEAD}"
    log.warning("%s", note)
    return kernels._replace(triton=False, graphs=False, notes=(*kernels.notes, note))


def _unusable(device: torch.device, block_tokens: int) -> str | None:
    """Why Triton's kernels cannot run here, and what to do; None if they can."""
    try:
        import triton
    except ImportError as error:
        return f"{error}; pip install triton"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton needs a GPU, or TRITON_INTERPRET=1 in the environment before the start"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the kernels need compute capability 8.0 or newer, and this GPU has {major}.{minor}"
    if device.type == "cuda":
        try:
            triton_ops().rms_norm(
                torch.ones(1, 16, device=device), torch.ones(16, device=device), 1e-6, unit_offset=False
            )
        except Exception as error:  # a missing C compiler, driver or library: Triton's own errors are of many kinds
            return f"Triton cannot run a kernel: {' '.join(str(error).split())[:200]}"
    if block_tokens & (block_tokens - 1):
        return f"the kernels need blocks of a power of two tokens, not {block_tokens}"
    return None
