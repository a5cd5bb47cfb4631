"""The synchronous face."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cortexstream import platform, prefix_file
from cortexstream.backend import BackendInfo, BackendOptions, ModelInfo, WarmupReport
from cortexstream.config import EngineConfig
from cortexstream.constraint import Constraint
from cortexstream.engine import EngineStats, EngineThread
from cortexstream.engine.private import export_prefix, import_prefix
from cortexstream.errors import InvalidRequestError, shown
from cortexstream.files import check_path, write_whole
from cortexstream.generation import Generation, Listener
from cortexstream.kv import picture
from cortexstream.limits import Limits
from cortexstream.models import resolve_model
from cortexstream.outputs import RequestOutput, StreamChunk
from cortexstream.progress import progress, wanted
from cortexstream.prompts import Prompt, Prompts, as_list, tokenize
from cortexstream.request import SamplingParams
from cortexstream.structured import GrammarSource
from cortexstream.text.chat import render_chat
from cortexstream.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cortexstream.text.grammar import Grammars

POLL_S = 0.1  # how often a wait looks up, so that an interrupt is noticed


class _Checked(NamedTuple):
    """A prompt and its parameters that can be served."""

    text: str | None
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    constraint: Constraint | None


class LLM:
    """A loaded model that answers prompts.

        llm = LLM()                                   # the embedded model; or a folder, or a Hugging Face id
        for out in llm.generate(["12+30=", "copy: tide"], SamplingParams(temperature=0)):
            print(out.outputs[0].text)

    `backend` is auto, mlx, cuda or reference; further options are those of `EngineConfig` (unknown names are a
    TypeError). `skip_tokenizer_init=True` serves token ids from a folder without tokenizer files: no text, no stop
    strings. Thread-safe. Also a context manager; `close`, or dropping the last reference,
    frees the device memory.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        backend: str = "auto",
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        use_tqdm: bool | None = None,
        **options: Any,
    ) -> None:
        extra = options.pop("backend_options", None) or {}
        if not isinstance(extra, dict):
            raise InvalidRequestError("backend_options", f"is {shown(extra)}; it must be a dict of names and values")
        self.config = EngineConfig.from_kwargs(
            {"model": None if model is None else str(model), "backend": backend, **options}
        )
        self.backend_name, self.probes = platform.choose(self.config.backend)
        folder = None if self.backend_name == "null" else resolve_model(model, self.config.revision)
        self.folder = folder
        self.tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init and folder is not None:
            self.tokenizer = Tokenizer.from_folder(folder if tokenizer is None else resolve_model(tokenizer))
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        draft = self._draft_folder()
        created = BackendOptions(
            model=None if folder is None else str(folder), dtype=self.config.dtype,
            max_num_seqs=self.config.max_num_seqs, block_tokens=self.config.block_tokens,
            kv_layout=self.config.kv_layout, kv_dtype=self.config.kv_dtype,
            batch_invariant=self.config.batch_invariant, extra=extra,
        )  # fmt: skip
        with progress(f"loading {folder.name if folder else 'null'} on {self.backend_name}", None, wanted(use_tqdm)):
            name = self.backend_name  # the thread must not keep this object alive
            self._engine = EngineThread(
                lambda: platform.load(name, created), self.config,
                None if draft is None else lambda: platform.load(name, replace(created, model=draft)),
            )  # fmt: skip
        weakref.finalize(self, self._engine.close)

    @property
    def info(self) -> BackendInfo:
        """The device and its fallbacks."""
        return self._engine.info

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    @property
    def limits(self) -> Limits:
        """The longest sequence and what sets it, the vocabulary, the slots, and the tokens of one step."""
        return self._engine.limits

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks in force, each one sentence."""
        return self._engine.notes

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV memory, allocated once at the start."""
        return self._engine.kv_bytes

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, as one batch; results in the order of the prompts.

        `sampling_params` is one for all or one per prompt; the default is SamplingParams(). Every prompt is checked
        before any of them starts: bad input raises InvalidRequestError and leaves nothing behind. `use_tqdm` (vLLM's
        name) shows progress; None shows it on a terminal.
        """
        generations = self._submit_all(as_list(prompts), sampling_params)
        try:
            with progress("generating", len(generations), wanted(use_tqdm)) as update:
                for finished, generation in enumerate(generations, 1):
                    self._wait(generation)
                    update(finished)
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return [generation.output() for generation in generations]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        A conversation is a list of {"role": ..., "content": ...}; `template` goes to `render_chat`.
        """
        if not messages:
            raise InvalidRequestError("messages", "is empty; a conversation needs at least one message")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [{"prompt_token_ids": self.encode_chat(m, **template)} for m in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        listener: Listener | None = None,
    ) -> Generation:
        """Start one prompt and return at once; see `Generation` for waiting, reading and cancelling.

        `request_id` is a label for the outputs; nothing keeps two from being the same.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        generation = self._generation(self._checked(prompt, params), request_id, listener)
        self._engine.add(generation.sinks())
        return generation

    def prepare(self, sampling_params: SamplingParams) -> None:
        """Compile what these parameters ask of the output's form, if they do, so that later calls find it ready.

        Raises InvalidRequestError if it cannot be met, or is too large.
        """
        if not isinstance(sampling_params, SamplingParams):
            name = type(sampling_params).__name__
            raise InvalidRequestError("sampling_params", f"is {name}; must be SamplingParams")
        if sampling_params.structure is not None:
            self._constraint(sampling_params.structure)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """The completion of one prompt, piece by piece; leaving the loop early cancels it."""
        self._engine.check_caller("stream()")
        return iter(self.submit(prompt, sampling_params))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> str:
        """A conversation as the text that the model was trained on, ready for an answer."""
        return render_chat(self._need_tokenizer("chat"), messages, **template)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """`render_chat` as token ids; the template writes the special tokens, so none are added."""
        return self._need_tokenizer("chat").encode(self.render_chat(messages, **template), add_special_tokens=False)

    def warmup(self, prompt_tokens: int | None = None, batch: int | None = None) -> WarmupReport:
        """Pay now for what the first request would pay: compilation, first touches. Needs an idle engine."""
        rows = self.config.max_num_seqs if batch is None else batch
        longest = max(1, self.limits.max_tokens - 3)  # with room for a few steps
        prompt_tokens = min(64, longest) if prompt_tokens is None else prompt_tokens
        for field, value, limit in (
            ("prompt_tokens", prompt_tokens, longest),
            ("batch", rows, self.config.max_num_seqs),
        ):
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise InvalidRequestError(field, f"is {value!r}; must be a whole number, 1 to {limit}")

        return self._engine.call(lambda core: core.warmup(prompt_tokens, rows))

    def save_prefix(self, prompt: Prompt, path: str | Path) -> int:
        """Compute a prompt's keys and values and write them to a safetensors file (`cortexstream.prefix_file` says what
        is in it); returns the number of tokens. The file serves every backend that loads the same checkpoint with the
        same dtype and kv_dtype."""
        place = check_path("path", path)
        _, tokens = tokenize(prompt, self.tokenizer)
        layers = self._engine.call(lambda core: export_prefix(core, tokens))
        prefix_file.save(place, self._origin(), prefix_file.Prefix(tokens, layers))
        return len(tokens)

    def load_prefix(self, path: str | Path) -> int:
        """Read a file of `save_prefix`: prompts that begin with its tokens need not compute them, as long as nobody
        else needs the memory. Returns how many tokens will be found. Raises ModelLoadError for a file that is damaged,
        another checkpoint's, or of other numbers."""
        prefix = prefix_file.load(path, self._origin())
        return self._engine.call(lambda core: import_prefix(core, prefix.tokens, prefix.layers))

    def _draft_folder(self) -> str | None:
        """Of the model that guesses ahead, if the options name one."""
        asked = self.config.speculative
        return None if asked is None or asked.model is None else str(resolve_model(asked.model))

    def _origin(self) -> prefix_file.Origin:
        return prefix_file.Origin(
            prefix_file.checkpoint_id(self.folder), prefix_file.kind_of_numbers(self.info, self.model)
        )

    def stats(self) -> EngineStats:
        """What the engine counted so far, and the arena as it is now."""
        return self._engine.stats()

    def memory_addresses(self) -> list[int]:
        """Where the KV arrays lie, for a check that no step copies them; empty for backends that cannot."""
        return self._engine.call(lambda core: core.backend.memory_addresses())

    def describe_arena(self) -> str:
        """The KV arena as text: configuration, state, sequences, block map."""
        return self._engine.call(lambda core: core.arena.describe())

    def arena_svg(self, path: str | Path | None = None) -> str:
        """The KV arena as one SVG picture (`cortexstream.kv.picture` says how to read it), written to `path` if given.

        Raises InvalidRequestError if that cannot be written; a folder that is missing is not made.
        """
        if path is not None:
            check_path("path", path)
        drawn = picture.arena_svg(self._engine.call(lambda core: core.arena.snapshot()))
        if path is not None:
            write_whole("path", path, drawn.encode())
        return drawn

    def check(self) -> None:
        """Prove the engine's invariants; raises if one is broken."""
        self._engine.call(lambda core: core.check())

    def close(self) -> None:
        """End what runs with an error and free the device memory. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_all(
        self, prompts: list[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Generation]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if not isinstance(params, Sequence):
            raise InvalidRequestError(
                "sampling_params", f"is {type(params).__name__}; must be SamplingParams or a list"
            )
        if len(params) != len(prompts):
            raise InvalidRequestError("sampling_params", f"has {len(params)} items for {len(prompts)} prompts")
        checked = [self._checked(prompt, sampling) for prompt, sampling in zip(prompts, params, strict=True)]
        generations = [self._generation(one) for one in checked]
        self._engine.add([sink for generation in generations for sink in generation.sinks()])
        return generations

    def _checked(self, prompt: Any, sampling: SamplingParams) -> _Checked:
        """What can be served. Raises InvalidRequestError; nothing is changed then."""
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequestError("sampling_params", f"is {type(sampling).__name__}; must be SamplingParams")
        if sampling.stop and self.tokenizer is None:
            raise InvalidRequestError("stop", "needs a tokenizer; use stop_token_ids with skip_tokenizer_init")
        text, ids = tokenize(prompt, self.tokenizer)
        constraint = None if sampling.structure is None else self._constraint(sampling.structure)
        self._engine.check(ids, sampling)
        return _Checked(text, ids, sampling, constraint)

    def _generation(
        self, checked: _Checked, request_id: str | None = None, listener: Listener | None = None
    ) -> Generation:
        text, ids, sampling, constraint = checked
        return Generation(self._engine, self.tokenizer, text, ids, sampling, request_id, listener, constraint)

    def _constraint(self, structure: GrammarSource) -> Constraint:
        """The compiled grammar. Raises InvalidRequestError if it cannot be met, or is too large."""
        from cortexstream.text.grammar import Grammars

        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(
                    self._need_tokenizer(structure.field), self.model.vocab_size, self.model.eos_token_ids
                )
        return self._grammars.compile(structure)

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(field, "needs a tokenizer; this model was loaded without one")
        return self.tokenizer

    @staticmethod
    def _wait(generation: Generation) -> None:
        while True:
            try:
                generation.result(POLL_S)
                return
            except TimeoutError:
                continue
