"""What a caller asks for: immutable, validated when it is made."""

from __future__ import annotations

import copy
import enum
import math
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, NoReturn

from cortexstream.constraint import Constraint
from cortexstream.errors import InvalidRequestError, shown
from cortexstream.presets import PRESETS
from cortexstream.structured import GrammarSource, grammar_source

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
MAX_SEED = 2**64 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000.0  # beyond, float32 logits divided by it overflow or vanish


class FinishReason(enum.StrEnum):
    """Why a completion ended. STOP: an end-of-sequence token, a stop token or a stop string."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Bias(dict[int, float]):
    """Token id -> bias, as it was checked: it cannot be changed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("SamplingParams are not changed once they are made; dataclasses.replace makes others")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[Bias], tuple[dict[int, float]]]:
        return type(self), (dict(self),)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw a completion. Names and meanings are vLLM's.

    Order of operations: logit_bias, banned tokens and grammar, penalties, temperature, min_p, top_k, top_p, draw
    (`cortexstream.sampling` is the definition). Raises InvalidRequestError for a value out of its range, TypeError for
    an unknown name.

    At most one of `response_format`, `regex`, `choice` and `grammar` says what the text must be
    (`cortexstream.structured`); the text ends when nothing can follow, before `min_tokens` if need be, and is cut off
    by `max_tokens`.
    """

    n: int = 1  # completions per prompt, 1..128
    max_tokens: int | None = 256  # at least 1; None: as many as fit
    min_tokens: int = 0  # so many come before any end-of-sequence or stop token, or the end of a stop string
    temperature: float = 1.0  # 0, or 0.001..1000; 0 takes the likeliest token, the lowest id among equals
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0  # [0, 1]
    seed: int | None = None  # None: drawn from the engine's seed and the request's number
    stop: Sequence[str] = ()  # strings that end the text; they are not part of it
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0  # 0.01..10, over prompt and output
    presence_penalty: float = 0.0  # [-2, 2], over output
    frequency_penalty: float = 0.0  # [-2, 2], over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> [-100, 100]
    allowed_token_ids: Sequence[int] | None = None  # nothing else is drawn
    bad_token_ids: Sequence[int] = ()  # never drawn
    logprobs: int | None = None  # 0..20: the drawn token's logprob and so many of the likeliest
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    """Of which distribution `logprobs` are: the model's own, or the one that is drawn from, after bias, grammar,
    penalties, temperature and filters. Greedy draws are from the former after bias, grammar and penalties."""
    prompt_logprobs: int | None = None  # 0..20: the same for the prompt's tokens, always of the model's distribution;
    # such a prompt is computed whole, whatever is known of it
    sampling_metadata: bool = False  # report entropy, probability and number of filtered tokens of every draw
    response_format: Any = None  # OpenAI's: {"type": "json_object"}, {"type": "json_schema", "json_schema": {...}}
    regex: str | None = None  # the whole text matches it
    choice: Sequence[str] | None = None  # the text is one of these
    grammar: str | None = None  # in Lark's notation
    structure: GrammarSource | None = field(init=False, default=None)  # which of the four it is, checked

    def __post_init__(self) -> None:
        put = object.__setattr__
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        put(self, "stop", () if stop is None else _items("stop", stop, str))  # None is what vLLM's callers write
        ids = self.stop_token_ids
        put(self, "stop_token_ids", () if ids is None else _items("stop_token_ids", ids, int))
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise InvalidRequestError("logit_bias", f"is {shown(bias)}; must map token ids to numbers")
        put(self, "logit_bias", Bias((_int("logit_bias", k), _float("logit_bias", v)) for k, v in bias.items()))
        ids = self.bad_token_ids
        put(self, "bad_token_ids", () if ids is None else _items("bad_token_ids", ids, int))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _items("allowed_token_ids", self.allowed_token_ids, int))
        for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None or name not in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
                put(self, name, _int(name, value))
        if self.top_k == -1:
            put(self, "top_k", 0)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            put(self, name, _float(name, getattr(self, name)))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "sampling_metadata"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, f"is {shown(getattr(self, name))}; must be True or False")
        put(self, "structure", grammar_source(self.response_format, self.regex, self.choice, self.grammar))
        if self.choice is not None:
            put(self, "choice", tuple(self.choice))
        put(self, "response_format", copy.deepcopy(self.response_format))  # what the caller has may be changed
        self._check_ranges()

    def _check_ranges(self) -> None:
        _in_range("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, None)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens, "max_tokens")
        _in_range("top_k", self.top_k, 0, None)
        if self.temperature != 0.0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            limits = f"0 (greedy), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
            raise InvalidRequestError("temperature", f"is {self.temperature}; must be {limits}")
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("top_p", f"is {self.top_p}; must be above 0 and at most 1 (1 is off)")
        _in_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        if not isinstance(self.logprobs_mode, str) or self.logprobs_mode not in LOGPROBS_MODES:
            words = " or ".join(repr(mode) for mode in LOGPROBS_MODES)
            raise InvalidRequestError("logprobs_mode", f"is {shown(self.logprobs_mode)}; must be {words}")
        if self.allowed_token_ids is not None and not set(self.allowed_token_ids) - set(self.bad_token_ids):
            raise InvalidRequestError(
                "allowed_token_ids", "leaves no token to draw; allow at least one that bad_token_ids does not have"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError("stop", f"has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        if any(not s for s in self.stop):
            raise InvalidRequestError("stop", "has an empty string; every stop string needs a character")
        for token, bias in self.logit_bias.items():
            _in_range("logit_bias", bias, -100.0, 100.0, of=f"token {token}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplingParams:
        """The parameters of `cortexstream.presets.PRESETS[name]`, with changes: preset("creative", max_tokens=99)."""
        if not isinstance(name, str) or name not in PRESETS:
            raise InvalidRequestError("preset", f"is {shown(name)}; must be one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Like `SamplingParams(**values)`; an unknown name is an InvalidRequestError."""
        if not isinstance(values, Mapping):
            raise InvalidRequestError("sampling_params", f"is {shown(values)}; must map names to values")
        known = {f.name for f in fields(cls) if f.init}
        for name in values:
            if name not in known:
                raise InvalidRequestError(name, f"unknown sampling parameter; known are {', '.join(sorted(known))}")
        return cls(**values)


