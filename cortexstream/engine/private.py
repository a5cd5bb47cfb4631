"""Steps outside of the schedule: to compute a prefix and read its keys and values, or to bring such in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cortexstream.backend import LayerState, ModelInfo, kv_misfit
from cortexstream.errors import InvalidRequestError
from cortexstream.kv import KVHandle
from cortexstream.plan import PlanRow, ring_tokens

if TYPE_CHECKING:
    from cortexstream.engine.core import EngineCore


def export_prefix(core: EngineCore, tokens: Sequence[int]) -> list[LayerState]:
    """Keys and values of a prompt, computed as far as they are not known yet, and kept for reuse afterwards.

    Raises InvalidRequestError for tokens that the engine could not serve, ArenaFullError if blocks are missing now,
    EngineError if every slot is taken.
    """
    check_prefix(core, tokens)
    core.settle()
    slot = core.scheduler.borrow_slot()
    try:
        handle = core.arena.admit(len(tokens), len(tokens), tokens)
        if not _windows_are_whole(core, handle, len(tokens)):
            core.arena.release(handle)
            handle = core.arena.admit(len(tokens), len(tokens))
        try:
            core.run_alone([])  # copies of what others have computed
            while handle.position < len(tokens):
                start = handle.position
                chunk = tuple(tokens[start : start + core.limits.max_batched_tokens])
                handle.advance(len(chunk))
                core.run_alone([PlanRow(-1, slot, chunk, start, handle.rows, None)])
            layers = core.backend.read_kv(handle.rows, len(tokens))
        except BaseException:
            core.arena.release(handle)
            raise
        core.arena.release(handle, tokens)
    finally:
        core.scheduler.return_slot(slot)
    return layers


def _windows_are_whole(core: EngineCore, handle: KVHandle, num_tokens: int) -> bool:
    """Will the rings hold the last `window` of so many tokens once the rest is computed? What a new sequence finds is
    one token less: the window before its first own position."""
    for window in core.backend.model.windows:
        first = max(0, num_tokens - window)
        turned = handle.written - ring_tokens(window, core.arena.block_tokens)
        if first < handle.position and (first < turned or num_tokens <= handle.shortest_reuse):
            return False
    return True


def import_prefix(core: EngineCore, tokens: Sequence[int], layers: list[LayerState]) -> int:
    """Keep keys and values that were computed elsewhere for prompts that begin with `tokens`; returns how many of the
    tokens will be found: all of them, or in `paged` placement those of full blocks.

    Raises like `export_prefix`, and InvalidRequestError for layers that are not this model's.
    """
    check_prefix(core, tokens)
    check_layers(core.backend.model, len(tokens), layers)
    core.settle()
    handle = core.arena.admit(len(tokens), len(tokens))
    try:
        core.run_alone([])
        core.backend.write_kv(handle.rows, len(tokens), layers)
    except BaseException:
        core.arena.release(handle)
        raise
    handle.advance(len(tokens))
    if any(window < len(tokens) for window in core.backend.model.windows):
        handle.shortest_reuse = len(tokens) - 1  # a file has the last windows only
    core.arena.release(handle, tokens)
    return len(tokens) if core.arena.placement == "run" else len(tokens) - len(tokens) % core.arena.block_tokens


def check_prefix(core: EngineCore, tokens: Sequence[int]) -> None:
    """Raise InvalidRequestError if the engine could not serve a prompt that begins with these tokens."""
    limits = core.limits
    if not core.arena.prefix_caching:
        raise InvalidRequestError("prefix", "cannot be kept: prefixes are not reused here (see `doctor`)")
    if not 1 <= len(tokens) < limits.max_tokens:
        raise InvalidRequestError(
            "prefix", f"has {len(tokens)} tokens; it must have 1 to {limits.max_tokens - 1} ({limits.reason})"
        )
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < limits.vocab_size:
            raise InvalidRequestError(
                "prefix", f"has token id {token}; the vocabulary has ids 0 to {limits.vocab_size - 1}"
            )


def check_layers(model: ModelInfo, num_tokens: int, layers: Sequence[LayerState]) -> None:
    """Raise InvalidRequestError unless `layers` are keys and values of this model for so many tokens."""
    if len(layers) != len(model.layers):
        raise InvalidRequestError("prefix", f"has {len(layers)} layers; the model has {len(model.layers)}")
    for number, (layer, state) in enumerate(zip(model.layers, layers, strict=True)):
        kept = num_tokens if layer.window is None else min(num_tokens, layer.window)
        for name, array, dim in (("keys", state.keys, layer.key_dim), ("values", state.values, layer.value_dim)):
            problem = kv_misfit(array, kept, layer.num_kv_heads, dim, model.kv_quantization)
            if problem is not None:
                raise InvalidRequestError("prefix", f"has {name} in layer {number} that are {problem}")
