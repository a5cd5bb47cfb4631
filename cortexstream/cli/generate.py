"""`cortexstream generate`: complete prompts.

What is written to standard output:

    one prompt, one completion    the prompt and its completion, joined; with --chat the answer begins on a new line
    several                       the same under header lines "==> 2 of 3 <==", as `head` and `tail` write them, with an
                                  empty line between; with --n also "==> 2 of 3, completion 1 of 4 <=="
    --json                        one JSON object per completion and line

With --stream one completion is written piece by piece; of several each is written whole as soon as it has ended, so
they come in order of their ends: the header, or `prompt_index` and `index`, says which it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from cortexstream.cli import options
from cortexstream.errors import InvalidRequestError
from cortexstream.outputs import CompletionOutput, RequestOutput, StreamChunk
from cortexstream.request import SamplingParams

if TYPE_CHECKING:
    from cortexstream.llm import LLM
    from cortexstream.prompts import Prompt


class Asked(NamedTuple):
    """A prompt as it was typed, and as the engine gets it."""

    number: int  # from 0, in the order that the prompts were given
    text: str
    prompt: Prompt


class Ended(NamedTuple):
    """One completion that has ended."""

    asked: Asked
    output: RequestOutput
    completion: CompletionOutput


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="Texts to complete; - reads one per line from standard input.")
    ],
    model: options.Model = None,
    backend: options.Backend = "auto",
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = 256,
    stop: options.Stop = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    grammar: options.Grammar = None,
    n: Annotated[int, typer.Option("--n", rich_help_panel=options.SAMPLING, help="Completions per prompt.")] = 1,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Put each prompt into the model's chat template.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write text as it comes; of several, each as it ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object per completion and line.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tell speed and steps on standard error.")] = False,
    dtype: options.DType = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    speculative_tokens: options.SpeculativeTokens = None,
    draft_model: options.DraftModel = None,
) -> None:
    """Complete one prompt or several, as one batch.

    Several are written under header lines such as "==> 2 of 3 <=="; --json is for programs.
    """
    texts = read_prompts(prompts)
    sampling = SamplingParams(
        n=n, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens,
        stop=tuple(stop or ()), **options.form_of(json_schema, regex, choice, grammar),
    )  # fmt: skip
    started = perf_counter()
    loading = options.load_llm(
        model, backend, dtype, kv_cache_memory, max_model_len, max_num_seqs, speculative_tokens, draft_model
    )
    with loading as llm:
        loaded = perf_counter()
        asked = ask(llm, texts, chat)
        if stream and not as_json and len(texts) == n == 1:
            all_ended = [write_pieces(llm, asked[0], sampling, chat)]
        else:
            write = json_writer() if as_json else block_writer(len(texts), n, chat)
            source = as_they_end(llm, asked, sampling) if stream else in_order(llm, asked, sampling)
            all_ended = []
            for ended in source:
                write(ended)
                all_ended.append(ended)
        if stats:
            print(stats_line(llm, all_ended, loaded - started, perf_counter() - loaded), file=sys.stderr)
    tell_failures(all_ended)


def read_prompts(arguments: list[str]) -> list[str]:
    """The prompts: an argument each, and in the place of "-" the lines of standard input that are not empty."""
    if arguments.count("-") > 1:
        raise InvalidRequestError("prompt", "has - more than once; standard input can be read once")
    texts: list[str] = []
    for argument in arguments:
        texts += _lines_of_input() if argument == "-" else [argument]
    if not texts:
        raise InvalidRequestError("prompt", "is missing: standard input has no line with text; give one per line")
    return texts


def _lines_of_input() -> list[str]:
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompt", f"standard input is not valid {error.encoding}: {error.reason}") from error
    return [line for line in lines if line.strip()]


def ask(llm: LLM, texts: list[str], chat: bool) -> list[Asked]:
    """The prompts for the engine: texts, or with `chat` the token ids of conversations of one message."""
    if not chat:
        return [Asked(number, text, text) for number, text in enumerate(texts)]
    return [
        Asked(number, text, {"prompt_token_ids": llm.encode_chat([{"role": "user", "content": text}])})
        for number, text in enumerate(texts)
    ]


def in_order(llm: LLM, asked: list[Asked], sampling: SamplingParams) -> Iterator[Ended]:
    """All completions of the batch, once all have ended."""
    outputs = llm.generate([one.prompt for one in asked], sampling)
    for one, output in zip(asked, outputs, strict=True):
        yield from (Ended(one, output, completion) for completion in output.outputs)


def as_they_end(llm: LLM, asked: list[Asked], sampling: SamplingParams) -> Iterator[Ended]:
    """Each completion as soon as it has ended."""
    ends: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def listener(number: int) -> Callable[[StreamChunk], None]:
        def listen(chunk: StreamChunk) -> None:
            if chunk.finish_reason is not None:
                ends.put((number, chunk.index))

        return listen

    generations = [llm.submit(one.prompt, sampling, listener=listener(one.number)) for one in asked]
    try:
        for _ in range(len(generations) * sampling.n):
            number, index = ends.get()
            output = generations[number].output()
            yield Ended(asked[number], output, output.outputs[index])
    finally:
        for generation in generations:
            generation.cancel()


def write_pieces(llm: LLM, asked: Asked, sampling: SamplingParams, chat: bool) -> Ended:
    """Write the prompt, then its completion as it grows."""
    generation = llm.submit(asked.prompt, sampling)
    _write(asked.text + ("\n" if chat else ""))
    try:
        for chunk in generation:
            _write(chunk.text)
    finally:
        generation.cancel()
        _write("\n")
    output = generation.output()
    return Ended(asked, output, output.outputs[0])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def block_writer(num_prompts: int, n: int, chat: bool) -> Callable[[Ended], None]:
    """Writes completions as the module's docstring says."""
    written = 0

    def write(ended: Ended) -> None:
        nonlocal written
        if num_prompts * n > 1:
            which = f", completion {ended.completion.index + 1} of {n}" if n > 1 else ""
            _write(f"{'' if not written else chr(10)}==> {ended.asked.number + 1} of {num_prompts}{which} <==\n")
        _write(f"{ended.asked.text}{chr(10) if chat else ''}{ended.completion.text}\n")
        written += 1

    return write


