"""Options of the engine, validated once. The only place that reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from cortexstream.errors import InvalidRequestError, shown

BACKENDS = ("auto", "mlx", "cuda", "reference", "null")
MAX_NUM_SEQS = 4096
MAX_KV_BLOCKS = 2**31 - 1  # of one pool: block tables hold 32-bit numbers, and a block takes some 40 bytes of the host
CHOICES: dict[str, tuple[str | None, ...]] = {
    "kv_layout": (None, "run", "paged"),
    "kv_policy": ("first_fit", "buddy"),
    "kv_dtype": ("auto", "int8", "int4"),
    "preemption_mode": ("auto", "recompute", "swap"),
}
MAX_BYTES = 1 << 62  # more than any machine has, and exact as a float
SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?")
METHODS = ("ngram", "draft_model")
MAX_SPECULATIVE_TOKENS = 32  # beyond, most guesses are wrong whatever the text, and each costs a row of the batch
MAX_LOOKUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How an engine guesses ahead: vLLM's names. Raises InvalidRequestError for values out of range."""

    method: Literal["ngram", "draft_model"]  # left out: draft_model if a model is given, else ngram
    num_speculative_tokens: int  # guesses per row, 1..32
    model: str | None = None  # draft_model: a folder or Hugging Face id of a smaller model with the same vocabulary
    prompt_lookup_max: int = 4  # ngram: the longest piece of text that is looked for, in tokens, 1..16
    prompt_lookup_min: int = 2  # and the shortest, at most the longest

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _bad_guesses(f"has method {shown(self.method)}; it must be {' or '.join(METHODS)}")
        for name, least, most in (
            ("num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS),
            ("prompt_lookup_max", 1, MAX_LOOKUP),
            ("prompt_lookup_min", 1, self.prompt_lookup_max),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise _bad_guesses(f"has {name} {shown(value)}; it must be a whole number, {least} to {most}")
        if (self.method == "draft_model") != (self.model is not None):
            raise _bad_guesses(
                "has a model, but method ngram uses none: leave one of them out"
                if self.model is not None
                else "has method draft_model, but no model: give a folder or a Hugging Face id"
            )
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            raise _bad_guesses(f"has model {shown(self.model)}; it must be a folder or a Hugging Face id")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine. Unknown names are a TypeError; bad values an InvalidRequestError."""

    model: str | None = None  # folder or Hugging Face id; None is the embedded model
    backend: str = "auto"  # auto, mlx, cuda, reference, null; auto honours CORTEXSTREAM_BACKEND
    dtype: str = "auto"  # auto: the checkpoint's on a GPU, float32 on a CPU
    max_model_len: int | None = None  # tokens; None: the model's context
    max_num_seqs: int = 64  # sequences that run at once
    max_num_batched_tokens: int = 512  # tokens of one step
    memory_utilization: float | None = None  # share of free memory for KV; None: 0.8 of a GPU's, 0.25 of a host's
    kv_cache_memory: int | str | None = None  # bytes, or "4GiB"; overrides memory_utilization
    num_kv_blocks: int | None = None  # overrides both
    block_tokens: int | None = None  # None: the backend's choice
    kv_layout: Literal["run", "paged"] | None = None  # None: the backend's choice
    kv_policy: Literal["first_fit", "buddy"] = "first_fit"  # which free blocks are taken
    kv_dtype: Literal["auto", "int8", "int4"] = "auto"  # auto: like dtype; else integers with a scale per group
    enable_prefix_caching: bool = True  # what was computed for one prompt serves others that begin alike
    batch_invariant: bool | None = None  # tokens and logprobs are the same bits alone and in any batch; None: where
    # that costs less than a tenth, and on for reference, which defines what is right. A backend that cannot says so in
    # `LLM.info.invariance`
    preemption_mode: Literal["auto", "recompute", "swap"] = "auto"  # auto: the cheaper one, as measured
    swap_memory: int | str | None = None  # most bytes of host memory, beside the KV memory and taken when they are
    # used, for copies of preempted sequences; 0: none; None: 1/4 of the KV memory, at most 4 GiB
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None  # guess ahead; None: no. See
    # SpeculativeConfig: {"method": "ngram", "num_speculative_tokens": 4}, or {"model": FOLDER, ...}
    seed: int | None = 0  # where requests without a seed get theirs from; None: another one at every start
    revision: str | None = None  # of a Hugging Face id

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidRequestError("backend", f"is {shown(self.backend)}; must be one of {', '.join(BACKENDS)}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                words = " or ".join(repr(value) for value in values if value is not None)
                raise InvalidRequestError(name, f"is {shown(getattr(self, name))}; must be {words}")
        if not isinstance(self.enable_prefix_caching, bool):
            raise InvalidRequestError(
                "enable_prefix_caching", f"is {shown(self.enable_prefix_caching)}; must be True or False"
            )
        if not (self.batch_invariant is None or isinstance(self.batch_invariant, bool)):
            raise InvalidRequestError(
                "batch_invariant",
                f"is {shown(self.batch_invariant)}; must be True, False or None (where it costs little)",
            )
        share = self.memory_utilization
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and (not number or not 0.0 < share <= 1.0):
            raise InvalidRequestError("memory_utilization", f"is {shown(share)}; must be a number above 0, at most 1")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_kv_blocks", "block_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidRequestError(name, f"is {shown(value)}; must be a whole number of at least 1")
        if self.max_num_seqs > MAX_NUM_SEQS:
            raise InvalidRequestError("max_num_seqs", f"is {shown(self.max_num_seqs)}; must be at most {MAX_NUM_SEQS}")
        if self.num_kv_blocks is not None and self.num_kv_blocks > MAX_KV_BLOCKS:
            raise InvalidRequestError(
                "num_kv_blocks", f"is {shown(self.num_kv_blocks)}; must be at most {MAX_KV_BLOCKS}"
            )
        seed = self.seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64):
            raise InvalidRequestError("seed", f"is {shown(seed)}; must be None or a whole number, 0 to 2**64 - 1")
        object.__setattr__(self, "speculative_config", speculative_config(self.speculative_config))
        if self.kv_cache_memory is not None:
            object.__setattr__(self, "kv_cache_memory", parse_bytes("kv_cache_memory", self.kv_cache_memory))
        never_swap = type(self.swap_memory) is int and self.swap_memory == 0
        if self.swap_memory is not None and not never_swap:
            object.__setattr__(self, "swap_memory", parse_bytes("swap_memory", self.swap_memory))

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """`speculative_config`, checked."""
        return speculative_config(self.speculative_config)

    @classmethod
    def from_kwargs(cls, values: dict[str, Any]) -> EngineConfig:
        """Like `EngineConfig(**values)`, but the TypeError for an unknown name lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; known are {', '.join(known)}")
        return cls(**values)


def parse_bytes(field: str, value: int | str) -> int:
    """Bytes, 1 to MAX_BYTES, from a number or a text like "512MiB", "4G", "1.5 TB"; raises InvalidRequestError."""
    size: float = 0
    if isinstance(value, int):
        size = 0 if isinstance(value, bool) else value
    elif match := SIZE.fullmatch(str(value).strip().lower()):
        number, unit, binary = match.groups()
        size = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " ")  # inf: refused like any other
    if size > MAX_BYTES:
        raise InvalidRequestError(field, f"is {shown(value)}; must be at most 2**62 bytes")
    if size < 1:
        raise InvalidRequestError(
            field, f"is {shown(value)}; must be a number of bytes, or a text like '512MiB' or '4GiB'"
        )
    return int(size)


def backend_from_environment() -> str | None:
    """CORTEXSTREAM_BACKEND, validated; None when it is unset or empty."""
    name = os.environ.get("CORTEXSTREAM_BACKEND", "")
    if name and name not in BACKENDS:
        raise InvalidRequestError("CORTEXSTREAM_BACKEND", f"is {name!r}; must be one of {', '.join(BACKENDS)}")
    return name or None


def speculative_config(value: Any) -> SpeculativeConfig | None:
    """What the caller gave, checked; raises InvalidRequestError."""
    if value is None or isinstance(value, SpeculativeConfig):
        return value
    if not isinstance(value, Mapping):
        raise _bad_guesses(f"is {shown(value)}; it must be a dict such as {{'num_speculative_tokens': 4}}")
    known = [f.name for f in fields(SpeculativeConfig)]
    for name in value:
        if name not in known:
            raise _bad_guesses(f"has {shown(name)}; known are {', '.join(known)}")
    if "num_speculative_tokens" not in value:
        raise _bad_guesses("lacks num_speculative_tokens: give the number of guesses per row, such as 4")
    return SpeculativeConfig(**{"method": "draft_model" if value.get("model") is not None else "ngram", **value})


def _bad_guesses(message: str) -> InvalidRequestError:
    return InvalidRequestError("speculative_config", message)
