"""Plans in, tokens out, through transformers' models: one flat forward pass per step, for chunks and decoding rows.

On a GPU a step is queued and `submit` returns; tokens come to the host through pinned memory, and `collect` waits for
them alone. On a CPU `submit` computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from cortexstream.backend import BackendInfo, BackendOptions, LayerState, ModelInfo, WarmupReport
from cortexstream.backends.common.checkpoint import eos_token_ids, read_config
from cortexstream.backends.common.kv_format import kv_quantization
from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.backends.cuda.attention import Span, StepAttention
from cortexstream.backends.cuda.models import DTYPES, LoadedModel, forward, load
from cortexstream.backends.cuda.sample import bias, sample
from cortexstream.backends.cuda.store import store_maker
from cortexstream.errors import BackendUnavailableError, EngineError, InvalidRequestError, ModelLoadError
from cortexstream.plan import PENDING, KVRows, PlanRow, RowResult, SampleSpec, StepPlan, StepResult

BLOCK_TOKENS = 64  # a page is one tile of the attention kernels
MAX_IN_FLIGHT = 2
BROKEN = "no token can be drawn: the logits hold NaN or +inf, or every token is banned; the model may be broken"


F = TypeVar("F", bound=Callable[..., Any])


def inference(method: F) -> F:
    """`torch.inference_mode`, with types."""
    wrapped: F = torch.inference_mode()(method)
    return wrapped


class Drawn(NamedTuple):
    """What the sampling rows of a step drew, on the device, in the order of `slots`."""

    slots: dict[int, int]  # slot -> index
    seq_ids: tuple[int, ...]
    tokens: torch.Tensor  # int64 [rows]
    broken: torch.Tensor  # bool [rows]: nothing could be drawn


class CudaTicket(NamedTuple):
    """A step in flight. `host` holds its tokens and flags once `done` has happened."""

    step: int
    rows: tuple[PlanRow, ...]  # those that draw
    host: torch.Tensor | None  # int64 [2, rows], pinned on a GPU
    logprobs: torch.Tensor | None
    done: Any  # torch.cuda.Event, None on a CPU
    swap_s: float


class CudaBackend:
    """See the module's docstring. Option in `extra`: device ("cuda", "cuda:1", "cpu"; by default a GPU if there is
    one)."""

    def __init__(self, options: BackendOptions) -> None:
        if options.model is None:
            raise ModelLoadError("model: the cuda backend needs a folder")
        if options.kv_layout == "run":
            raise InvalidRequestError("kv_layout", "is 'run'; the cuda backend's attention reads block tables: 'paged'")
        if options.dtype not in ("auto", *DTYPES):
            raise InvalidRequestError("dtype", f"is {options.dtype!r}; must be auto, {', '.join(DTYPES)}")
        unknown = sorted(set(options.extra) - {"device"})
        if unknown:
            raise InvalidRequestError("backend_options", f"has {unknown[0]!r}; the cuda backend knows device")
        self._device = _device(options.extra.get("device"))
        folder = Path(options.model)
        loaded = load(folder, options.dtype, self._device)
        self._loaded: LoadedModel | None = loaded
        weights = sum(p.nbytes for p in {p.data_ptr(): p for p in loaded.model.parameters()}.values())
        self.model = ModelInfo(
            architecture=loaded.model.config.model_type, vocab_size=loaded.vocab_size,
            max_context_tokens=loaded.max_context_tokens, eos_token_ids=eos_token_ids(folder, read_config(folder)),
            layers=loaded.layers, kv_item_bytes=loaded.dtype.itemsize, weight_bytes=weights,
            kv_quantization=kv_quantization(options.kv_dtype, loaded.layers),
        )  # fmt: skip
        gpu = self._device.type == "cuda"
        self.info = BackendInfo(
            name="cuda", device=torch.cuda.get_device_name(self._device) if gpu else "CPU (torch)", kv_layout="paged",
            block_tokens=options.block_tokens or BLOCK_TOKENS, memory_bytes=_free_bytes(self._device),
            dtype=str(loaded.dtype).removeprefix("torch."), memory_share=0.8 if gpu else 0.25,
        )  # fmt: skip
        self._memory: KVMemory | None = None
        self._in_flight: deque[CudaTicket] = deque()
        self._last_step = -1
        self._drawn: Drawn | None = None

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        """Make the zero-filled KV pools; returns their bytes. Raises OutOfMemoryBudgetError, EngineError if misused."""
        if self._memory is not None:
            raise EngineError(f"the KV memory was allocated already, with {self._memory.num_blocks} blocks")
        loaded = self._model()
        self._memory = KVMemory(
            store_maker(loaded.dtype, self._device), self.model, (num_blocks, *ring_blocks), self.info.block_tokens,
            _free_bytes(self._device), self.info.device,
        )  # fmt: skip
        return self._memory.nbytes

    @inference
    def submit(self, plan: StepPlan) -> CudaTicket:
        """Run or queue the plan. Raises EngineError, before anything is written, for one that breaks the contract."""
        memory = self._ready()
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise EngineError(f"step {plan.step} was submitted while {MAX_IN_FLIGHT} steps wait to be collected")
        if plan.step <= self._last_step:
            raise EngineError(f"step {plan.step} was submitted after step {self._last_step}; steps must rise")
        self._check(plan, memory)
        swap_s = memory.execute(plan.moves)
        ticket = self._run(plan.step, plan.rows, memory)._replace(swap_s=swap_s)
        self._last_step = plan.step
        self._in_flight.append(ticket)
        return ticket

    def collect(self, ticket: CudaTicket) -> StepResult:
        """The submitted step's result. Raises EngineError unless `ticket` is the oldest that was not collected."""
        self._model()
        if not self._in_flight or self._in_flight[0] is not ticket:
            oldest = f"step {self._in_flight[0].step} is next" if self._in_flight else "no step waits to be collected"
            raise EngineError(f"step {ticket.step} cannot be collected now: {oldest}")
        self._in_flight.popleft()
        if ticket.done is not None:
            ticket.done.synchronize()
        if ticket.host is None:
            return StepResult(ticket.step, (), ticket.swap_s)
        tokens, broken = ticket.host.tolist()
        rows = []
        for place, row in enumerate(ticket.rows):
            if broken[place]:
                rows.append(RowResult(row.seq_id, 0, error=BROKEN))
            else:
                rows.append(_result(row, tokens[place], ticket.logprobs, place))
        return StepResult(ticket.step, tuple(rows), ticket.swap_s)

    def reset(self) -> None:
        self._in_flight.clear()
        self._drawn = None
        if self._memory is not None:
            self._memory.forget()

    @inference
    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        """Copies. Raises EngineError when the blocks do not hold so many tokens."""
        return self._ready().read(kv, num_tokens)

    @inference
    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        """Raises EngineError, before anything is written, for arrays or blocks that do not fit."""
        self._ready().write(kv, num_tokens, layers)

    @inference
    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """Run a prefill of `prompt_tokens` and one decode step of `batch` rows; overwrites blocks from 0 on."""
        memory = self._ready()
        kv, capacity = memory.whole()
        if not 1 <= prompt_tokens < capacity or batch < 1:
            raise EngineError(
                f"a warm-up of {prompt_tokens} prompt tokens and {batch} rows needs 1 to {capacity - 1} prompt tokens "
                f"and at least 1 row"
            )
        if self._in_flight:
            raise EngineError(f"warm-up needs an idle backend; step {self._in_flight[0].step} waits to be collected")
        spec, steps = SampleSpec(), []
        prefill = PlanRow(0, 0, (0,) * prompt_tokens, 0, kv, spec)
        decode = [PlanRow(slot, slot, (0,), prompt_tokens, kv, spec) for slot in range(batch)]
        for name, rows in ((f"prefill of {prompt_tokens} tokens", [prefill]), (f"decode of {batch} rows", decode)):
            began_s = perf_counter()
            ticket = self._run(0, tuple(rows), memory)
            if ticket.done is not None:
                ticket.done.synchronize()
            steps.append((name, perf_counter() - began_s))
        self._drawn = None
        return WarmupReport(tuple(steps))

    def memory_addresses(self) -> list[int]:
        return []  # torch writes in place, always

    def close(self) -> None:
        """Drop weights and KV. Idempotent."""
        self._loaded = self._memory = self._drawn = None
        self._in_flight.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, plan: StepPlan, memory: KVMemory) -> None:
        slots = [row.slot for row in plan.rows]
        if len(set(slots)) != len(slots):
            raise EngineError(f"step {plan.step} has two rows for one slot: {sorted(slots)}")
        for row in plan.rows:
            known = row.tokens[:-1] if row.tokens[-1:] == (PENDING,) else row.tokens
            outside = [token for token in known if not 0 <= token < self.model.vocab_size]
            if not row.tokens or outside:
                raise EngineError(
                    f"row {row.seq_id} feeds {outside or 'no'} tokens; ids are 0 to {self.model.vocab_size - 1}"
                )
            if row.sample is not None and PENDING in row.sample.output_tokens[:-1]:
                raise EngineError(f"row {row.seq_id} has a pending output token before the last one")
            self._pending(row)
            memory.check_row(row.kv, row.start, len(row.tokens))
        memory.check_ops(plan.moves)

    def _pending(self, row: PlanRow) -> int | None:
        """Where among the last draws the token is that PENDING stands for in this row; None if it has none."""
        if row.tokens[-1] != PENDING and (row.sample is None or PENDING not in row.sample.output_tokens):
            return None
        place = None if self._drawn is None else self._drawn.slots.get(row.slot)
        if self._drawn is None or place is None or self._drawn.seq_ids[place] != row.seq_id:
            raise EngineError(
                f"row {row.seq_id} has a pending token, but its slot {row.slot} drew none in the step before"
            )
        return place

    def _run(self, step: int, rows: tuple[PlanRow, ...], memory: KVMemory) -> CudaTicket:
        """The forward pass and the draws of checked rows."""
        sampling = tuple(row for row in rows if row.sample is not None)
        if not rows:
            self._drawn = None
            return CudaTicket(step, (), None, None, None, 0.0)
        loaded, device = self._model(), self._device
        places = [self._pending(row) for row in rows]
        spans, ends, end = [], [], 0
        for row in rows:
            spans.append(Span(row.kv, row.start, slice(end, end + len(row.tokens))))
            end += len(row.tokens)
            if row.sample is not None:
                ends.append(end - 1)
        tokens = torch.tensor([max(token, 0) for row in rows for token in row.tokens], device=device)
        carried = torch.zeros(len(rows), dtype=torch.bool, device=device)  # its last draw was none: it cannot go on
        if self._drawn is not None and any(place is not None for place in places):
            tokens, carried = self._fill(tokens, rows, places, spans, self._drawn)
        positions = torch.from_numpy(np.concatenate([row.start + np.arange(len(row.tokens)) for row in rows]))
        loaded.seat.attend = StepAttention(memory, spans)
        try:
            wanted = torch.tensor(ends or [end - 1], device=device)
            logits = forward(loaded.model, tokens, positions.to(device), wanted).float()
        finally:
            loaded.seat.attend = None
        if not sampling:
            self._drawn = None
            return CudaTicket(step, (), None, None, self._event(), 0.0)
        drawing = [i for i, row in enumerate(rows) if row.sample is not None]
        return self._draw(step, sampling, [places[i] for i in drawing], logits, carried[drawing])

    def _fill(
        self, tokens: torch.Tensor, rows: Sequence[PlanRow], places: list[int | None], spans: list[Span], drawn: Drawn
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put drawn tokens where a row feeds PENDING; also which rows cannot go on."""
        pairs = [
            (span.where.stop - 1, place)
            for row, place, span in zip(rows, places, spans, strict=True)
            if place is not None and row.tokens[-1] == PENDING
        ]
        if pairs:
            at, source = (torch.tensor(side, device=tokens.device) for side in zip(*pairs, strict=True))
            tokens[at] = drawn.tokens[source]
        index = torch.tensor([0 if place is None else place for place in places], device=tokens.device)
        waits = torch.tensor([place is not None for place in places], device=tokens.device)
        return tokens, drawn.broken[index] & waits

    def _draw(
        self,
        step: int,
        rows: tuple[PlanRow, ...],
        places: list[int | None],
        logits: torch.Tensor,
        carried: torch.Tensor,
    ) -> CudaTicket:
        specs = [row.sample for row in rows if row.sample is not None]
        last = self._drawn
        pending = [None if p is None or last is None else last.tokens[p] for p in places]
        usable = torch.isfinite(bias(logits, specs).amax(-1))  # a NaN is the maximum of its row
        positions = [row.start + len(row.tokens) for row in rows]
        tokens = sample(torch.where(usable[:, None], logits, 0.0), specs, positions, pending)
        broken = ~usable | carried
        self._drawn = Drawn({row.slot: i for i, row in enumerate(rows)}, tuple(r.seq_id for r in rows), tokens, broken)
        logprobs = None
        if any(spec.logprobs is not None for spec in specs):
            logprobs = torch.log_softmax(logits, dim=-1)
        host = torch.stack((tokens, broken.long()))
        if self._device.type == "cuda":
            pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
            host = pinned.copy_(host, non_blocking=True)
        return CudaTicket(step, rows, host, logprobs, self._event(), 0.0)

    def _event(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineError("the backend is closed")
        return self._loaded

    def _ready(self) -> KVMemory:
        self._model()
        if self._memory is None:
            raise EngineError("allocate_kv must be called before the first plan")
        return self._memory


def _result(row: PlanRow, token: int, logprobs: torch.Tensor | None, place: int) -> RowResult:
    assert row.sample is not None
    count = row.sample.logprobs
    if count is None or logprobs is None:
        return RowResult(row.seq_id, token)
    values = logprobs[place]
    top: tuple[tuple[int, float], ...] = ()
    if count:
        # A few more than asked for, so that ties at the border go to the lowest ids as the definition says.
        found = values.topk(min(2 * count + 1, len(values)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])
    return RowResult(row.seq_id, token, float(values[token]), top)


def _device(asked: Any) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise InvalidRequestError("backend_options", f"has device {asked!r}; it must be cuda, cuda:N or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device: this PyTorch sees no NVIDIA GPU; check nvidia-smi and the installed torch, or use device 'cpu'"
        )
    return device


def _free_bytes(device: torch.device) -> int:
    """Memory left after the weights: of the GPU, or of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory_bytes()
