"""Plans in, tokens out, through transformers' models: one flat forward pass per step, for chunks and decoding rows.

On a GPU a step is queued and `submit` returns; tokens come to the host through pinned memory, and `collect` waits for
them alone. On a CPU `submit` computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch

from cortexstream.backend import BackendInfo, BackendOptions, LayerState, ModelInfo, WarmupReport
from cortexstream.backends.common.checkpoint import eos_token_ids, read_config
from cortexstream.backends.common.kv_format import kv_quantization
from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.backends.common.rows import misformed
from cortexstream.backends.cuda.invariant import make_invariant
from cortexstream.backends.cuda.kernels import Kernels, choose, fitting
from cortexstream.backends.cuda.models import DTYPES, LoadedModel, load
from cortexstream.backends.cuda.results import Draw, Draws, Scores, draws_of, on_the_way, results_of, scores_of
from cortexstream.backends.cuda.runner import Runner
from cortexstream.backends.cuda.step import LastDraws, upload
from cortexstream.backends.cuda.store import store_maker
from cortexstream.errors import BackendUnavailableError, EngineError, InvalidRequestError, ModelLoadError
from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan, StepResult

BLOCK_TOKENS = 64  # a page is one tile of the attention kernels
MAX_IN_FLIGHT = 2

F = TypeVar("F", bound=Callable[..., Any])


def inference(method: F) -> F:
    """`torch.inference_mode`, with types."""
    wrapped: F = torch.inference_mode()(method)
    return wrapped


class CudaTicket(NamedTuple):
    """A step in flight. `found` and `scores` are good once `done` has happened."""

    step: int
    draws: tuple[Draw, ...]
    found: Draws | None
    scores: tuple[Scores, ...]
    done: Any  # torch.cuda.Event, None on a CPU
    swap_s: float = 0.0


class CudaBackend:
    """See the module's docstring. Options in `extra`: device ("cuda", "cuda:1", "cpu"; by default a GPU if there is
    one), kernels ("triton" or "torch"; by default Triton's on a GPU) and cuda_graphs (True or False; by default where
    Triton's kernels run on a GPU)."""

    def __init__(self, options: BackendOptions) -> None:
        if options.model is None:
            raise ModelLoadError("model: the cuda backend needs a folder")
        if options.kv_layout == "run":
            raise InvalidRequestError("kv_layout", "is 'run'; the cuda backend's attention reads block tables: 'paged'")
        if options.dtype not in ("auto", *DTYPES):
            raise InvalidRequestError("dtype", f"is {options.dtype!r}; must be auto, {', '.join(DTYPES)}")
        unknown = sorted(set(options.extra) - {"device", "kernels", "cuda_graphs"})
        if unknown:
            raise InvalidRequestError(
                "backend_options", f"has {unknown[0]!r}; the cuda backend knows device, kernels and cuda_graphs"
            )
        self._device = _device(options.extra.get("device"))
        block_tokens = options.block_tokens or BLOCK_TOKENS
        self._kernels: Kernels = choose(options.extra, self._device, block_tokens)
        folder = Path(options.model)
        loaded = load(folder, options.dtype, self._device, self._kernels.ops)
        self._kernels = fitting(self._kernels, loaded.layers)
        promise = make_invariant(
            loaded.model, loaded.seat, loaded.layers, options.batch_invariant, self._kernels.triton, self._device
        )
        self._loaded: LoadedModel | None = loaded._replace(attention=promise.attention)
        tensors = (*loaded.model.parameters(), *loaded.model.buffers())
        weights = sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())
        self.model = ModelInfo(
            architecture=loaded.model.config.model_type, vocab_size=loaded.vocab_size,
            max_context_tokens=loaded.max_context_tokens, eos_token_ids=eos_token_ids(folder, read_config(folder)),
            layers=loaded.layers, kv_item_bytes=loaded.dtype.itemsize, weight_bytes=weights,
            kv_quantization=kv_quantization(options.kv_dtype, loaded.layers),
        )  # fmt: skip
        gpu = self._device.type == "cuda"
        self.info = BackendInfo(
            name="cuda", device=torch.cuda.get_device_name(self._device) if gpu else "CPU (torch)", kv_layout="paged",
            block_tokens=block_tokens, memory_bytes=_free_bytes(self._device),
            dtype=str(loaded.dtype).removeprefix("torch."), memory_share=0.8 if gpu else 0.25,
            notes=(*self._kernels.notes, *loaded.notes), batch_invariant=promise.holds, invariance=promise.sentence,
        )  # fmt: skip
        self._memory: KVMemory | None = None
        self._in_flight: deque[CudaTicket] = deque()
        self._last_step = -1
        self._seen: dict[int, int] = {}  # slot -> what it drew in the step collected last
        self._last = LastDraws(options.max_num_seqs, self._device)
        self._run_rows: Runner | None = None

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        """Make the zero-filled KV pools; returns their bytes. Raises OutOfMemoryBudgetError, EngineError if misused."""
        if self._memory is not None:
            raise EngineError(f"the KV memory was allocated already, with {self._memory.num_blocks} blocks")
        loaded = self._model()
        self._memory = KVMemory(
            store_maker(loaded.dtype, self._device), self.model, (num_blocks, *ring_blocks), self.info.block_tokens,
            _free_bytes(self._device), self.info.device,
        )  # fmt: skip
        self._run_rows = Runner(loaded, self._memory, self._last, self._kernels, self._device)
        self._capture(1)  # now, so that a model that cannot be captured is known from the start
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
        results = () if ticket.found is None else results_of(ticket.draws, ticket.found, self._seen)
        self._seen = {draw.slot: result.token for draw, result in zip(ticket.draws, results, strict=True)}
        return StepResult(ticket.step, results, ticket.swap_s, tuple(scores.result() for scores in ticket.scores))

    def reset(self) -> None:
        self._in_flight.clear()
        self._last.forget()
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
        if batch > len(self._last):
            raise EngineError(f"a warm-up of {batch} rows needs as many slots; there are {len(self._last)}")
        kv = kv._replace(blocks=kv.blocks[: prompt_tokens // self.info.block_tokens + 1])
        if self._in_flight:
            raise EngineError(f"warm-up needs an idle backend; step {self._in_flight[0].step} waits to be collected")
        spec, steps = SampleSpec(), []
        if self._kernels.graphs:
            began_s = perf_counter()
            self._capture(batch)
            steps.append((f"CUDA graphs for up to {batch} rows", perf_counter() - began_s))
        prefill = PlanRow(0, 0, (0,) * prompt_tokens, 0, kv, spec)
        decode = [PlanRow(slot, slot, (0,), prompt_tokens, kv, spec) for slot in range(batch)]
        for name, rows in ((f"prefill of {prompt_tokens} tokens", [prefill]), (f"decode of {batch} rows", decode)):
            began_s = perf_counter()
            ticket = self._run(0, tuple(rows), memory)
            if ticket.done is not None:
                ticket.done.synchronize()
            steps.append((name, perf_counter() - began_s))
        self._last.forget()
        return WarmupReport(tuple(steps))

    def memory_addresses(self) -> list[int]:
        return []  # torch writes in place, always

    def close(self) -> None:
        """Drop weights and KV. Idempotent."""
        self._loaded = self._memory = self._run_rows = None
        self._in_flight.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, plan: StepPlan, memory: KVMemory) -> None:
        slots = sorted(row.slot for row in plan.rows)
        if len(set(slots)) != len(slots):
            raise EngineError(f"step {plan.step} has two rows for one slot: {slots}")
        if slots and not 0 <= slots[0] <= slots[-1] < len(self._last):
            raise EngineError(f"step {plan.step} has slots {slots}; there are {len(self._last)}")
        for row in plan.rows:
            known = row.tokens[:-1] if row.tokens[-1:] == (PENDING,) else row.tokens
            outside = [token for token in known if not 0 <= token < self.model.vocab_size]
            if not row.tokens or outside:
                raise EngineError(
                    f"row {row.seq_id} feeds {outside or 'no'} tokens; ids are 0 to {self.model.vocab_size - 1}"
                )
            problem = misformed(row, self.model.vocab_size)
            if problem is not None:
                raise EngineError(f"row {row.seq_id} {problem}")
            if row.sample is not None and PENDING in row.sample.output_tokens[:-1]:
                raise EngineError(f"row {row.seq_id} has a pending output token before the last one")
            self._waits(row)
            memory.check_row(row.kv, row.start, len(row.tokens))
        memory.check_ops(plan.moves)

    def _waits(self, row: PlanRow) -> bool:
        """Does a row go on from a draw that the host has not seen? Raises EngineError if there is none."""
        if row.tokens[-1] != PENDING and (row.sample is None or PENDING not in row.sample.output_tokens):
            return False
        if not self._last.has(row.slot, row.seq_id):
            raise EngineError(
                f"row {row.seq_id} has a pending token, but its slot {row.slot} drew none in the step before"
            )
        return True

    def _run(self, step: int, rows: tuple[PlanRow, ...], memory: KVMemory) -> CudaTicket:
        """The forward pass and the draws of checked rows."""
        waits = {row.slot for row in rows if self._waits(row)}
        if not rows:
            self._last.forget()
            return CudaTicket(step, (), None, (), None)
        logits = self._runner().logits(rows)
        draws = draws_of(rows)
        scores = scores_of(rows, logits[len(draws) :])
        if not draws:
            self._last.forget()
            return CudaTicket(step, (), None, scores, self._event())
        found = self._draw(rows, draws, waits, logits[: len(draws)])
        return CudaTicket(step, draws, found, scores, self._event())

    def _draw(self, rows: tuple[PlanRow, ...], draws: tuple[Draw, ...], waits: set[int], logits: torch.Tensor) -> Draws:
        """`logits` float32 [draws, vocabulary]; `waits` has the slots that go on from an unseen draw."""
        specs = [draw.spec for draw in draws]
        single = [row for row in rows if row.sample is not None and not row.drafts]  # whose draw a row may go on from
        kept = [place for place, draw in enumerate(draws) if draw.single]
        slots, waiting, last = upload(
            self._device, [draw.slot for draw in draws], [draw.slot in waits for draw in draws], kept
        )
        before = self._last.tokens[slots]
        carried = self._last.broken[slots] & waiting.bool()  # its last draw was none: it cannot go on
        pending = [before[place] if draw.slot in waits else None for place, draw in enumerate(draws)]
        tokens, broken = self._kernels.draw(logits, specs, [draw.position for draw in draws], pending)
        broken = broken | carried
        self._last.record(single, slots[last], tokens[last], broken[last])
        return on_the_way(logits, specs, tokens, broken)

    @inference
    def _capture(self, batch: int) -> None:
        self._runner().capture(batch)
        new = [note for note in self._runner().notes if note not in self.info.notes]
        if new:
            self.info = replace(self.info, notes=(*self.info.notes, *new))

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

    def _runner(self) -> Runner:
        self._ready()
        assert self._run_rows is not None
        return self._run_rows

    def _ready(self) -> KVMemory:
        self._model()
        if self._memory is None:
            raise EngineError("allocate_kv must be called before the first plan")
        return self._memory


def _device(asked: Any) -> torch.device:
    """The device, a GPU with its number. Makes a GPU the current one of this thread, which is the engine's: kernels are
    launched there."""
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise InvalidRequestError("backend_options", f"has device {asked!r}; it must be cuda, cuda:N or cpu")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device: this PyTorch sees no NVIDIA GPU; check nvidia-smi and the installed torch, or use device 'cpu'"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise InvalidRequestError(
            "backend_options", f"has device {asked!r}; this machine has cuda:0 to cuda:{count - 1}"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def _free_bytes(device: torch.device) -> int:
    """Memory left after the weights: of the GPU, or of the host."""
    if device.type != "cuda":
        return host_memory_bytes()
    torch.cuda.empty_cache()  # what torch keeps of freed tensors, such as the weights before a rewrite, is free
    return int(torch.cuda.mem_get_info(device)[0])
