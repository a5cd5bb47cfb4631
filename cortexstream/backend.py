"""The contract between the core and a device: what a backend tells, and the calls it answers.

A backend lives on one thread: it is created, used and closed by the engine's. It never sees a request, a sequence or
the arena; it gets a `StepPlan` and gives back a `StepResult`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from cortexstream.plan import KVRows, StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class KVQuantization(NamedTuple):
    """Keys and values as `bits`-wide integers with a scale and a bias per `group` of neighbouring numbers of a head
    (`kernels.reference.kv_quantize` is the definition)."""

    bits: int
    group: int


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
    kv_item_bytes: int  # bytes of one stored KV number; with kv_quantization, of one scale and of one bias
    weight_bytes: int  # as held in memory
    kv_quantization: KVQuantization | None = None

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows that occur, ascending. Each has a pool of its own, pool 1 + its index, whose sequences
        keep their last tokens in a ring; pool 0 belongs to the layers with full attention."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    def pool_of(self, layer: int) -> int:
        """The pool that holds a layer's keys and values."""
        window = self.layers[layer].window
        return 0 if window is None else 1 + self.windows.index(window)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take, over all layers."""
        return sum(self.pool_bytes_per_token)

    @property
    def pool_bytes_per_token(self) -> tuple[int, ...]:
        """The same for each pool apart: the full-attention layers, then one number per window."""
        sizes = [0] * (1 + len(self.windows))
        for number, layer in enumerate(self.layers):
            sizes[self.pool_of(number)] += layer.num_kv_heads * (
                self._vector_bytes(layer.key_dim) + self._vector_bytes(layer.value_dim)
            )
        return tuple(sizes)

    def _vector_bytes(self, dim: int) -> int:
        if self.kv_quantization is None:
            return dim * self.kv_item_bytes
        bits, group = self.kv_quantization
        return dim * bits // 8 + 2 * (dim // group) * self.kv_item_bytes


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
    batch_invariant: bool = False  # are tokens and logprobs the same bits whoever shares a step, and however it is cut?
    invariance: str = ""  # what of that holds here and why, or why not; one sentence


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the engine asks of a backend when it creates it."""

    model: str | None  # a folder; None only for backends that need no files
    dtype: str = "auto"
    max_num_seqs: int = 64  # slots
    block_tokens: int | None = None  # None: the backend's own choice
    kv_layout: Literal["run", "paged"] | None = None  # None: the backend's own choice
    kv_dtype: Literal["auto", "int8", "int4"] = "auto"  # auto: like dtype
    batch_invariant: bool | None = None  # None: where it costs little; what came of it is in `BackendInfo`
    extra: dict[str, Any] = field(default_factory=dict)  # options that only one backend knows


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did: one (name, seconds) per thing compiled or touched."""

    steps: tuple[tuple[str, float], ...]


class PackedKV(NamedTuple):
    """Keys or values as pools with a `KVQuantization` store them: `kernels.reference.kv_quantize` is the definition."""

    packed: npt.NDArray[np.uint32]  # [tokens, heads, dim * bits / 32]
    scales: npt.NDArray[np.float32]  # [tokens, heads, dim / group]
    biases: npt.NDArray[np.float32]


KVArray: TypeAlias = "npt.NDArray[np.float32] | PackedKV"


class LayerState(NamedTuple):
    """One layer's keys [tokens, heads, key_dim] and values [tokens, heads, value_dim], float32 or as they are packed,
    in order of position: of all tokens, or of the last `window` ones."""

    keys: KVArray
    values: KVArray


def kv_misfit(
    array: KVArray, num_tokens: int, num_heads: int, dim: int, quantization: KVQuantization | None
) -> str | None:
    """What is wrong with the dtypes and shapes of one layer's keys or values, as the end of a sentence; None if they
    are what pools of this format store."""
    wanted: tuple[tuple[str, tuple[int, ...]], ...] = (("float32", (num_tokens, num_heads, dim)),)
    if quantization is not None:
        groups = ("float32", (num_tokens, num_heads, dim // quantization.group))
        wanted = (("uint32", (num_tokens, num_heads, dim * quantization.bits // 32)), groups, groups)
    parts = array if isinstance(array, PackedKV) else (array,)
    found = tuple((part.dtype.name, part.shape) for part in parts)
    if found == wanted:
        return None

    def words(arrays: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
        return " and ".join(f"{dtype} {shape}" for dtype, shape in arrays)

    return f"{words(found)}; {words(wanted)} is needed"


class Ticket(Protocol):
    """A submitted step; opaque to the core."""

    @property
    def step(self) -> int: ...


class Backend(Protocol):
    """Eleven members. `submit` may return before the device is done; `collect` waits.

    At most one further plan is submitted before the previous ticket is collected, and tickets are collected in order.
    Within a step every row writes its KV before any row reads. A token `PENDING` in a plan means what the row with the
    same slot drew in the plan submitted just before.
    """

    @property
    def info(self) -> BackendInfo: ...

    @property
    def model(self) -> ModelInfo: ...

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        """Make and touch the KV memory; returns its bytes. Called once, before the first plan.

        `num_blocks` are those of the full-attention layers, `ring_blocks` one number per window of the model. Raises
        OutOfMemoryBudgetError when the device refuses.
        """
        ...

    def submit(self, plan: StepPlan) -> Ticket: ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for a ticket that this backend's `submit` gave out."""
        ...

    def reset(self) -> None:
        """Forget every plan that was submitted and not collected, and every swapped copy, after a step failed; the KV
        memory stays, its contents mean nothing."""
        ...

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        """A sequence's keys and values on the host, one entry per layer, the rotary embedding included in the keys.
        Called between two plans; waits for the device."""
        ...

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        """The inverse of `read_kv`, bit for bit, on blocks that hold nothing of value. Raises EngineError, before
        anything is written, for arrays of another format."""
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
