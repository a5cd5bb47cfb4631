"""`cortexstream chat`: a conversation, on a terminal or through a pipe.

Answers, and what /help and /stats say, are written to standard output, everything else to standard error. Through a
pipe every line is a message or a command, and the exit code is 1 if a message could not be answered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from cortexstream.cli import options
from cortexstream.cli.conversation import Conversation, Fit
from cortexstream.errors import InvalidRequestError
from cortexstream.request import SamplingParams

if TYPE_CHECKING:
    from cortexstream.llm import LLM

HELP = """/help          this list
/clear         forget what was said; the system prompt stays
/system TEXT   set the system prompt, from the next message on; without TEXT show it
/stats         speed of the last answer, and how full the context is
/bye           end (so does Ctrl-D); Ctrl-C stops an answer
A message that begins with / needs a space before it."""
ANSWER_SHARE = 4  # an answer may claim 1/4 of the context before old turns are dropped for it
MAX_TOKENS = 1024


def chat(
    model: options.Model = None,
    backend: options.Backend = "auto",
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")] = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = MAX_TOKENS,
    stop: options.Stop = None,
    dtype: options.DType = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    max_model_len: options.MaxModelLen = None,
) -> None:
    """Talk with the model; /help lists the commands."""
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )  # fmt: skip
    with options.load_llm(model, backend, dtype, kv_cache_memory, max_model_len, 1) as llm:
        on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if on_terminal:
            print(f"{llm.model.architecture} on {llm.info.name} ({llm.info.device}); /help lists the commands")
        talk = Talk(llm, sampling, system)
        talk.run(_terminal() if on_terminal else input, on_terminal)
    if talk.num_refused and not on_terminal:
        raise typer.Exit(1)


def _terminal() -> Callable[[], str]:
    """Reads a line with editing and history."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")


class Talk:
    """The loop: a line in, an answer out."""

    def __init__(self, llm: LLM, sampling: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._sampling = sampling
        self._conversation = Conversation(llm.encode_chat, llm.limits.max_tokens, system)
        self._last = "nothing was answered yet"
        self._context_tokens = 0
        self.num_refused = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP), "/clear": self._clear, "/system": self._system, "/stats": self._stats,
        }  # fmt: skip

    def run(self, read: Callable[[], str], on_terminal: bool) -> None:
        """Until the input ends or /bye. On a terminal Ctrl-C at the prompt clears the line."""
        while True:
            try:
                line = read()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise InvalidRequestError("prompt", f"input is not valid {error.encoding}: {error.reason}") from error
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                continue
            if line.startswith("/"):
                name, _, rest = line.strip().partition(" ")
                if name == "/bye":
                    return
                command = self._commands.get(name)
                if command is None:
                    self._unknown(name)
                else:
                    command(rest.strip())
            elif line.strip():
                self._try_answer(line.strip())

    def _try_answer(self, text: str) -> None:
        try:
            self._answer(text)
        except InvalidRequestError as error:  # this message alone is at fault: a template's refusal, or its length
            self.num_refused += 1
            print(f"error: {error}", file=sys.stderr)

    def _answer(self, text: str) -> None:
        """Stream the answer; the turn is kept once it has begun, however far it came."""
        conversation = self._conversation
        answer_tokens, most = conversation.limit_tokens // ANSWER_SHARE, self._sampling.max_tokens
        if most is not None:
            answer_tokens = min(answer_tokens, most)
        fit = conversation.fit(text, answer_tokens)
        started = perf_counter()
        generation = self._llm.submit({"prompt_token_ids": fit.token_ids}, self._sampling)
        self._tell_overflow(fit, answer_tokens)
        stopped = False
        try:
            for chunk in generation:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            generation.cancel()
            stopped = True
        print()
        completion = generation.output().outputs[0]
        seconds = perf_counter() - started
        num_tokens = len(completion.token_ids)
        if completion.error is not None:
            self.num_refused += 1
            print(f"error: {completion.error}", file=sys.stderr)
        elif stopped:
            print("stopped", file=sys.stderr)
        elif completion.finish_reason == "length":
            print(f"cut off after {num_tokens} tokens", file=sys.stderr)
        said = [] if completion.error is not None else [(text, completion.text)]
        conversation.turns = [*conversation.turns[fit.num_dropped :], *said]
        self._context_tokens = len(fit.token_ids) + num_tokens
        self._last = f"last answer: {num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s"

    def _tell_overflow(self, fit: Fit, answer_tokens: int) -> None:
        if fit.num_dropped:
            turns = "turn is" if fit.num_dropped == 1 else f"{fit.num_dropped} turns are"
            print(
                f"the conversation has {fit.full_tokens} tokens and {answer_tokens} are kept for the answer, but only "
                f"{self._conversation.limit_tokens} fit: the oldest {turns} dropped",
                file=sys.stderr,
            )

    def _clear(self, _: str) -> None:
        self._conversation.turns = []
        self._context_tokens = 0

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        else:
            print(self._conversation.system or "there is no system prompt")

    def _stats(self, _: str) -> None:
        engine = self._llm.stats()
        print(f"{self._last}; context: {self._context_tokens} of {self._conversation.limit_tokens} tokens; "
              f"{engine.steps} steps, {engine.output_tokens} tokens since the start")  # fmt: skip

    def _unknown(self, name: str) -> None:
        self.num_refused += 1
        print(f"error: {name} is no command; /help lists them, and a message needs a space before /", file=sys.stderr)