def json_writer() -> Callable[[Ended], None]:
    """Writes completions as JSON lines."""

    def write(ended: Ended) -> None:
        completion = ended.completion
        values = {
            "prompt_index": ended.asked.number, "index": completion.index, "prompt": ended.asked.text,
            "text": completion.text, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason,
            "prompt_tokens": len(ended.output.prompt_token_ids), "completion_tokens": len(completion.token_ids),
        }  # fmt: skip
        if completion.error is not None:
            values["error"] = completion.error
        _write(json.dumps(values, ensure_ascii=False) + "\n")

    return write


def stats_line(llm: LLM, all_ended: list[Ended], load_s: float, run_s: float) -> str:
    """What the run took, for people."""
    prompts = {ended.asked.number: len(ended.output.prompt_token_ids) for ended in all_ended}
    tokens = sum(len(ended.completion.token_ids) for ended in all_ended)
    engine = llm.stats()
    return (
        f"{llm.info.name} on {llm.info.device}: loaded in {load_s:.2f} s; {sum(prompts.values())} prompt tokens, "
        f"{tokens} generated in {run_s:.2f} s, {tokens / run_s:.1f} tokens/s; {engine.steps} steps, "
        f"{engine.preemptions} preemptions"
        + (
            f"; {engine.acceptance_rate:.0%} of {engine.drafted_tokens} guesses right, "
            f"{engine.tokens_per_drafted_row:.2f} tokens per row with guesses"
            if engine.drafted_rows
            else ""
        )
    )


def tell_failures(all_ended: list[Ended]) -> None:
    """Raise typer.Exit(1), each reason having been told, if a completion failed on the device."""
    failed = [ended for ended in all_ended if ended.completion.finish_reason == "error"]
    for ended in failed:
        print(f"error: prompt {ended.asked.number + 1}: {ended.completion.error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)
