"""The contract between the core and a device: what a backend tells, and the calls it answers.

A backend lives on one thread: it is created, used and closed by the engine's. It never sees a request, a sequence or
the arena; it gets a `StepPlan` and gives back a `StepResult`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cortexstream.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Geometry of one layer's keys and values. `window` is the sliding window in tokens, None for full attention."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the core must know about a loaded model."""

    architecture: str  # `model_type` of config.json
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: frozenset[int]
    layers: tuple[LayerKV, ...]
    kv_item_bytes: int  # bytes of one stored KV number
    weight_bytes: int  # as held in memory

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take, over all layers."""
        return sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers) * self.kv_item_bytes


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What the core must know about a device."""

    name: str  # null, reference, mlx, cuda
    device: str  # in words, for people
    kv_layout: Literal["run", "paged"]  # which placement its attention wants
    block_tokens: int  # tokens of one block
    memory_bytes: int  # device memory free for KV after the weights were loaded
    dtype: str
    memory_share: float = 0.8  # of memory_bytes for KV, unless the caller says otherwise
    notes: tuple[str, ...] = ()  # fallbacks in force, each one sentence; `doctor` prints them


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the engine asks of a backend when it creates it."""

    model: str | None  # a folder; None only for backends that need no files
    dtype: str = "auto"
    max_num_seqs: int = 64  # slots
    block_tokens: int | None = None  # None: the backend's own choice
    kv_layout: Literal["run", "paged"] | None = None  # None: the backend's own choice
    extra: dict[str, Any] = field(default_factory=dict)  # options that only one backend knows


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did: one (name, seconds) per thing compiled or touched."""

    steps: tuple[tuple[str, float], ...]


class Ticket(Protocol):
    """A submitted step; opaque to the core."""

    @property
    def step(self) -> int: ...


class Backend(Protocol):
    """Nine members. `submit` may return before the device is done; `collect` waits.

    At most one further plan is submitted before the previous ticket is collected, and tickets are collected in order.
    Within a step every row writes its KV before any row reads. A token `PENDING` in a plan means what the row with the
    same slot drew in the plan submitted just before.
    """

    @property
    def info(self) -> BackendInfo: ...

    @property
    def model(self) -> ModelInfo: ...

    def allocate_kv(self, num_blocks: int) -> int:
        """Make and touch the KV memory; returns its bytes. Called once, before the first plan.

        Raises OutOfMemoryBudgetError when the device refuses.
        """
        ...

    def submit(self, plan: StepPlan) -> Ticket: ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for a ticket that this backend's `submit` gave out."""
        ...

    def reset(self) -> None:
        """Forget every plan that was submitted and not collected, after a step failed; the KV memory stays."""
        ...

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """Do what the first request would otherwise pay for: compile and run a prefill of `prompt_tokens` and decode
        steps of up to `batch` rows, on blocks 0 .. and with the arena empty."""
        ...

    def memory_addresses(self) -> list[int]:
        """Where each KV array lies, for backends whose library might copy it on a write; empty where nothing can move.
        Called between two plans."""
        ...

    def close(self) -> None:
        """Give the device memory back. Idempotent."""
        ...


class BackendModule(Protocol):
    """What `cortexstream.backends.<name>` exports."""

    @staticmethod
    def available() -> str | None:
        """None if this backend can run here, else one sentence that says what is missing and what to install."""
        ...

    @staticmethod
    def accelerator() -> str | None:
        """The GPU that would be used, in words; None for a CPU. Asked only when `available()` is None."""
        ...

    @staticmethod
    def create(options: BackendOptions) -> Backend:
        """Load the model. Raises ModelLoadError or BackendUnavailableError with one sentence."""
        ...