def _in_range(name: str, value: float, low: float, high: float | None, high_name: str = "", *, of: str = "") -> None:
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"{low} to {high}"
        limit += f" ({high_name})" if high_name else ""
        raise InvalidRequestError(name, f"is {shown(value)}{' for ' + of if of else ''}; must be {limit}")


def _int(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidRequestError(name, f"is {shown(value)}; must be a whole number")
    return number


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequestError(name, f"is {shown(value)}; must be a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequestError(name, f"is {shown(value)}; must be a finite number")
    return number


def _items(name: str, values: Iterable[Any], kind: type) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise InvalidRequestError(name, f"is {shown(values)}; must be a list of items of type {kind.__name__}")
    try:
        items = tuple(values)
    except TypeError:  # numpy calls a single number iterable
        raise InvalidRequestError(
            name, f"is {shown(values)}; must be a list of items of type {kind.__name__}"
        ) from None
    if kind is int:
        plain = set(map(type, items)) <= {int}  # as a long prompt's tokens are: a draft model is asked at every step
        return items if plain else tuple(_int(name, item) for item in items)
    for item in items:
        if not isinstance(item, kind):
            raise InvalidRequestError(name, f"has {shown(item)}; every item must be of type {kind.__name__}")
    return items


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make: a prompt and how to continue it. A prompt with n > 1 becomes n requests.

    `prompt_token_ids` is copied into a tuple. Whether ids, context and memory fit is checked by the scheduler, which
    knows the model.
    """

    id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int  # resolved: sampling.seed, or drawn by the engine
    index: int = 0  # which of the prompt's n completions
    constraint: Constraint | None = None  # what `sampling.structure` asks for, ready for use
    arrival_s: float = field(default_factory=time.time)  # seconds since the epoch

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", _items("prompt_token_ids", self.prompt_token_ids, int))
